"""The order's promises as properties (hypothesis): any data sets, shards, ranks 1..512, workers, batch, seed, stop.

Ranks and workers are plain integers here: hundreds of them are played in one process. Real processes are killed in
test_resume.py.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.loader import StepDataset
from pipeline.data.order import Item, SampleOrder, Shares

TASKS = ("reasoning", "referring", "caption", "generation")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


class Numbers:
    """A data set whose sample i is i."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        assert 0 <= i < self.n
        return i

    def key(self, i: int) -> str:
        return str(i)


def items_only(good: Sequence[tuple[int, Item]], bad: Sequence[str]) -> Any:
    """Stands for the collator: what a micro-batch is made of."""
    assert not bad and all(sample == item.sample for sample, item in good)
    return [item for _, item in good]


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    """Any order whose global batch has many divisors: 1 to 4 data sets of 1 to 8 shards of 1 to 60 samples."""
    shards = draw(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4))
    weights = draw(st.just(()) | st.tuples(*[st.sampled_from([0.1, 0.5, 1, 2, 3.7, 33682])] * len(shards)))
    mix = draw(st.sampled_from([(1, 1, 1, 1), (4, 3, 2, 1), (0.5, 0.3, 0.1, 0.1), (1, 0, 0, 2)]))
    return SampleOrder(
        sum(map(sum, shards)),
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from([1, 2, 3, 4, 6, 12, 16, 48, 64, 96, 256, 512, 1024])),
        TASKS,
        mix,
        sizes=[sum(each) for each in shards] if weights else (),
        weights=weights,
        shards=[shard for each in shards for shard in each],
        window=draw(st.sampled_from([0, 1, 7, 64, 10_000])),
    )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, 512) + 1) if n % d == 0]


def played(order: SampleOrder, first: int, last: int, *, world: int, micro: int, workers: int) -> list[list[Item]]:
    """The global batches of steps first..last-1, put together from what each worker of each rank reads.

    As torch's DataLoader does it: step first + i falls to worker i mod workers, each with a copy of the order of its
    own, and every worker is ahead of or behind the others.
    """
    batches: list[list[Item]] = [[] for _ in range(last - first)]
    for rank in range(world):
        for worker in range(max(workers, 1)):
            steps = StepDataset(
                Numbers(order.n), pickle.loads(pickle.dumps(order)), items_only,  # type: ignore[arg-type]
                rank=rank, world=world, micro_batch=micro, first_step=first, last_step=last,
            )  # fmt: skip
            for step in range(first + worker, last, max(workers, 1)):
                micros: list[Any] = steps[step]
                assert len(micros) == order.global_batch // world // micro
                batches[step - first] += [item for part in micros for item in part]
    return batches


@QUICK
@given(orders(), st.data())
def test_batches_are_the_same_on_any_ranks_workers_and_micro_batches(order, data):
    world = data.draw(st.sampled_from(divisors(order.global_batch)), "world")
    micro = data.draw(st.sampled_from(divisors(order.global_batch // world)), "micro")
    workers = data.draw(st.integers(0, 5), "workers")
    first = data.draw(st.integers(0, 50) | st.integers(0, 10**6), "first")
    # Slices of ranks are contiguous, so ranks in a row give the batch in its own order, not only as a set.
    found = played(order, first, first + 3, world=world, micro=micro, workers=workers)
    assert found == [order.items(step) for step in range(first, first + 3)]


@QUICK
@given(orders(), st.data())
def test_a_resumed_run_is_the_uninterrupted_one_also_on_another_number_of_ranks(order, data):
    worlds = st.sampled_from(divisors(order.global_batch))
    last = 8
    stops = sorted(data.draw(st.lists(st.integers(0, last), min_size=1, max_size=3), "stops"))
    resumed: list[list[Item]] = []
    for start, stop in zip([0, *stops], [*stops, last]):
        # A run that resumes knows the step and nothing else: the order is made anew.
        anew = SampleOrder(
            order.n, order.seed, order.global_batch, order.tasks, order.task_mix,
            sizes=[pool.n for pool in order._pools] if order.weights else (), weights=order.weights,
            shards=[size for pool in order._pools for size in pool._shards or (pool.n,)], window=order.window,
        )  # fmt: skip
        resumed += played(anew, start, stop, world=data.draw(worlds, "world"), micro=1, workers=2)
    whole = played(order, 0, last, world=1, micro=order.global_batch, workers=0)
    assert resumed == whole


@QUICK
@given(orders(), st.integers(0, 3))
def test_each_epoch_is_the_data_set_none_lost_none_twice(order, more):
    """Epochs follow one another without a gap: a batch may straddle two, no sample is dropped or repeated to fill one.
    Of weighted sets each has epochs of its own."""
    steps = min(len(order) * (2 + more), 4000)
    items = [item for step in range(steps) for item in order.items(step)]
    assert len(items) == steps * order.global_batch
    for pool in order._pools:
        own = [item for item in items if pool.first <= item.sample < pool.first + pool.n]
        everything = list(range(pool.first, pool.first + pool.n))
        for epoch in range(len(own) // pool.n + 1):
            seen = sorted(item.sample for item in own if item.epoch == epoch)
            whole = (epoch + 1) * pool.n <= len(own)
            assert seen == everything if whole else len(set(seen)) == len(seen)
        # In order: an epoch begins when the one before is through.
        assert [item.epoch for item in own] == [place // pool.n for place in range(len(own))]


@QUICK
@given(orders(), st.integers(0, 10**9))
def test_any_step_is_found_at_once(order, step):
    """Nothing of what went before is computed or read: state is the step alone."""
    assert order.items(step) == order.items(step)
    assert len(order.items(step)) == order.global_batch


@QUICK
@given(
    st.integers(1, 200),
    st.lists(st.sampled_from([0.1, 0.25, 0.333, 1, 2, 3, 7, 19, 33682]), min_size=1, max_size=5),
    st.integers(0, 60),
    st.integers(0, 10**6),
)
def test_shares_before_a_step_are_the_sum_of_the_steps(total, shares, steps, far):
    made = Shares(total, shares)
    counts: Counter[int] = Counter()
    for step in range(steps):
        kinds = made.kinds(step)
        assert len(kinds) == total
        counts.update(kinds)
    assert [made.before(steps, kind) for kind in range(len(shares))] == [counts[kind] for kind in range(len(shares))]
    assert sum(made.before(far, kind) for kind in range(len(shares))) == far * total
    for kind, share in enumerate(shares):
        exact = far * total * share / sum(shares)
        assert abs(made.before(far, kind) - exact) <= made.period + 1 + exact * 1e-3
