"""Packed samples by number: reads shards at the byte offsets of their indexes.

webdataset's own reader passes over a cut tar in silence, cannot resume, and gives ranks unequal counts; so it writes
the shards and any of its kind can read them, but training reads them here. No member is unpickled or extracted.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.images import load
from pipeline.data.manifest import (
    check_index,
    file_sha256,
    index_name,
    read_json,
    read_manifest,
    split_entry,
    splits_digest,
)
from pipeline.data.schema import IMAGE_FORMATS, Sample

_AGAIN = "pack the data set again with --force"


class ShardDataset:
    """The samples of one split, `dataset[i]` -> Sample, i = 0 .. len-1 in the order of packing.

    Opening checks the manifest, the indexes and the sizes of the shards; a sample is read whole or ValueError names the
    shard and the key. Safe to hand to worker processes: files are opened where they are read.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.root = Path(root)
        self.split = split
        entry = split_entry(read_manifest(self.root), self.root, split)
        self._shards: list[Path] = []
        self._places: list[tuple[int, str, dict[str, list[int]]]] = []
        indexes = []
        for number, shard in enumerate(entry["shards"]):
            path = self.root / Path(shard["name"]).name
            index = read_index(path)
            _check_size(path, shard["bytes"])
            indexes.append(index)
            self._shards.append(path)
            self._places += [(number, sample["key"], sample["files"]) for sample in index["samples"]]
        self.digest: str = entry["digest"]
        if splits_digest(indexes) != self.digest or len(self._places) != entry["samples"]:
            raise ValueError(f"{self.root}, split '{split}': indexes and manifest do not belong together; {_AGAIN}")
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def key(self, i: int) -> str:
        """The key of sample i, from the index alone."""
        return self._places[i][1]

    def __getitem__(self, i: int) -> Sample:
        shard, key, files = self._places[i]
        try:
            return self._read(shard, key, files)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._shards[shard].name}, sample {key}: {error}") from None

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _read(self, shard: int, key: str, files: dict[str, list[int]]) -> Sample:
        image_format = next((name for name in IMAGE_FORMATS if name in files), None)
        if image_format is None or "json" not in files:
            raise ValueError(f"the index names no picture or no json (it has {', '.join(files)})")
        clip = self._bytes(shard, files["clip.npy"]) if "clip.npy" in files else None
        sample = Sample.from_json(
            self._bytes(shard, files["json"]),
            image=self._bytes(shard, files[image_format]),
            image_format=image_format,
            clip=None if clip is None else np.load(io.BytesIO(clip), allow_pickle=False),
        )
        if sample.key != key:
            raise ValueError(f"the shard holds {sample.key} where the index says {key}; {_AGAIN}")
        return sample

    def _bytes(self, shard: int, where: list[int]) -> bytes:
        offset, size = where
        if shard not in self._files:
            self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            raise ValueError(f"the shard is cut: {size} bytes wanted at {offset}, {len(data)} there; copy it again")
        return data


def read_index(shard: Path) -> dict[str, Any]:
    """The checked index of a shard."""
    path = shard.with_name(index_name(shard.name))
    return check_index(read_json(path, _AGAIN), path)


def _check_size(shard: Path, size: int) -> None:
    if not shard.exists():
        raise ValueError(f"{shard} is missing: copy it from where the data set was packed, or pack it again")
    found = shard.stat().st_size
    if found != size:
        raise ValueError(f"{shard} is cut or changed: {size} bytes in the manifest, {found} on disk; copy it again")


def verify(root: str | Path, split: str) -> Iterator[str]:
    """Read a whole split again: hashes, every sample, every picture decoded. Yields each key that is good.

    ValueError at the first thing that is not.
    """
    root = Path(root)
    entry = split_entry(read_manifest(root), root, split)
    for shard in entry["shards"]:
        path = root / Path(shard["name"]).name
        _check_size(path, shard["bytes"])
        if file_sha256(path) != shard["sha256"]:
            raise ValueError(f"{path}: its sha256 is not the one in the manifest; copy it again, or {_AGAIN}")
    for sample in ShardDataset(root, split):
        try:
            load(sample.image)
        except ValueError as error:
            raise ValueError(f"split '{split}', sample {sample.key}: {error}") from None
        yield sample.key
