"""Which sample, for which task, at which step: pure functions of integers.

Nothing here knows of ranks until rank_slice cuts a finished global batch, and nothing of workers or micro-batches at
all; so a run that resumes on another number of GPUs sees exactly the samples it would have seen. No random state is
carried: every draw comes from a generator keyed by what the draw is for.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np


class Item(NamedTuple):
    """One place in a global batch: index of the sample in its split, how often it was seen before, the task."""

    sample: int
    epoch: int
    task: str


def keyed_rng(*parts: int | str) -> np.random.Generator:
    """A generator that depends on `parts` alone: the same on every machine, rank, worker and Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")))


class Shares:
    """Divides `total` seats of every step among kinds, in the given proportions and exactly over a cycle of steps.

    Whole seats are the same in each step. Those left over are spread by systematic sampling: a comb of unit spacing
    laid over the rests, its offset stepping through all positions of the cycle, hits each kind floor or ceil of its
    rest per step and exactly rest * period times per cycle.
    """

    def __init__(self, total: int, shares: Sequence[float]) -> None:
        # Decimal shares such as 0.1 are meant as written, not as the nearest binary fraction.
        fractions = [Fraction(str(share)).limit_denominator(10_000) for share in shares]
        exact = [total * share / sum(fractions) for share in fractions]
        self.whole = [math.floor(share) for share in exact]
        rests = [share - math.floor(share) for share in exact]
        self.period = math.lcm(*(rest.denominator for rest in rests))
        self._ends = np.cumsum([int(rest * self.period) for rest in rests]).tolist()
        self._seats = total - sum(self.whole)
        self._stride = _coprime_near(self.period, 0.618)

    def kinds(self, step: int) -> list[int]:
        """The kind of each seat of a step: the whole ones by kind, then the others."""
        found = [kind for kind, count in enumerate(self.whole) for _ in range(count)]
        offset = (step * self._stride) % self.period
        for seat in range(self._seats):
            tooth = seat * self.period + offset
            found.append(next(kind for kind, end in enumerate(self._ends) if tooth < end))
        return found

    def before(self, step: int, kind: int) -> int:
        """Seats that `kind` had in all steps before `step`."""
        low, high = ([0, *self._ends][kind], self._ends[kind])
        found = self.whole[kind] * step
        for seat in range(self._seats):
            start, end = (min(max(edge - seat * self.period, 0), self.period) for edge in (low, high))
            found += self._below(step, end) - self._below(step, start)
        return found

    def _below(self, steps: int, edge: int) -> int:
        """In how many of the first `steps` steps the comb's offset lies below `edge`, which is in 0..period.

        With x the unreduced offset, [x mod p < e] = floor(x / p) - floor((x - e) / p).
        """
        return _floor_sum(steps, self.period, self._stride, 0) - _floor_sum(steps, self.period, self._stride, -edge)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """sum of floor((a i + b) / m) over i = 0 .. n-1, in the logarithm of m many steps (the Euclid-like algorithm)."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b, m, a = top // m, top % m, a, m
    return total


class _Pool:
    """One data set's endless row of epochs. `first` is the number of its first sample among all."""

    def __init__(self, first: int, n: int, shards: Sequence[int], window: int, name: tuple[int | str, ...]) -> None:
        self.first, self.n, self._name = first, n, name
        self._shards = tuple(shards) if 0 < window < n else ()
        self._window = window
        self._made: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def at(self, place: int) -> tuple[int, int]:
        """(sample among all, epoch) at a place of the row."""
        epoch, position = divmod(place, self.n)
        if epoch not in self._made:
            # A batch may straddle two epochs; older ones do not come back.
            self._made = {number: order for number, order in self._made.items() if number == epoch - 1}
            self._made[epoch] = self._permutation(epoch)
        return self.first + int(self._made[epoch][position]), epoch

    def _permutation(self, epoch: int) -> np.ndarray:
        seed, *rest = self._name
        rng = keyed_rng("order", seed, self.n, epoch, *rest)
        if not self._shards:
            return rng.permutation(self.n)
        starts = np.cumsum([0, *self._shards])
        order = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in rng.permutation(len(self._shards))])
        for start in range(0, self.n, self._window):
            part = order[start : start + self._window]
            order[start : start + self._window] = part[rng.permutation(len(part))]
        return order


class SampleOrder:
    """The order of training. Step s holds places s*G .. (s+1)*G-1 of an endless row of epochs, each a permutation of
    all n samples: none is lost or seen twice in an epoch, and a batch may straddle two epochs.

    `task_mix` gives each task's share of a global batch, in any unit. Shares that are no whole number of samples are
    rounded down or up so that they come out exactly over a cycle of steps.

    sizes, weights  several data sets of so many samples each, one after the other in 0..n-1, and each one's share of
                    every global batch in any unit: each then has a row of epochs of its own
    shards, window  samples of each shard, and how many samples are shuffled together: an epoch goes through the shards
                    in a random order, `window` samples at a time in a random order within, so that storage is read
                    where it was read a moment ago. A window of 0, or of n and more, shuffles all samples together
    """

    def __init__(
        self,
        n: int,
        seed: int,
        global_batch: int,
        tasks: tuple[str, ...],
        task_mix: tuple[float, ...],
        *,
        sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
        shards: Sequence[int] = (),
        window: int = 0,
    ) -> None:
        if n < 1:
            raise ValueError("the data set has no samples; look into its report.json for why they were left out")
        if global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, found {global_batch}")
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks must name at least one task and none twice, found {','.join(tasks)!r}")
        if len(task_mix) != len(tasks):
            raise ValueError(f"task_mix has {len(task_mix)} shares for {len(tasks)} tasks: give one share per task")
        if any(not math.isfinite(share) or share < 0 for share in task_mix) or sum(task_mix) <= 0:
            raise ValueError(f"task_mix must hold shares >= 0, not all of them 0, found {task_mix}")
        if window < 0:
            raise ValueError(f"the shuffle window must be at least 0 samples, found {window}")
        if len(sizes) != len(weights):
            raise ValueError(f"there are {len(weights)} weights for {len(sizes)} data sets: give one weight per set")
        if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
            raise ValueError(f"weights of data sets must be above 0, found {tuple(weights)}: leave a set out instead")
        if any(size < 1 for size in sizes):
            raise ValueError(
                "one of the data sets has no samples; look into its report.json for why they were left out"
            )
        self.n = n
        self.seed = seed
        self.global_batch = global_batch
        self.tasks = tuple(tasks)
        self.task_mix = tuple(float(share) for share in task_mix)
        self.weights = tuple(float(weight) for weight in weights)
        self.window = window if shards and window < n else 0
        self._task_shares = Shares(global_batch, self.task_mix)
        self._pools = _pools(n, seed, sizes, shards, self.window)
        self._pool_shares = Shares(global_batch, self.weights) if self.weights else None

    def __len__(self) -> int:
        """Steps in which every sample has been seen once (the last one may hold samples of the next epoch); of weighted
        data sets, in which as many samples have been seen as there are."""
        return -(-self.n // self.global_batch)

    def _tasks(self, step: int) -> list[str]:
        """The tasks of one global batch, G names."""
        names = [self.tasks[kind] for kind in self._task_shares.kinds(step)]
        return [names[i] for i in keyed_rng("tasks", self.seed, step).permutation(self.global_batch)]

    def _places(self, step: int) -> Iterator[tuple[_Pool, int]]:
        """The data set and the place in its row of each of the G samples."""
        if self._pool_shares is None:
            yield from ((self._pools[0], step * self.global_batch + i) for i in range(self.global_batch))
            return
        kinds = self._pool_shares.kinds(step)
        following = [self._pool_shares.before(step, kind) for kind in range(len(self._pools))]
        for i in keyed_rng("sets", self.seed, step).permutation(self.global_batch):
            yield self._pools[kinds[i]], following[kinds[i]]
            following[kinds[i]] += 1

    def items(self, step: int) -> list[Item]:
        """The global batch of `step` (from 0), in order."""
        assert step >= 0
        places = (pool.at(place) for pool, place in self._places(step))
        return [Item(sample, epoch, task) for (sample, epoch), task in zip(places, self._tasks(step), strict=True)]


def _pools(n: int, seed: int, sizes: Sequence[int], shards: Sequence[int], window: int) -> list[_Pool]:
    assert not shards or sum(shards) == n
    if not sizes:
        return [_Pool(0, n, shards, window, (seed,))]
    assert sum(sizes) == n
    pools, first = [], 0
    starts = np.cumsum([0, *shards[:-1]]) if shards else np.zeros(0)
    for number, size in enumerate(sizes):
        own = [shard for shard, start in zip(shards, starts, strict=True) if first <= start < first + size]
        pools.append(_Pool(first, size, own, window, (seed, "set", number)))
        first += size
    return pools


def _coprime_near(period: int, fraction: float) -> int:
    """A stride that visits all of 0..period-1 and jumps far each time, so no task comes in long runs."""
    start = max(1, round(period * fraction))
    return next(stride for stride in range(start, start + period + 1) if math.gcd(stride, period) == 1)


def rank_slice(items: Sequence[Item], rank: int, world: int) -> list[Item]:
    """The contiguous share of `rank`. The global batch must divide by the number of ranks."""
    assert 0 <= rank < world
    if len(items) % world:
        raise ValueError(f"a global batch of {len(items)} cannot be shared by {world} ranks: choose a multiple")
    share = len(items) // world
    return list(items[rank * share : (rank + 1) * share])
