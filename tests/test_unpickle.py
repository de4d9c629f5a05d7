"""Pickles from strangers: plain data comes through, programs do not run. No process is started; about a second."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.unpickle import load_pickle


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def save(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    return path


PLAIN = [("a\\b", [1, 2.5, -7], {"size": [2, 3], "counts": b"12\xff"}, None, True, 2**70, (), {1, 2})]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_through_every_protocol(tmp_path, protocol):
    assert load_pickle(save(tmp_path / "a.pkl", PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool", ">f4", "float16"])
def test_numpy_values_come_through(tmp_path, protocol, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    value = [array, array[1, 2], array.T, (np.zeros((0, 2), dtype),)]
    got = load_pickle(save(tmp_path / "a.pkl", value, protocol))
    for mine, theirs in zip([got[0], got[1], got[2], got[3][0]], [value[0], value[1], value[2], value[3][0]]):
        assert np.array_equal(mine, theirs)
        assert mine.dtype.newbyteorder("=") == theirs.dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("attack", ["system", "eval", "exec", "import", "ordered", "numpy_load"])
def test_calls_are_refused_without_running(tmp_path, protocol, attack):
    flag = tmp_path / "ran"
    touch = f"open({str(flag)!r}, 'w')"
    value = {
        "system": Call(os.system, f"touch {flag}"),
        "eval": Call(builtins.eval, touch),
        "exec": Call(builtins.exec, touch),
        "import": Call(builtins.__import__, "antigravity"),
        "ordered": Call(collections.OrderedDict),
        "numpy_load": Call(np.load, str(flag)),
    }[attack]
    path = save(tmp_path / "a.pkl", [("row", value)], protocol)
    with pytest.raises(ValueError, match=r"a\.pkl was refused and nothing in it was run"):
        load_pickle(path)
    assert not flag.exists()


def test_dotted_names_and_unlisted_numpy_functions_are_refused(tmp_path):
    for name in (b"numpy\nndarray.tofile", b"numpy\nmemmap", b"numpy.core.multiarray\nfromfile", b"builtins\nset.pop"):
        with pytest.raises(ValueError, match="refused"):
            load_pickle(save(tmp_path / "a.pkl", b"c" + name + b"\n."))


def test_object_arrays_are_refused(tmp_path):
    for protocol in range(2, 6):
        for value in (np.array([{}, []], dtype=object), np.array([(1, {})], dtype=[("a", "i4"), ("b", "O")])):
            with pytest.raises(ValueError, match="refused"):
                load_pickle(save(tmp_path / "a.pkl", value, protocol))


def test_an_array_cannot_claim_more_than_the_file_holds(tmp_path):
    data = pickle.dumps(np.zeros(8, np.uint8), protocol=2)
    assert b"K\x08\x85" in data
    with pytest.raises(ValueError, match="claims 4294967295 numbers and holds 8|refused|no readable"):
        load_pickle(save(tmp_path / "a.pkl", data.replace(b"K\x08\x85", b"\x8a\x05\xff\xff\xff\xff\x00\x85")))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("persistent id", b"\x80\x04X\x01\x00\x00\x00aQ."),
        ("persistent id, text", b"Pabc\n."),
        ("class instance", b"(ios\nsystem\n."),
        ("new object", b"\x80\x02cnumpy\nndarray\n)\x81."),
        ("extension registry", b"\x80\x02\x82\x01."),
        ("memo bomb", b"\x80\x04]r\xff\xff\xff\x7f."),
        ("memo bomb, text", b"]p99999999999\n."),
        ("length bomb", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."),
        ("no stop", b"\x80\x04]"),
        ("nothing", b""),
        ("state of an allowed name", b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb."),
        ("slots of an allowed name", b"\x80\x02cnumpy\ndtype\nN}X\x05\x00\x00\x00_makeK\x01s\x86b."),
    ],
)
def test_malicious_and_damaged_pickles_are_refused(tmp_path, name, data):
    with pytest.raises(ValueError, match=r"a\.pkl"):
        load_pickle(save(tmp_path / "a.pkl", data))


def test_a_refusal_leaves_the_reader_as_it_was(tmp_path):
    attack = b"\x80\x02cnumpy\ndtype\nN}X\x05\x00\x00\x00_makeK\x01s\x86b."
    with pytest.raises(ValueError, match="refused"):
        load_pickle(save(tmp_path / "a.pkl", attack))
    assert load_pickle(save(tmp_path / "b.pkl", np.ones(3))).sum() == 3


def test_too_large_and_missing_files_say_so(tmp_path):
    path = save(tmp_path / "a.pkl", list(range(1000)))
    with pytest.raises(ValueError, match="more than the limit of 100"):
        load_pickle(path, max_bytes=100)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_pickle(tmp_path / "none.pkl")
