"""Which sample, for which task, at which step: pure functions of integers.

Nothing here knows of ranks until rank_slice cuts a finished global batch, and nothing of workers or micro-batches at
all; so a run that resumes on another number of GPUs sees exactly the samples it would have seen. No random state is
carried: every draw comes from a generator keyed by what the draw is for.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

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


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return keyed_rng("order", seed, n, epoch).permutation(n)


class SampleOrder:
    """The order of training. Step s holds places s*G .. (s+1)*G-1 of an endless row of epochs, each a permutation of
    all n samples: none is lost or seen twice in an epoch, and a batch may straddle two epochs.

    `task_mix` gives each task's share of a global batch, in any unit. Shares that are no whole number of samples are
    rounded down or up so that they come out exactly over a cycle of steps.
    """

    def __init__(
        self, n: int, seed: int, global_batch: int, tasks: tuple[str, ...], task_mix: tuple[float, ...]
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
        self.n = n
        self.seed = seed
        self.global_batch = global_batch
        self.tasks = tuple(tasks)
        self.task_mix = tuple(float(share) for share in task_mix)
        # Decimal shares such as 0.1 are meant as written, not as the nearest binary fraction.
        shares = [Fraction(str(share)).limit_denominator(10_000) for share in self.task_mix]
        exact = [global_batch * share / sum(shares) for share in shares]
        self._whole = [math.floor(share) for share in exact]
        rests = [share - math.floor(share) for share in exact]
        self._period = math.lcm(*(rest.denominator for rest in rests))
        self._rest_ends = np.cumsum([int(rest * self._period) for rest in rests]).tolist()
        self._seats = global_batch - sum(self._whole)
        self._stride = _coprime_near(self._period, 0.618)

    def __len__(self) -> int:
        """Steps in which every sample has been seen once (the last one may hold samples of the next epoch)."""
        return -(-self.n // self.global_batch)

    def _tasks(self, step: int) -> list[str]:
        """The tasks of one global batch, G names.

        The seats that whole shares leave over are spread by systematic sampling: a comb of unit spacing laid over the
        rests, its offset stepping through all `period` positions, hits each task floor or ceil of its rest per step
        and exactly rest * period times per cycle.
        """
        names = [task for task, count in zip(self.tasks, self._whole, strict=True) for _ in range(count)]
        offset = (step * self._stride) % self._period
        for seat in range(self._seats):
            tooth = seat * self._period + offset
            names.append(next(t for t, end in zip(self.tasks, self._rest_ends, strict=True) if tooth < end))
        return [names[i] for i in keyed_rng("tasks", self.seed, step).permutation(self.global_batch)]

    def items(self, step: int) -> list[Item]:
        """The global batch of `step` (from 0), in order."""
        assert step >= 0
        items = []
        for place, task in enumerate(self._tasks(step), start=step * self.global_batch):
            epoch, position = divmod(place, self.n)
            items.append(Item(int(_permutation(self.n, self.seed, epoch)[position]), epoch, task))
        return items


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
