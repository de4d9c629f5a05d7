"""The hostile corpus: files made to break, fill or run the readers. Each ends in one message, soon, in little memory.

Here: pickles, annotation rows, pictures, tars. JSON and shards that change are in test_hostile_json.py, more pickles in
test_unpickle.py, a full disk and kills in test_packing.py.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.data import manifest
from pipeline.data.mmud import MmudSource
from pipeline.data.mmud_rows import to_sample
from pipeline.data.reader import verify
from pipeline.data.schema import Rejected, Sample
from pipeline.data.unpickle import load_pickle

pytestmark = pytest.mark.timeout(60)
KEY = "000000006818"
_MEGABYTES = 700


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < _MEGABYTES


@pytest.fixture
def row(data_dir: Path) -> list[Any]:
    return list(pickle.loads((data_dir / "mmud" / "train.pkl").read_bytes())[0])


@pytest.fixture
def picture(data_dir: Path) -> bytes:
    return (data_dir / "mmud" / "images" / f"{KEY}.jpg").read_bytes()


def laughs(depth: int, seed: Any = "ha", width: int = 10) -> Any:
    """width^depth times `seed`, in a structure of depth * width references."""
    for _ in range(depth):
        seed = [seed] * width
    return seed


def deep(depth: int) -> bytes:
    return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."


def global_call(module: bytes, name: bytes, argument: bytes = b"X\x02\x00\x00\x00id") -> bytes:
    return b"\x80\x02c" + module + b"\n" + name + b"\n(" + argument + b"tR."


def stack_global(module: str, name: str) -> bytes:
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93(\x8c\x02idtR."


def copies(opcode: bytes) -> bytes:
    """A call that copies its argument, of a megabyte, a hundred thousand times."""
    text = b"\x80\x02X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x00]q\x01"
    return text + (b"h\x01" + opcode + b"a0") * 100_000 + b"h\x01."


PICKLES: dict[str, bytes] = {
    "runs a command": global_call(b"posix", b"system"),
    "evaluates": global_call(b"builtins", b"eval"),
    "executes, by its Python 2 name": global_call(b"__builtin__", b"execfile"),
    "imports": stack_global("importlib", "import_module"),
    "opens a process": stack_global("subprocess", "Popen"),
    "reaches through dots": stack_global("numpy", "core.multiarray.os.system"),
    "gets an attribute": stack_global("operator", "attrgetter"),
    "loads code": stack_global("marshal", "loads"),
    "unpickles inside": stack_global("pickle", "loads"),
    "torch's loader": stack_global("torch.storage", "_load_from_bytes"),
    "numpy's loader": stack_global("numpy", "load"),
    "a partial": stack_global("functools", "partial"),
    "a class by its registry": stack_global("copyreg", "_reconstructor"),
    "an allowed name in a wrong module": stack_global("os", "set"),
    "copies one text without end": copies(b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"),
    "an array of two gigabytes out of nothing": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\x00\x00\x00\x7ftU\x01btR."
    ),
    "a number of a hundred thousand digits": b"L" + b"9" * 100_000 + b"L\n.",
    "a text longer than the file": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "a memo beyond reason": b"\x80\x04]r\xff\xff\xff\x7f.",
    "marks without end": b"\x80\x04" + b"(" * 200_000 + b".",
    "empty": b"",
    "text": b"<html>404</html>",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path, name):
    path = tmp_path / "train.pkl"
    path.write_bytes(PICKLES[name])
    with pytest.raises(ValueError, match=r"train\.pkl (was refused|is no readable pickle|asks for more memory)"):
        load_pickle(path)


def test_a_deep_pickle_and_a_laughing_one_are_plain_data_to_the_unpickler_and_no_rows(tmp_path, picture):
    """They can be held in memory; what may not happen is that a message or a check walks all of them."""
    for data in (deep(200_000), pickle.dumps(laughs(25))):
        (tmp_path / "train.pkl").write_bytes(b"\x80\x04](" + data[2:-1] + b"e.")
        (tmp_path / f"{KEY}.jpg").write_bytes(picture)
        source = MmudSource(tmp_path, tmp_path)
        results = list(source.iterate("train"))
        assert [result.reason for result in results] == ["row malformed"]


ROWS: dict[str, tuple[int, Any, str]] = {
    "a caption that laughs": (1, laughs(20), "row malformed"),
    "phrases that laugh": (3, [laughs(20)], "row malformed"),
    "one long phrase a thousand times": (3, [["long " * 3000] * 1000], "row malformed"),
    "a polygon that laughs": (4, [laughs(9, 1.0)], "mask unreadable"),
    "a polygon of polygons that laugh": (4, [[laughs(8, 1.0)] * 100_000], "mask unreadable"),
    "one polygon a hundred thousand times": (4, [[[1.0, 2.0] * 50_000] * 100_000], "mask unreadable"),
    "one RLE a hundred thousand times": (
        4,
        [[{"size": [640, 427], "counts": "0" * 10_000}] * 100_000],
        "mask unreadable",
    ),
    "a mask of a trillion pixels": (4, [[{"size": [10**6, 10**6], "counts": [10**12]}]], "mask unreadable"),
    "a mask of a huge number": (4, [[{"size": [10**400, 1], "counts": "0"}]], "mask unreadable"),
    "NaN corners": (4, [[float("nan")] * 8], "mask unreadable"),
    "infinite corners": (4, [[float("inf"), 0, 1, 1, 2, 2]], "mask unreadable"),
    "corners that no float holds": (4, [[10**400, 0, 1, 1, 2, 2]], "mask unreadable"),
    "texts for corners": (4, [["1", "2", "3", "4", "5", "6"]], "mask unreadable"),
    "a million objects": (3, [["a"]] * 10**6, "row malformed"),
    "a dialogue to make a regex sweat": (2, "##Question" * 1900, "question unreadable"),
    "tags beyond counting": (2, "##Question: a ##Answer <LCL-999999>", "tag without object"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(row, picture, name):
    place, value, reason = ROWS[name]
    row[place] = value
    found = to_sample(tuple(row), key="k", image=picture, clip=None)
    assert isinstance(found, Rejected)
    assert found.reason == reason, found
    assert len(found.detail) < 400


@pytest.mark.parametrize("box", [[float("nan")] * 4, [float("inf"), 0, 1, 1], [10**400] * 4, laughs(15), "box", None])
def test_a_box_that_is_none_gives_way_to_the_masks_own(row, picture, box):
    expected = to_sample(tuple(row), key="k", image=picture, clip=None)
    row[5] = [box] * len(row[5])
    found = to_sample(tuple(row), key="k", image=picture, clip=None)
    assert isinstance(found, Sample) and isinstance(expected, Sample)
    assert all(np.isfinite(each.box).all() for each in found.objects)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def saved(kind: str, **more: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, kind, **more)
    return out.getvalue()


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 10**8, zip=True)
    return saved("PNG", pnginfo=info)


def claimed_jpeg() -> bytes:
    """A small JPEG whose header claims 60000 x 60000."""
    data = bytearray(saved("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


PICTURES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"<html>404</html>",
    "cut in its header": lambda good: good[:100],
    "cut in its middle": lambda good: good[: len(good) // 2],
    "a bomb of 100 megapixels": lambda _: png(10_000, 10_000, (b"IDAT", zlib.compress(b"\0" * 10**7))),
    "a bomb of four billion pixels": lambda _: png(2**31 - 1, 2**31 - 1, (b"IDAT", b"")),
    "a JPEG that claims 3600 megapixels": lambda _: claimed_jpeg(),
    "a text that unfolds to 100 MB": lambda _: text_bomb(),
    "no pixels": lambda _: png(8, 8),
    "a broken checksum": lambda _: png(8, 8, (b"IDAT", b"not zlib")),
    "a GIF": lambda _: saved("GIF"),
    "a TIFF": lambda _: saved("TIFF"),
    "a BMP": lambda _: saved("BMP"),
    "an EPS that would start a program": lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(row, picture, name):
    found = to_sample(tuple(row), key="k", image=PICTURES[name](picture), clip=None)
    assert isinstance(found, Rejected)
    assert found.reason == "picture unreadable"
    assert len(found.detail) < 200


Members = list[tuple[tarfile.TarInfo, bytes]]


def forge(root: Path, change: Callable[[Members], Members]) -> None:
    """Rewrite a shard's tar, and then index and manifest so that all hashes are right: the forger has all the files."""
    path = root / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    payload = {member.name: data for member, data in members}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in change(members):
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    write_index(root, payload)


def write_index(root: Path, payload: dict[str, bytes]) -> None:
    """An index and a manifest to the tar as it is, its members found by their content."""
    path = root / "train-000000.tar"
    raw = path.read_bytes()
    index = json.loads((root / "train-000000.index.json").read_text())
    for sample in index["samples"]:
        for extension in sample["files"]:
            data = payload[f"{sample['key']}.{extension}"]
            sample["files"][extension] = [max(raw.find(data), 0), len(data), zlib.crc32(data)]
    index |= {"bytes": len(raw), "sha256": manifest.file_sha256(path)}
    (root / "train-000000.index.json").write_bytes(manifest.canonical(index))
    whole = json.loads((root / "manifest.json").read_text())
    entry = whole["splits"]["train"]
    entry["shards"][0] |= {"bytes": len(raw), "sha256": index["sha256"]}
    entry["digest"] = manifest.splits_digest([index])
    (root / "manifest.json").write_text(json.dumps(whole))


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def renamed(name: str) -> Callable[[Members], Members]:
    return lambda members: [(info(name), members[0][1]), *members[1:]]


def added(member: tarfile.TarInfo, data: bytes = b"") -> Callable[[Members], Members]:
    return lambda members: [*members, (member, data)]


TARS: dict[str, tuple[Callable[[Members], Members], str]] = {
    "an absolute path": (renamed("/etc/cron.d/x"), "names a file '/etc/cron.d/x'"),
    "a path upwards": (renamed("../../x.jpg"), r"names a file '\.\./\.\./x\.jpg'"),
    "another name": (renamed("x.pkl"), r"names a file 'x\.pkl'"),
    "a member besides": (added(info("x.pkl"), pickle.dumps([1])), "more in the tar than its index names"),
    "a member twice": (lambda members: [*members, members[0]], "more in the tar than its index names"),
    "a symbolic link": (added(info("x.jpg", tarfile.SYMTYPE, "/etc/passwd")), "more in the tar"),
    "a link in front": (
        lambda members: [(info("x.jpg", tarfile.LNKTYPE, "/etc/passwd"), b""), *members],
        "where the tar cannot have it",
    ),
    "a device": (added(info("x.jpg", tarfile.CHRTYPE)), "more in the tar"),
    "a pipe": (added(info("x.jpg", tarfile.FIFOTYPE)), "more in the tar"),
    "a sample in two places": (
        lambda members: sorted(members, key=lambda each: each[0].name.split(".")[1]),
        "the files of one sample do not lie together",
    ),
    "a long name": (renamed("a" * 200 + ".jpg"), "other than a plain file|cannot have it"),
}


@pytest.mark.parametrize("name", TARS)
def test_tars(copy, name):
    change, message = TARS[name]
    forge(copy, change)
    with pytest.raises(ValueError, match=rf"train-000000\.tar: .*{message}"):
        list(verify(copy, "train"))


def header(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    """Change the first member's header in place, its checksum corrected."""

    def spoil(root: Path) -> None:
        path = root / "train-000000.tar"
        with tarfile.open(path) as tar:
            payload = {member.name: tar.extractfile(member).read() for member in tar}
        raw = bytearray(path.read_bytes())
        change(raw)
        total = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
        raw[148:156] = f"{total:06o}\0 ".encode()
        path.write_bytes(raw)
        write_index(root, payload)

    return spoil


def put(at: int, data: bytes) -> Callable[[bytearray], None]:
    return lambda raw: raw.__setitem__(slice(at, at + len(data)), data)


HEADERS: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "a size of eight gigabytes": (put(124, b"77777777777\0"), r"the tar says 8589934591 bytes"),
    "a size too small": (put(124, b"00000000001\0"), "the tar says 1 bytes"),
    "a size below zero, which hangs tarfile": (put(124, b"\xff" * 12), "no readable header"),
    "a size that is no number": (put(124, b"size of file"), "no readable header"),
    "the type of a link": (put(156, b"2"), "a symbolic link"),
    "the type of a folder": (put(156, b"5"), "a folder"),
    "the type of a sparse file": (put(156, b"S"), "a sparse file"),
    "an unknown type": (put(156, b"~"), "something unknown"),
    "a name in two parts": (put(345, b"../.."), "another kind of tar"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(copy, name):
    change, message = HEADERS[name]
    header(change)(copy)
    with pytest.raises(ValueError, match=rf"train-000000\.tar: .*{message}"):
        list(verify(copy, "train"))
