"""The order of samples and tasks: integers only, no process, no file. Every rank is played in this one process."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pipeline.data.order import SampleOrder, keyed_rng, rank_slice

TASKS = ("reasoning", "referring", "caption", "generation")
EVEN = (1.0, 1.0, 1.0, 1.0)
EXPECTED = [(0, 0, "caption"), (4, 0, "referring"), (6, 1, "reasoning"), (7, 1, "generation")]
EXPECTED_DRAWS = [182, 813, 58, 920]


def test_every_sample_once_per_epoch_whatever_the_batch():
    for n, batch in ((57, 12), (5, 12), (64, 16), (1, 4)):
        order = SampleOrder(n, 3, batch, TASKS, EVEN)
        items = [item for step in range(4 * n) for item in order.items(step)]
        for epoch in range(3):
            seen = [item.sample for item in items if item.epoch == epoch]
            assert sorted(seen) == list(range(n))


def test_epochs_and_seeds_differ_and_repeat_exactly():
    def samples(seed: int, steps: range) -> list[int]:
        order = SampleOrder(40, seed, 8, TASKS, EVEN)
        return [item.sample for step in steps for item in order.items(step)]

    assert samples(0, range(5)) == samples(0, range(5))
    assert samples(0, range(5)) != samples(0, range(5, 10))
    assert samples(0, range(5)) != samples(1, range(5))


def test_the_order_never_changes_between_versions():
    """A run that is resumed with newer code must go on as it began: these numbers may not change."""
    items = SampleOrder(10, 0, 4, TASKS, EVEN).items(2)
    assert [tuple(item) for item in items] == EXPECTED
    assert keyed_rng("a", 1).integers(1000, size=4).tolist() == EXPECTED_DRAWS


def test_ranks_share_the_same_global_batch():
    order = SampleOrder(100, 0, 48, TASKS, EVEN)
    for step in (0, 7, 1_000_000):
        whole = order.items(step)
        for world in (1, 2, 3, 4, 8, 16, 48):
            assert [item for rank in range(world) for item in rank_slice(whole, rank, world)] == whole
    with pytest.raises(ValueError, match="cannot be shared by 5 ranks"):
        rank_slice(order.items(0), 0, 5)


@pytest.mark.parametrize(
    ("batch", "mix"),
    [(12, EVEN), (1, EVEN), (3, EVEN), (6, EVEN), (10, (4, 3, 2, 1)), (7, (0.5, 0.3, 0.1, 0.1)), (5, (1, 0, 0, 2))],
)
def test_task_shares_are_exact(batch, mix):
    order = SampleOrder(1000, 0, batch, TASKS, mix)
    total: Counter[str] = Counter()
    for step in range(order._task_shares.period):
        counts = Counter(item.task for item in order.items(step))
        total += counts
        for task, share in zip(TASKS, mix):
            exact = batch * share / sum(mix)
            assert np.floor(exact) <= counts[task] + 1e-9
            assert counts[task] <= np.ceil(exact - 1e-9)
    for task, share in zip(TASKS, mix):
        assert total[task] == pytest.approx(order._task_shares.period * batch * share / sum(mix))


def test_tasks_are_shuffled_within_a_batch():
    order = SampleOrder(1000, 0, 12, TASKS, EVEN)
    assert len({tuple(item.task for item in order.items(step)) for step in range(8)}) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 4, TASKS, EVEN), "no samples"),
        ((9, 0, 0, TASKS, EVEN), "global_batch"),
        ((9, 0, 4, TASKS, (1.0,)), "1 shares for 4 tasks"),
        ((9, 0, 4, TASKS, (0.0, 0.0, 0.0, 0.0)), "not all of them 0"),
        ((9, 0, 4, TASKS, (1.0, -1.0, 1.0, 1.0)), ">= 0"),
        ((9, 0, 4, ("caption", "caption"), (1.0, 1.0)), "none twice"),
    ],
)
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(*arguments)
