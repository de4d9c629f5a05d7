"""Whether a shard is the plain tar that its index describes: for `--verify`, since other readers go by the tar itself.

Training reads at the index's offsets and never parses a tar. Plain webdataset does, and so does whoever unpacks one. So
every header must be an ordinary file's, stand where the index says, and be followed by nothing but zeros at the end.
Python's tarfile is not asked: it loops forever over some forged sizes (CVE-2025-8194), and ends silently at others.
"""

from itertools import pairwise
from typing import Any

from pipeline.data.storage import Storage

_BLOCK = 512
_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"L": "a long name",
    b"K": "a long link",
    b"S": "a sparse file",
    b"x": "an extended header",
    b"g": "an extended header",
}
_MOST_PADDING = 64 * 1024


def check_members(storage: Storage, shard: str, index: dict[str, Any]) -> None:
    """ValueError, naming shard and member, unless the tar holds the index's files, in place, and nothing else."""
    expected = sorted(
        (offset, f"{sample['key']}.{extension}", size)
        for sample in index["samples"]
        for extension, (offset, size, *_) in sample["files"].items()
    )
    where, position = storage.where(shard), 0
    keys = [name.split(".", 1)[0] for _, name, _ in expected]
    if sum(a != b for a, b in pairwise(keys)) != len(set(keys)) - bool(keys):
        raise ValueError(f"{where}: the files of one sample do not lie together; pack the data set again with --force")
    for offset, name, size in expected:
        if offset == position + 3 * _BLOCK:
            _check_mtime(storage.read_at(shard, position, 2 * _BLOCK), where, name)
            position += 2 * _BLOCK
        if offset != position + _BLOCK:
            raise ValueError(f"{where}: the index has {name} at byte {offset}, where the tar cannot have it")
        _check_header(storage.read_at(shard, position, _BLOCK), where, name, size)
        position = offset + -(-size // _BLOCK) * _BLOCK
    rest = index["bytes"] - position
    if not 2 * _BLOCK <= rest <= _MOST_PADDING or storage.read_at(shard, position, rest).strip(b"\0"):
        raise ValueError(
            f"{where}: there is more in the tar than its index names; pack the data set again with --force"
        )


def _check_mtime(blocks: bytes, where: str, name: str) -> None:
    """Early packings wrote the time of each member into an extended header; nothing else may stand in one."""
    if blocks[156:157] != b"x" or blocks[_BLOCK:].rstrip(b"\0") not in (b"13 mtime=0.0\n", b"11 mtime=0\n"):
        raise ValueError(f"{where}: something other than a plain file lies before {name} in the tar; do not unpack it")


def _check_header(header: bytes, where: str, name: str, size: int) -> None:
    try:
        found = header[:100].rstrip(b"\0").decode("ascii")
        stored, checksum = (int(header[a:b].strip(b" \0"), 8) for a, b in ((124, 136), (148, 156)))
    except ValueError:
        raise ValueError(f"{where}: the tar has no readable header for {name}; copy it again") from None
    kind = header[156:157]
    if kind not in (b"0", b"\0"):
        what = _TYPES.get(kind, "something unknown")
        raise ValueError(f"{where}: the tar has {what} where the index has the file {name}; do not unpack it")
    if header[257:262] != b"ustar" or header[345:500].strip(b"\0") or header[157:257].strip(b"\0"):
        raise ValueError(f"{where}: the header of {name} is of another kind of tar; pack the data set again")
    if found != name:
        raise ValueError(f"{where}: the tar names a file {found!r:.80} where the index has {name}; do not unpack it")
    if stored != size:
        raise ValueError(f"{where}: the tar says {stored} bytes of {name}, the index {size}; copy it again")
    if checksum != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise ValueError(f"{where}: the header of {name} is damaged; copy it again")
