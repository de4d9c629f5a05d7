"""Packed samples by number: reads shards at the byte offsets of their indexes.

webdataset's own reader passes over a cut tar in silence, cannot resume, and gives ranks unequal counts; so it writes
the shards and any of its kind can read them, but training reads them here. No member is unpickled or extracted.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.images import load
from pipeline.data.manifest import (
    check_index,
    index_name,
    read_manifest,
    read_stored,
    split_entry,
    splits_digest,
)
from pipeline.data.schema import IMAGE_FORMATS, Sample
from pipeline.data.storage import Storage, open_storage
from pipeline.data.tar_check import check_members

_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': False, 'shape': \((?P<size>\d{1,6}),\), \} *\n", re.S
)
_AGAIN = "pack the data set again with --force"


class ShardDataset:
    """The samples of one split, `dataset[i]` -> Sample, i = 0 .. len-1 in the order of packing.

    `root` is a folder or a URL that fsspec knows. Opening checks the manifest, the indexes and the sizes of the shards;
    a sample is read whole and of the bytes that were packed, or ValueError names the shard and the key. Safe to hand to
    worker processes: files are opened where they are read.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.root = root
        self.split = split
        self._storage = open_storage(root)
        entry = split_entry(read_manifest(root), root, split)
        self._shards: list[str] = []
        self._places: list[tuple[int, str, dict[str, list[int]]]] = []
        self.shard_sizes: tuple[int, ...] = ()
        indexes = []
        for number, shard in enumerate(entry["shards"]):
            index = read_index(self._storage, shard["name"])
            _check_size(self._storage, shard["name"], shard["bytes"])
            indexes.append(index)
            self._shards.append(shard["name"])
            self._places += [(number, sample["key"], sample["files"]) for sample in index["samples"]]
        self.shard_sizes = tuple(len(index["samples"]) for index in indexes)
        self.digest: str = entry["digest"]
        if splits_digest(indexes) != self.digest or len(self._places) != entry["samples"]:
            raise ValueError(f"{self.root}, split '{split}': indexes and manifest do not belong together; {_AGAIN}")

    def __len__(self) -> int:
        return len(self._places)

    def key(self, i: int) -> str:
        """The key of sample i, from the index alone."""
        return self._places[i][1]

    def __getitem__(self, i: int) -> Sample:
        shard, key, files = self._places[i]
        try:
            return self._read(shard, key, files)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._shards[shard]}, sample {key}: {error}") from None

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
            clip=None if clip is None else _embedding(clip),
        )
        if sample.key != key:
            raise ValueError(f"the shard holds {sample.key} where the index says {key}; {_AGAIN}")
        return sample

    def _bytes(self, shard: int, where: list[int]) -> bytes:
        offset, size, *crc = where
        data = self._storage.read_at(self._shards[shard], offset, size)
        if len(data) != size:
            raise ValueError(f"the shard is cut: {size} bytes wanted at {offset}, {len(data)} there; copy it again")
        # Indexes made before schema version 1 was settled have no checksums.
        if crc and zlib.crc32(data) != crc[0]:
            raise ValueError(
                f"the shard was changed since it was packed, or the disk is failing: other bytes at {offset}; copy it "
                "again, and never write over shards that a run reads"
            )
        return data


def _embedding(data: bytes) -> np.ndarray:
    """The float16 vector in a .npy file, which must begin as the writer's do.

    numpy's own reader first makes room for whatever the file claims, and evaluates the header as Python.
    """
    head = _NPY.match(data)
    vector = np.frombuffer(data[head.end() :], "<f2") if head and not (len(data) - head.end()) % 2 else None
    if vector is None or not head or vector.size != int(head["size"]):
        raise ValueError(f"the CLIP embedding is no float16 vector; {_AGAIN}")
    return vector


def read_index(storage: Storage, shard: str) -> dict[str, Any]:
    """The checked index of a shard."""
    name = index_name(shard)
    return check_index(read_stored(storage, name, _AGAIN), storage.where(name))


def _check_size(storage: Storage, shard: str, size: int) -> None:
    path = storage.where(shard)
    try:
        found = storage.size(shard)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: copy it from where the data set was packed, or pack it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if found != size:
        raise ValueError(f"{path} is cut or changed: {size} bytes in the manifest, {found} there; copy it again")


def verify(root: str | Path, split: str) -> Iterator[str]:
    """Read a whole split again: hashes, the tars' headers, every sample, every picture decoded.

    Yields each key that is good; ValueError at the first thing that is not.
    """
    storage = open_storage(root)
    entry = split_entry(read_manifest(root), root, split)
    for shard in entry["shards"]:
        _check_size(storage, shard["name"], shard["bytes"])
        if storage.sha256(shard["name"]) != shard["sha256"]:
            path = storage.where(shard["name"])
            raise ValueError(f"{path}: its sha256 is not the one in the manifest; copy it again, or {_AGAIN}")
        check_members(storage, shard["name"], read_index(storage, shard["name"]))
    for sample in ShardDataset(root, split):
        try:
            load(sample.image)
        except ValueError as error:
            raise ValueError(f"split '{split}', sample {sample.key}: {error}") from None
        yield sample.key
