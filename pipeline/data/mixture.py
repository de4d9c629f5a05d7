"""Several packed data sets as one, and the order of a run over them: what `--data a,b --data_weights 2,1` means.

Without weights the sets are one: an epoch is all samples of all sets, each once. With weights each set has its share of
every global batch and epochs of its own, so that a small set comes round more often.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from pipeline.data.manifest import digest_of
from pipeline.data.order import SampleOrder
from pipeline.data.reader import ShardDataset
from pipeline.data.schema import Sample


class MixedDataset:
    """Data sets one after the other: sample i of the second is number len(first) + i. `digest` is of all of them."""

    def __init__(self, parts: Sequence[ShardDataset]) -> None:
        if not parts:
            raise ValueError("--data names no data set")
        self.parts = list(parts)
        self.sizes = tuple(len(part) for part in parts)
        self.shard_sizes = tuple(size for part in parts for size in part.shard_sizes)
        # One set keeps its own digest, which is what checkpoints of it hold.
        self.digest = parts[0].digest if len(parts) == 1 else digest_of([part.digest for part in parts])
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, i: int) -> tuple[ShardDataset, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect_right(self._ends, i)
        return self.parts[number], i - self._ends[number] + self.sizes[number]

    def key(self, i: int) -> str:
        """The key of sample i. Keys are unique within one data set only."""
        part, place = self._at(i)
        return part.key(place)

    def __getitem__(self, i: int) -> Sample:
        part, place = self._at(i)
        return part[place]


def folders(data: str) -> list[str]:
    """The folders and URLs that `--data` names, with commas between."""
    return [part.strip() for part in data.split(",") if part.strip()]


def absolute_folders(data: str) -> str:
    """`--data` with every folder absolute; URLs stay as they are."""
    return ",".join(part if "://" in part else os.path.abspath(part) for part in folders(data))


def open_data(data: str, split: str) -> MixedDataset:
    """One split of every data set that `--data` names. ValueError says which one has none, and how to pack it."""
    parts = []
    for folder in folders(data):
        try:
            parts.append(ShardDataset(folder, split))
        except ValueError as error:
            raise ValueError(f"--data {folder}: {error}") from error
    return MixedDataset(parts)


def weights_of(text: str, sets: int) -> tuple[float, ...]:
    """The numbers of `--data_weights`; () for an empty text. ValueError unless there is one above 0 for each set."""
    if not text:
        return ()
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != sets or not all(0.001 <= weight <= 1e6 for weight in weights):
        raise ValueError(
            f"--data_weights {text}: --data names {sets} data set{'s' if sets > 1 else ''}; give one weight for each, "
            "from 0.001 to 1000000, with commas between"
        )
    return weights


def make_order(
    dataset: MixedDataset,
    *,
    seed: int,
    global_batch: int,
    tasks: tuple[str, ...],
    task_mix: tuple[float, ...],
    weights: tuple[float, ...] = (),
    window: int = 0,
) -> SampleOrder:
    """The order of a run. `window`: samples that are shuffled together; 0 for all. See SampleOrder."""
    return SampleOrder(
        len(dataset),
        seed,
        global_batch,
        tasks,
        task_mix,
        sizes=dataset.sizes if weights else (),
        weights=weights,
        shards=dataset.shard_sizes,
        window=window,
    )
