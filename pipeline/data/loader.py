"""From a split and an order to what a training or scoring loop iterates over.

The loader is asked for steps, not for samples: item s of a StepDataset is all that this rank does in step s. Where to
go on after a stop is therefore one number, the trained step, whatever the workers had fetched ahead.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset

from pipeline.data.batch import PromptBatch, TrainingBatch
from pipeline.data.collate import Collator
from pipeline.data.order import Item, SampleOrder, rank_slice
from pipeline.data.schema import Sample
from pipeline.data.tasks import TASKS, check_names

EVAL_EPOCH = -1
"""The `epoch` that scoring's draws are keyed by: none of training's, and the same in every run."""
_GRACE = 200
"""Samples seen before the share of bad ones is judged; one bad picture among the first ten says nothing."""


_Batch = TypeVar("_Batch", bound=TrainingBatch)
_Made = TypeVar("_Made", covariant=True)


class MakeBatch(Protocol[_Made]):
    """From samples and their places in the order to one micro-batch; `skipped` names what could not be read."""

    def __call__(self, pairs: Sequence[tuple[Sample, Item]], skipped: Sequence[str], /) -> _Made: ...


class SampleSource(Protocol):
    """What the loaders read from: a ShardDataset, or in tests a list with keys."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Sample: ...
    def key(self, i: int) -> str: ...


def _read(dataset: SampleSource, items: Sequence[Item]) -> tuple[list[tuple[Sample, Item]], list[str]]:
    """The samples of `items` that can be read, and "key: reason" of the others."""
    good, bad = [], []
    for item in items:
        try:
            good.append((dataset[item.sample], item))
        except ValueError as error:
            bad.append(f"{dataset.key(item.sample)}: {error}")
    return good, bad


class StepDataset(Dataset[list[_Batch]], Generic[_Batch]):
    """`steps[s]` -> the micro-batches of this rank in step s; the same number of them on every rank, in every step."""

    def __init__(
        self,
        dataset: SampleSource,
        order: SampleOrder,
        collator: MakeBatch[_Batch],
        *,
        rank: int,
        world: int,
        micro_batch: int,
        first_step: int,
        last_step: int,
    ) -> None:
        if len(dataset) != order.n:
            raise ValueError(f"the order is for {order.n} samples, the data set has {len(dataset)}")
        if micro_batch < 1 or order.global_batch % (world * micro_batch):
            raise ValueError(
                f"a global batch of {order.global_batch} cannot be cut into micro-batches of {micro_batch} on "
                f"{world} ranks: choose a multiple of {world * max(micro_batch, 1)}"
            )
        self.dataset, self.order, self.collator = dataset, order, collator
        self.rank, self.world, self.micro_batch = rank, world, micro_batch
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step)

    def __getitem__(self, step: int) -> list[_Batch]:
        mine = rank_slice(self.order.items(step), self.rank, self.world)
        micros = [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]
        return [self.collator(*_read(self.dataset, items)) for items in micros]


def _leave_signals_to_the_parent(_worker: int) -> None:
    # SLURM sends its signals to the whole process group; a worker that died of one would fail the step being saved.
    for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class StepLoader(Generic[_Batch]):
    """Iterates over (step, micro-batches). Counts the samples that were skipped and stops when they are too many.

    `seen` and `skipped` are this rank's counts since the loader was made; `skipped_keys` names the first 100.
    """

    def __init__(self, loader: DataLoader[Any], steps: StepDataset[_Batch], max_bad_share: float) -> None:
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be within 0..1, found {max_bad_share}")
        self._loader, self._steps, self._max_bad_share = loader, steps, max_bad_share
        self.seen = 0
        self.skipped = 0
        self.skipped_keys: list[str] = []

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[int, list[_Batch]]]:
        for step, batches in enumerate(self._loader, start=self._steps.first_step):
            self._count(batches)
            yield step, batches

    def _count(self, batches: list[_Batch]) -> None:
        gone = [line for batch in batches for line in batch.skipped]
        self.seen += len(gone) + sum(len(batch.keys) for batch in batches)
        self.skipped += len(gone)
        self.skipped_keys += gone[: 100 - len(self.skipped_keys)]
        if self.skipped > self._max_bad_share * max(self.seen, _GRACE):
            raise ValueError(
                f"{self.skipped} of {self.seen} samples could not be read, more than the share of "
                f"{self._max_bad_share:g} that max_bad_share allows. The first: {'; '.join(self.skipped_keys[:3])}. "
                "Check the data set with `python pipeline/shard_mmud.py --verify`"
            )


def build_loader(
    dataset: SampleSource,
    order: SampleOrder,
    collator: MakeBatch[_Batch],
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch: int,
    first_step: int = 0,
    last_step: int,
    num_workers: int = 0,
    max_bad_share: float = 0.01,
    pin_memory: bool = False,
    prefetch: int = 2,
) -> StepLoader[_Batch]:
    """The training loader for steps first_step .. last_step-1; `prefetch` is in steps per worker."""
    steps = StepDataset(
        dataset,
        order,
        collator,
        rank=rank,
        world=world,
        micro_batch=micro_batch,
        first_step=first_step,
        last_step=last_step,
    )
    loader: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin_memory,
        persistent_workers=False,
        prefetch_factor=prefetch if num_workers else None,
    )
    return StepLoader(loader, steps, max_bad_share)


class _PromptDataset(Dataset[PromptBatch]):
    def __init__(self, dataset: SampleSource, collator: Collator, batches: list[tuple[str, list[int]]]) -> None:
        self.dataset, self.collator, self.batches = dataset, collator, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> PromptBatch:
        task, indices = self.batches[i]
        good, bad = _read(self.dataset, [Item(index, EVAL_EPOCH, task) for index in indices])
        # Here a sample without the task is left out, not asked something else: each score is of its task alone.
        good = [pair for pair in good if TASKS[task].available(pair[0])]
        return self.collator.prompts(good, bad)


class EvalLoader:
    """Every sample of a split once for each task, in order: rank r takes samples r, r+world, ... None is repeated to
    fill a batch, so ranks may have one batch more or less: nothing collective may happen inside the loop.

    `limit`: only the split's first so many samples (before ranks share them); 0 for all.
    """

    def __init__(
        self,
        dataset: SampleSource,
        collator: Collator,
        *,
        tasks: Sequence[str],
        rank: int = 0,
        world: int = 1,
        batch_size: int,
        limit: int = 0,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        mine = range(rank, min(limit, len(dataset)) if limit > 0 else len(dataset), world)
        chunks = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
        batches = [(task, chunk) for task in check_names(tasks) for chunk in chunks]
        self._prompts = _PromptDataset(dataset, collator, batches)
        self._loader: DataLoader[Any] = DataLoader(
            self._prompts,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[PromptBatch]:
        """Batches with at least one sample, or with the names of samples that could not be read."""
        for batch in self._loader:
            if batch.keys or batch.skipped:
                yield batch
