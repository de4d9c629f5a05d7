"""How packers of one folder get along: locks, what is finished, and the joining of all shards into the manifest.

Shards are independent files, so processes, array tasks on other machines and repeated runs may all work on one split.
What must hold is that nobody deletes or overwrites another's work with anything but the same bytes, and that the
manifest comes last. File locks help where the file system has them; nothing here relies on them between machines.
"""

import errno
import fcntl
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.data import manifest

Part = tuple[int, int]
"""(i, n): the i-th of n packers that share the work, i = 1..n."""
WHOLE: Part = (1, 1)
_PART = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_NO_LOCKS_HERE = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


def parse_part(text: str) -> Part:
    """(3, 8) of "3/8"; (1, 1) of "". ValueError for anything else."""
    if not text:
        return WHOLE
    found = _PART.fullmatch(text.strip())
    part = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"--part is i/n with i from 1 to n, as in --part $SLURM_ARRAY_TASK_ID/8; found {text!r}")
    return part


@contextmanager
def only_writer(out: Path, part: Part, *, wait: bool = False) -> Iterator[None]:
    """Keeps a second packer of the same part out. Parts share the folder; a whole packing has it alone.

    A lock goes with its process, also by kill. ValueError if another packer holds it, unless `wait` says to queue.
    """
    locks = [(".packing.lock", fcntl.LOCK_EX if part == WHOLE else fcntl.LOCK_SH)]
    if part != WHOLE:
        locks.append((f".packing-{part[0]}-of-{part[1]}.lock", fcntl.LOCK_EX))
    with ExitStack() as held:
        for name, kind in locks:
            lock = held.enter_context((out / name).open("w"))
            try:
                fcntl.flock(lock, kind if wait else kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS_HERE:
                    raise ValueError(
                        f"another process is packing into {out}: wait for it, or choose another --out"
                    ) from None
        yield


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(manifest.index_name(shard.name))


def finished_index(shard: Path, job_id: str) -> dict[str, Any] | None:
    """The index of a shard that this very job finished; None if there is none.

    An index is written after its shard, so an index of this job beside a shard of its size means whole.
    """
    path = index_path(shard)
    try:
        index = manifest.check_index(manifest.read_json(path, ""), path)
        same = index["job"] == job_id and index["bytes"] == shard.stat().st_size
    except (ValueError, OSError):
        return None
    return index if same else None


def join(out: Path, split: str, shards: Sequence[Path], job_id: str, made_from: dict[str, Any]) -> dict[str, Any]:
    """Write report and manifest of a split whose shards are all finished; the split's entry in the manifest.

    Any number of packers may do so at once: they write the same.
    """
    indexes = [finished_index(shard, job_id) for shard in shards]
    if missing := [shard.name for shard, index in zip(shards, indexes, strict=True) if index is None]:
        raise ValueError(
            f"{out / missing[0]} was changed while it was packed, by another packing with other settings: "
            "end that one, then give the same command again"
        )
    whole = [index for index in indexes if index is not None]
    left_out = [record for index in whole for record in index["left_out"]]
    entry = {
        "samples": sum(len(index["samples"]) for index in whole),
        "shards": [
            {"name": i["shard"], "samples": len(i["samples"]), "bytes": i["bytes"], "sha256": i["sha256"]}
            for i in whole
        ],
        "digest": manifest.splits_digest(whole),
        "job": job_id,
        "made_from": made_from,
        "rejected": dict(sorted(Counter(record["reason"] for record in left_out).items())),
    }
    _drop_strays(out, split, shards)
    manifest.put_split(out, split, entry, left_out)
    return entry


def _drop_strays(out: Path, split: str, shards: Sequence[Path]) -> None:
    """Remove this split's shards from a packing with more of them, which readers that go by `*.tar` would take in."""
    wanted = {path.name for path in shards} | {index_path(path).name for path in shards}
    ours = re.compile(re.escape(split) + r"-[0-9]{6}\.(tar|index\.json)")
    for path in out.iterdir():
        stray = ours.fullmatch(path.name) and path.name not in wanted
        leftover = path.name.startswith(f".{split}-") and path.name.endswith(".part")
        if stray or leftover:
            path.unlink(missing_ok=True)
