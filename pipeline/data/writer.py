"""Packs a source into shards: webdataset tars with deterministic bytes, an index beside each, the manifest last.

The rows of a split are sorted by key and cut into shards of equal number before anything is read. So a shard depends on
its own rows only: any number of processes may make them in any order, and after a kill the unfinished ones are made.
"""

import fcntl
import hashlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from pipeline.data import manifest
from pipeline.data.images import shrink
from pipeline.data.parallel import Count, run_jobs
from pipeline.data.schema import KEY, SCHEMA_VERSION, Rejected, Sample

# webdataset reads this when it is imported; without it, its decoders would unpickle members of foreign tars.
os.environ.setdefault("WDS_SECURE", "1")
import webdataset


class Rows(Protocol):
    """What a packing process needs of a source; must be picklable."""

    def load(self, split: str, i: int) -> Sample | Rejected: ...


class Source(Rows, Protocol):
    """What pack() needs of a source. `portion(split, indices) -> Rows` may be there besides, to send less around."""

    def fingerprint(self) -> dict[str, Any]: ...
    def splits(self) -> list[str]: ...
    def keys(self, split: str) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What pack() found or made. `remade` counts the shards written now; 0 means that all was there already."""

    split: str
    samples: int
    shards: int
    remade: int
    bytes: int
    rejected: dict[str, int]


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
    force: bool = False,
    progress: bool = True,
) -> Packed:
    """Pack one split of `source` into `out_dir`; already finished shards of the same source are kept.

    resize: bring the pictures' shorter side down to so many pixels (masks stay at full resolution); None leaves the
    files' bytes as they are. force: make everything again. ValueError if `out_dir` holds this split of another source.
    """
    out = Path(out_dir)
    _check_arguments(source, split, workers, samples_per_shard, resize)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from None
    made_from = {
        "source": source.fingerprint(),
        "split": split,
        "samples_per_shard": samples_per_shard,
        "resize": resize or 0,
        "schema_version": SCHEMA_VERSION,
    }
    job_id = manifest.digest_of(made_from)
    with _only_writer(out):
        entry = _finished(out, split)
        if entry and not force:
            if entry["job"] == job_id and _all_there(out, entry):
                return _summary(split, entry, remade=0)
            if entry["job"] != job_id:
                raise ValueError(
                    f"{out} already holds the split '{split}', packed from another source or with other settings: "
                    "use --force to pack it again, or --out with another folder"
                )
        jobs = _plan(source, split, out, job_id, samples_per_shard, resize or 0)
        if force:
            for job in jobs:
                _index_path(job.path).unlink(missing_ok=True)
        open_jobs = [job for job in jobs if not _is_done(job)]
        kept = sum(len(job.places) for job in jobs) - sum(len(job.places) for job in open_jobs)
        try:
            _run(open_jobs, source, workers, kept, split, progress)
            _drop_strays(out, split, [job.path for job in jobs])
            return replace(_conclude(out, split, jobs, job_id, made_from), remade=len(open_jobs))
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


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Two packings into one folder would overwrite each other's parts. The lock goes with the process, also by kill."""
    with (out / ".packing.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is packing into {out}: wait for it, or choose another --out") from None
        yield


def _finished(out: Path, split: str) -> dict[str, Any] | None:
    if not (out / manifest.MANIFEST).exists():
        return None
    return manifest.read_manifest(out)["splits"].get(split)


def _all_there(out: Path, entry: dict[str, Any]) -> bool:
    paths = [(out / shard["name"], shard["bytes"]) for shard in entry["shards"]]
    return all(p.is_file() and p.stat().st_size == size and _index_path(p).is_file() for p, size in paths)


def _summary(split: str, entry: dict[str, Any], remade: int) -> Packed:
    return Packed(
        split=split,
        samples=entry["samples"],
        shards=len(entry["shards"]),
        remade=remade,
        bytes=sum(shard["bytes"] for shard in entry["shards"]),
        rejected=entry["rejected"],
    )


def _index_path(shard: Path) -> Path:
    return shard.with_name(manifest.index_name(shard.name))


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


def _is_done(job: _Job) -> bool:
    """A shard's index is written after the shard, so an index of this job beside a shard of its size means whole."""
    path = _index_path(job.path)
    if not path.is_file() or not job.path.is_file():
        return False
    try:
        index = manifest.check_index(manifest.read_json(path, ""), path)
    except ValueError:
        return False
    return index["job"] == job.fingerprint and index["bytes"] == job.path.stat().st_size


def _run(jobs: Sequence[_Job], source: Source, workers: int, kept: int, split: str, progress: bool) -> None:
    total = kept + sum(len(job.places) for job in jobs)
    with tqdm(total=total, initial=kept, desc=f"packing {split}", unit=" samples", disable=not progress) as bar:
        if workers == 1 or len(jobs) <= 1:
            for job in jobs:
                _write_shard(job, bar.update)
        else:
            # Portions are cut as they are needed: all of them at once would be the whole pickle again.
            portions = (_portioned(job, source) for job in jobs)
            run_jobs(_write_shard, portions, workers=min(workers, len(jobs)), bar=bar)


def _portioned(job: _Job, source: Source) -> _Job:
    portion = getattr(source, "portion", None)
    return replace(job, rows=portion(job.split, job.places)) if portion else job


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
    """Write one shard and then its index, each first under another name."""
    part = job.path.with_name(f".{job.path.name}.part")
    left_out: list[dict[str, str]] = []
    _index_path(job.path).unlink(missing_ok=True)
    with part.open("wb") as file:
        hashing = _HashingFile(file)
        with webdataset.TarWriter(hashing, user="", group="", mode=0o644, mtime=0.0, encoder=False) as tar:
            for place in job.places:
                sample = job.rows.load(job.split, place)
                if isinstance(sample, Sample):
                    tar.write(_members(sample, job.resize))
                else:
                    left_out.append({"key": sample.key, "reason": sample.reason, "detail": sample.detail})
                count(1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, job.path)
    index = {
        "shard": job.path.name,
        "bytes": job.path.stat().st_size,
        "sha256": hashing.sha256.hexdigest(),
        "job": job.fingerprint,
        "samples": _offsets(job.path),
        "left_out": left_out,
    }
    manifest.write_atomic(_index_path(job.path), manifest.canonical(index) + b"\n")


def _members(sample: Sample, resize: int) -> dict[str, Any]:
    image, image_format = shrink(sample.image, resize) if resize else (sample.image, sample.image_format)
    members: dict[str, Any] = {"__key__": sample.key, image_format: image, "json": sample.to_json()}
    if sample.clip is not None:
        out = io.BytesIO()
        np.save(out, sample.clip, allow_pickle=False)
        members["clip.npy"] = out.getvalue()
    return members


def _offsets(shard: Path) -> list[dict[str, Any]]:
    """[{"key", "files": {extension: [offset, bytes]}}] of a shard just written, read from its own headers."""
    samples: dict[str, dict[str, list[int]]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            samples.setdefault(key, {})[extension] = [member.offset_data, member.size]
    return [{"key": key, "files": files} for key, files in samples.items()]


def _drop_strays(out: Path, split: str, shards: Sequence[Path]) -> None:
    """Remove this split's shards from a packing with more of them, which readers that go by `*.tar` would take in."""
    wanted = {path.name for path in shards} | {_index_path(path).name for path in shards}
    ours = re.compile(re.escape(split) + r"-[0-9]{6}\.(tar|index\.json)")
    for path in out.iterdir():
        stray = ours.fullmatch(path.name) and path.name not in wanted
        leftover = path.name.startswith(f".{split}-") and path.name.endswith(".part")
        if stray or leftover:
            path.unlink()


def _conclude(out: Path, split: str, jobs: Sequence[_Job], job_id: str, made_from: dict[str, Any]) -> Packed:
    """Write report and manifest from the shards' indexes."""
    indexes = [manifest.read_json(_index_path(job.path), "pack again") for job in jobs]
    left_out = [record for index in indexes for record in index["left_out"]]
    entry = {
        "samples": sum(len(index["samples"]) for index in indexes),
        "shards": [
            {"name": i["shard"], "samples": len(i["samples"]), "bytes": i["bytes"], "sha256": i["sha256"]}
            for i in indexes
        ],
        "digest": manifest.splits_digest(indexes),
        "job": job_id,
        "made_from": made_from,
        "rejected": dict(sorted(Counter(record["reason"] for record in left_out).items())),
    }
    manifest.put_report(out, split, left_out)
    manifest.put_split(out, split, entry)
    return _summary(split, entry, remade=0)
