"""Fuzzing of the readers of pickles, tars and JSON with hypothesis: whatever the bytes, a value or a ValueError.

    FUZZ_MINUTES=10 .venv/bin/python -m pytest tests/test_fuzz.py

goes on with new examples for so long, shared among the tests; without it each gets a few dozen.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import manifest
from pipeline.data.brief import brief
from pipeline.data.coco_json import read_coco
from pipeline.data.mmud import MmudSource
from pipeline.data.mmud_rows import to_sample
from pipeline.data.reader import ShardDataset, read_index
from pipeline.data.refcoco import RefcocoSource
from pipeline.data.schema import Partly, Rejected, Sample
from pipeline.data.storage import LocalFolder
from pipeline.data.tar_check import check_members
from pipeline.data.unpickle import load_pickle
from pipeline.data.writer import pack

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
TESTS = 6
pytestmark = pytest.mark.timeout(60 * (MINUTES + 5))
DATA = Path(__file__).parent / "data"


def fuzz(test: Callable[[], None]) -> None:
    """Run a property once, or again with fresh examples until its share of the time is over."""
    end = time.monotonic() + 60 * MINUTES / TESTS
    wanted = settings(
        max_examples=400 if MINUTES else 60,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run = wanted(test)
    while True:
        run()
        if time.monotonic() >= end:
            return


def values() -> st.SearchStrategy[Any]:
    """JSON's values, and what only pickles can hold."""
    numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 2**31, 2**63, True])
    leaves = st.none() | numbers | st.text(max_size=20) | st.sampled_from(["\ud800", "../x", "\0", "<OBJ-1>", "0" * 99])
    return st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=3))


def pickled_values() -> st.SearchStrategy[Any]:
    odd = st.binary(max_size=9) | st.sampled_from(
        [np.zeros((2, 2)), np.float64("nan"), np.array(["a"]), (), {1}, b"\xff"]
    )
    return values() | odd


@st.composite
def mutated_bytes(draw: st.DrawFn, bases: list[bytes]) -> bytes:
    """One of `bases` with some bytes changed, cut out, doubled or put in."""
    data = bytearray(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.sampled_from([1, 1, 2, 4, 16, 512]))
        what = draw(st.sampled_from(["change", "cut", "double", "put", "end"]))
        if what == "change":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif what == "cut":
            del data[at : at + size]
        elif what == "double":
            data[at:at] = data[at : at + size]
        elif what == "put":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            del data[at:]
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every node of a JSON-like value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list | tuple) else ()
    return [path, *(way for key in list(keys)[:20] for way in places(value[key], (*path, key)))]


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[way[0]] = replaced(copy[way[0]], way[1:], new)
    return copy


@st.composite
def mutated(draw: st.DrawFn, base: Any, leaves: st.SearchStrategy[Any]) -> Any:
    """`base` with one to three of its nodes replaced."""
    for _ in range(draw(st.integers(1, 3))):
        base = replaced(base, draw(st.sampled_from(places(base))), draw(leaves))
    return base


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples with small pictures and embeddings, so that most bytes are of some meaning."""
    out = tmp_path_factory.mktemp("packed")
    clips = tmp_path_factory.mktemp("clips")
    for path in (DATA / "mmud" / "images").iterdir():
        (clips / f"{path.stem}.pkl").write_bytes(pickle.dumps([0.5] * 4))
    source = MmudSource(DATA / "mmud", DATA / "mmud" / "images", clips)
    pack(source, "valid", out, resize=32, progress=False)
    return out


def anything_or_value_error(call: Callable[[], Any]) -> Any:
    said = ""
    try:
        return call()
    except ValueError as error:
        said = str(error)
    assert said and len(said) < 1000
    return None


def opcodes() -> st.SearchStrategy[bytes]:
    """Pickles put together from opcodes that do something, with names that are allowed and others."""
    names = [b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"cbuiltins\nset\n", b"cos\nsystem\n"]
    names += [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\n__name__\n"]
    names += [b"cnumpy._core.numeric\n_frombuffer\n", b"c__builtin__\nbytearray\n", b"cbuiltins\nbytes\n"]
    plain = [b"(", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"t", b"R", b"b", b"0", b"2", b"1", b"l", b"d", b"N"]
    plain += [
        b"q\x00",
        b"h\x00",
        b"q\x01",
        b"h\x01",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x88",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x93",
        b"\x94",
    ]
    plain += [
        b"K\x05",
        b"C\x04abcd",
        b"X\x02\x00\x00\x00f4",
        b"X\x01\x00\x00\x00C",
        b"J\xff\xff\xff\x7f",
        b"G" + b"\x7f" * 8,
    ]
    whole = st.lists(st.sampled_from(plain + names * 2), max_size=40)
    return whole.map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")


PLAIN = (type(None), bool, int, float, str, bytes, bytearray, np.ndarray, np.generic, set, frozenset)


def assert_plain(value: Any, depth: int = 0) -> None:
    if isinstance(value, dict | list | tuple) and depth < 8:
        for each in [*value, *(value.values() if isinstance(value, dict) else ())][:20]:
            assert_plain(each, depth + 1)
    else:
        # A name that is allowed but was never called stands for nothing.
        assert isinstance(value, (*PLAIN, dict, list, tuple)) or type(value).__module__ == "pipeline.data.unpickle"


def test_pickles(tmp_path):
    bases = [path.read_bytes() for path in [*DATA.glob("mmud/*.pkl"), *DATA.glob("refcoco/*.p")]]
    bases = [data for data in bases if len(data) < 30_000] or [pickle.dumps([1])]
    small = [("a", ["b"], 1.5, {"c": b"d"}, {3}, np.arange(3.0), np.float32(2), frozenset([1]), bytearray(b"x"))]
    bases += [pickle.dumps(small, protocol=protocol) for protocol in range(6)]
    path = tmp_path / "train.pkl"

    @given(st.binary(max_size=60) | mutated_bytes(bases) | opcodes())
    def read(data: bytes) -> None:
        path.write_bytes(data)
        assert_plain(anything_or_value_error(lambda: load_pickle(path, encoding="latin1")))

    fuzz(read)


def test_rows_of_mmud():
    rows = [row for path in DATA.glob("mmud/*.pkl") for row in pickle.loads(path.read_bytes())][:3]
    picture = (DATA / "mmud" / "images" / "000000006818.jpg").read_bytes()

    @given(st.sampled_from(rows).flatmap(lambda row: mutated(list(row), pickled_values())))
    def make(row: Any) -> None:
        found = to_sample(row, key="k", image=picture, clip=None)
        assert isinstance(found, Sample | Rejected)
        if isinstance(found, Sample):
            assert Sample.from_json(found.to_json(), image=picture, image_format="jpg") == found
        else:
            assert len(found.detail) < 1000

    fuzz(make)


def test_refs_and_instances(tmp_path):
    root = Path(shutil.copytree(DATA / "refcoco", tmp_path / "refcoco"))
    refs = pickle.loads((root / "refs(kuo).p").read_bytes())
    instances = json.loads((root / "instances.json").read_text())
    for part in ("annotations", "categories"):
        instances[part] = [
            each for each in instances[part] if part == "categories" or each["id"] in [ref["ann_id"] for ref in refs]
        ]

    @given(mutated(refs, pickled_values()), mutated(instances, values()), st.booleans())
    def read(some_refs: Any, some_instances: Any, both: bool) -> None:
        (root / "refs(kuo).p").write_bytes(pickle.dumps(some_refs))
        (root / "instances.json").write_text(json.dumps(some_instances if both else instances))
        made = anything_or_value_error(lambda: RefcocoSource(root, root / "images"))
        for split in made.splits() if made else ():
            made.fingerprint()
            for i in range(len(made.keys(split))):
                found = made.load(split, i)
                assert isinstance(found, Sample | Partly | Rejected)
                if isinstance(found, Sample):
                    found.to_json()

    fuzz(read)


def test_json_texts(tmp_path):
    bases = [path.read_bytes() for path in DATA.glob("refcoco/*.json")]
    path = tmp_path / "instances.json"

    @given(mutated_bytes(bases) | st.binary(max_size=40))
    def read(data: bytes) -> None:
        path.write_bytes(data)
        anything_or_value_error(lambda: read_coco(path))

    fuzz(read)


def test_manifests_indexes_and_samples(packed):
    whole = {name: json.loads((packed / name).read_text()) for name in ("manifest.json", "valid-000000.index.json")}
    sample = ShardDataset(packed, "valid")[0]

    @given(
        mutated(whole["manifest.json"], values()),
        mutated(whole["valid-000000.index.json"], values()),
        mutated(json.loads(sample.to_json()), values()),
        st.integers(1, 3),
    )
    def read(some_manifest: Any, some_index: Any, some_sample: Any, which: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(shutil.copytree(packed, folder, dirs_exist_ok=True))
            if which & 1:
                (root / "manifest.json").write_text(json.dumps(some_manifest))
            if which & 2:
                (root / "valid-000000.index.json").write_text(json.dumps(some_index))
                # A forger makes the digest fit.
                index = anything_or_value_error(lambda: read_index(LocalFolder(root), "valid-000000.tar"))
                if index and which == 2:
                    content = whole["manifest.json"]
                    entry = {**content["splits"]["valid"], "digest": manifest.splits_digest([index])}
                    entry["samples"] = len(index["samples"])
                    (root / "manifest.json").write_text(json.dumps({**content, "splits": {"valid": entry}}))
            dataset = anything_or_value_error(lambda: ShardDataset(root, "valid"))
            for i in range(len(dataset) if dataset else 0):
                anything_or_value_error(lambda i=i: dataset[i])
        text = json.dumps(some_sample).encode()
        anything_or_value_error(lambda: Sample.from_json(text, image=sample.image, image_format="jpg"))
        brief(some_sample)

    fuzz(read)


def test_tars(packed):
    """The index's checksums are made to fit, so that it is the tar's own bytes that must be wrong."""
    good = (packed / "valid-000000.tar").read_bytes()
    index = json.loads((packed / "valid-000000.index.json").read_text())

    @given(mutated_bytes([good]))
    def read(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(shutil.copytree(packed, folder, dirs_exist_ok=True))
            (root / "valid-000000.tar").write_bytes(data)
            forged = json.loads(json.dumps(index)) | {"bytes": len(data), "sha256": "0" * 64}
            for each in forged["samples"]:
                for extension, (offset, size, _) in each["files"].items():
                    each["files"][extension][2] = zlib.crc32(data[offset : offset + size])
            (root / "valid-000000.index.json").write_text(json.dumps(forged))
            whole = json.loads((packed / "manifest.json").read_text())
            entry = whole["splits"]["valid"]
            entry["shards"][0]["bytes"], entry["digest"] = len(data), manifest.splits_digest([forged])
            (root / "manifest.json").write_text(json.dumps(whole))
            anything_or_value_error(lambda: check_members(LocalFolder(root), "valid-000000.tar", forged))
            dataset = anything_or_value_error(lambda: ShardDataset(root, "valid"))
            for i in range(len(dataset) if dataset else 0):
                anything_or_value_error(lambda i=i: dataset[i])

    fuzz(read)
