"""Packs a source into shards: webdataset tars with deterministic bytes, an index beside each, the manifest last.

The rows of a split are sorted by key and cut into shards of equal number before anything is read. So a shard depends on
its own rows only: any number of processes may make them in any order, and after a kill the unfinished ones are made.
"""

import hashlib
import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from pipeline.data import manifest
from pipeline.data.images import shrink
from pipeline.data.joining import WHOLE, Part, finished_index, index_path, join, only_writer
from pipeline.data.parallel import Count, run_jobs
from pipeline.data.schema import KEY, SCHEMA_VERSION, Partly, Rejected, Sample

# webdataset reads this when it is imported; without it, its decoders would unpickle members of foreign tars.
os.environ.setdefault("WDS_SECURE", "1")
import webdataset


class Rows(Protocol):
    """What a packing process needs of a source; must be picklable."""

    def load(self, split: str, i: int) -> Sample | Partly | Rejected: ...


class Source(Rows, Protocol):
    """What pack() needs of a source. `portion(split, indices) -> Rows` may be there besides, to send less around."""

    def fingerprint(self) -> dict[str, Any]: ...
    def splits(self) -> list[str]: ...
    def keys(self, split: str) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What pack() found or made. `remade` counts the shards written now; 0 means that all was there already. `waiting`
    counts the shards that other parts have yet to make; until it is 0 the split is not in the manifest."""

    split: str
    samples: int
    shards: int
    remade: int
    bytes: int
    rejected: dict[str, int]
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    rows: Rows
    split: str
    places: tuple[int, ...]
    path: Path
    fingerprint: str
    resize: int


def pack(
    source: Source,
    split: str,
    out_dir: str | Path,
    *,
    workers: int = 1,
    samples_per_shard: int = 1000,
    resize: int | None = None,
    part: Part = WHOLE,
    force: bool = False,
    progress: bool = True,
    wait: bool = False,
) -> Packed:
    """Pack one split of `source` into `out_dir`; already finished shards of the same source are kept.

    resize: bring the pictures' shorter side down to so many pixels (masks stay at full resolution); None leaves the
    files' bytes as they are. part: (i, n), make every n-th shard from the i-th on; whichever part comes last joins all
    of them. force: make everything (of this part) again. wait: queue behind another packer of this folder instead of
    refusing, for ranks that start together. ValueError if `out_dir` holds this split of another source.
    """
    _check_arguments(source, split, workers, samples_per_shard, resize)
    out = manifest.new_folder(Path(out_dir))
    made_from = {
        "source": source.fingerprint(),
        "split": split,
        "samples_per_shard": samples_per_shard,
        "resize": resize or 0,
        "schema_version": SCHEMA_VERSION,
    }
    job_id = manifest.digest_of(made_from)
    with only_writer(out, part, wait=wait):
        entry = _finished(out, split)
        if entry and not force:
            if entry["job"] == job_id and _all_there(out, entry, job_id):
                return _summary(split, entry, remade=0)
            if entry["job"] != job_id:
                raise ValueError(
                    f"{out} already holds the split '{split}', packed from another source or with other settings: "
                    "use --force to pack it again, or --out with another folder"
                )
        jobs = _plan(source, split, out, job_id, samples_per_shard, resize or 0)
        mine = jobs[part[0] - 1 :: part[1]]
        try:
            if force:
                manifest.drop_split(out, split)
                for job in mine:
                    index_path(job.path).unlink(missing_ok=True)
            open_jobs = [job for job in mine if not finished_index(job.path, job_id)]
            _run(open_jobs, source, workers, _rows(mine) - _rows(open_jobs), split, progress)
            waiting = [job for job in jobs if job not in mine and not finished_index(job.path, job_id)]
            if waiting:
                return _own_share(split, mine, len(open_jobs), len(waiting))
            entry = join(out, split, [job.path for job in jobs], job_id, made_from)
            return _summary(split, entry, remade=len(open_jobs))
        except OSError as error:
            raise ValueError(
                f"packing into {out} stopped: {error}. Finished shards are kept; the same command goes on from them"
            ) from None


def _check_arguments(source: Source, split: str, workers: int, samples_per_shard: int, resize: int | None) -> None:
    if split not in source.splits():
        raise ValueError(f"the source has no split '{split}'; it has: {', '.join(source.splits())}")
    if not manifest.SPLIT_NAME.fullmatch(split):
        raise ValueError(f"a split's name must be letters and digits, found {split!r}")
    if workers < 1 or samples_per_shard < 1:
        raise ValueError("--workers and --samples_per_shard must be at least 1")
    if resize is not None and resize < 16:
        raise ValueError(f"--resize is the shorter side in pixels, at least 16; found {resize}")


def _finished(out: Path, split: str) -> dict[str, Any] | None:
    if not (out / manifest.MANIFEST).exists():
        return None
    entry = manifest.read_manifest(out)["splits"].get(split)
    if entry is None:
        return None
    return {"job": None, **manifest.split_entry({"splits": {split: entry}}, out, split)}


def _all_there(out: Path, entry: dict[str, Any], job_id: str) -> bool:
    return all(finished_index(out / shard["name"], job_id) for shard in entry["shards"])


def _rows(jobs: Sequence[_Job]) -> int:
    return sum(len(job.places) for job in jobs)


def _own_share(split: str, jobs: Sequence[_Job], remade: int, waiting: int) -> Packed:
    """What one part did, while others are still at work."""
    indexes = [index for job in jobs if (index := finished_index(job.path, job.fingerprint))]
    left_out = Counter(record["reason"] for index in indexes for record in index["left_out"])
    return Packed(
        split=split,
        samples=sum(len(index["samples"]) for index in indexes),
        shards=len(indexes),
        remade=remade,
        bytes=sum(index["bytes"] for index in indexes),
        rejected=dict(sorted(left_out.items())),
        waiting=waiting,
    )


def _summary(split: str, entry: dict[str, Any], remade: int) -> Packed:
    return Packed(
        split=split,
        samples=entry["samples"],
        shards=len(entry["shards"]),
        remade=remade,
        bytes=sum(shard["bytes"] for shard in entry["shards"]),
        rejected=entry["rejected"],
    )


def _plan(source: Source, split: str, out: Path, job_id: str, per_shard: int, resize: int) -> list[_Job]:
    keys = source.keys(split)
    for key in keys:
        if not KEY.fullmatch(key):
            raise ValueError(f"the source gave the key {key!r}: keys are 1 to 90 letters, digits, _ or -")
    if len(set(keys)) != len(keys):
        raise ValueError(f"the source gave the key {Counter(keys).most_common(1)[0][0]!r} more than once")
    order = sorted(range(len(keys)), key=keys.__getitem__)
    chunks = [tuple(order[i : i + per_shard]) for i in range(0, len(order), per_shard)]
    return [
        _Job(source, split, places, out / manifest.shard_name(split, number), job_id, resize)
        for number, places in enumerate(chunks)
    ]


def _run(jobs: Sequence[_Job], source: Source, workers: int, kept: int, split: str, progress: bool) -> None:
    total = kept + _rows(jobs)
    with tqdm(total=total, initial=kept, desc=f"packing {split}", unit=" samples", disable=not progress) as bar:
        if workers == 1 or len(jobs) <= 1:
            for job in jobs:
                _write_shard(job, bar.update)
        else:
            # Portions are cut as they are needed: all of them at once would be the whole pickle again.
            portions = (replace(job, rows=portion_of(source, split, job.places)) for job in jobs)
            run_jobs(_write_shard, portions, workers=min(workers, len(jobs)), bar=bar)


def portion_of(source: Source, split: str, places: Sequence[int]) -> Rows:
    """What a process needs of `source` to load these rows."""
    portion = getattr(source, "portion", None)
    return portion(split, places) if portion else source


class _HashingFile(io.RawIOBase):
    """A file that keeps the sha256 of what went through it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def _write_shard(job: _Job, count: Count) -> None:
    """Write one shard and then its index, each first under another name.

    An older index may lie there meanwhile: either of another job, then it does not count, or of this one, then the
    shard that appears beside it has the same bytes. So a killed packer's last breath cannot harm the next one.
    """
    part = manifest.part_name(job.path)
    try:
        sha256, left_out = _write_tar(job, part, count)
        samples, size = _offsets(part), part.stat().st_size
        os.replace(part, job.path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    index = {
        "shard": job.path.name,
        "bytes": size,
        "sha256": sha256,
        "job": job.fingerprint,
        "samples": samples,
        "left_out": left_out,
    }
    manifest.write_atomic(index_path(job.path), manifest.canonical(index) + b"\n")


def _write_tar(job: _Job, path: Path, count: Count) -> tuple[str, list[dict[str, str]]]:
    """(sha256 of the tar, what was left out of it)."""
    left_out: list[dict[str, str]] = []
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        # A whole number: for a float tarfile would put an extended header before every member.
        with webdataset.TarWriter(hashing, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for place in job.places:
                sample, gone = split_up(job.rows.load(job.split, place))
                left_out += [{"key": each.key, "reason": each.reason, "detail": each.detail} for each in gone]
                if sample:
                    tar.write(_members(sample, job.resize))
                count(1)
        file.flush()
        os.fsync(file.fileno())
    return hashing.sha256.hexdigest(), left_out


def split_up(found: Sample | Partly | Rejected) -> tuple[Sample | None, tuple[Rejected, ...]]:
    """What a source gave: the sample, if there is one, and all that was left out."""
    if isinstance(found, Partly):
        return found.sample, found.left_out
    return (None, (found,)) if isinstance(found, Rejected) else (found, ())


def _members(sample: Sample, resize: int) -> dict[str, Any]:
    image, image_format = shrink(sample.image, resize) if resize else (sample.image, sample.image_format)
    members: dict[str, Any] = {"__key__": sample.key, image_format: image, "json": sample.to_json()}
    if sample.clip is not None:
        out = io.BytesIO()
        np.save(out, sample.clip, allow_pickle=False)
        members["clip.npy"] = out.getvalue()
    return members


def _offsets(shard: Path) -> list[dict[str, Any]]:
    """[{"key", "files": {extension: [offset, bytes, crc32]}}] of a shard just written, read from the shard itself."""
    samples: dict[str, dict[str, list[int]]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            content = tar.extractfile(member)
            assert content is not None
            crc = zlib.crc32(content.read())
            samples.setdefault(key, {})[extension] = [member.offset_data, member.size, crc]
    return [{"key": key, "files": files} for key, files in samples.items()]
