"""Reads annotation pickles from strangers without running anything of theirs.

A pickle is a program: it may name any function of any module and call it. Two locks stand before it here:

1. A scan of the opcodes, which executes nothing, refuses those that plain data does not use (classes, persistent ids,
   the extension registry), lengths beyond the file's end, and memo numbers so large that pickle would fill the memory.
2. An unpickler whose globals are an exact list of (module, name). Not even those give the real thing: each stands for a
   small function of ours that makes numpy scalars and arrays out of bytes that are in the file, plain numbers only.

What comes out consists of None, bool, int, float, str, bytes, list, tuple, dict, set and numpy values.
"""

import io
import pickle
import pickletools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

MAX_BYTES = 4 * 2**30
"""Largest pickle that is read; MMUD's largest is a few hundred megabytes."""

_REFUSED = {
    "PERSID": "a persistent id",
    "BINPERSID": "a persistent id",
    "INST": "an object of a class",
    "OBJ": "an object of a class",
    "NEWOBJ": "an object of a class",
    "NEWOBJ_EX": "an object of a class",
    "EXT1": "a registered extension",
    "EXT2": "a registered extension",
    "EXT4": "a registered extension",
    "NEXT_BUFFER": "a buffer outside the file",
    "READONLY_BUFFER": "a buffer outside the file",
}
_NUMBER_KINDS = "biuf"
_COST = 16
"""A file's values may take this many times its size, and a megabyte besides."""
_budget = threading.local()


class _Refusal(pickle.UnpicklingError):
    """Something in the pickle that is not plain data."""


class _Door:
    """Stands for one allowed global. Its instances have no attributes that a pickle's BUILD opcode could set."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise _Refusal(f"a pickle tried to set {name!r}")

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refusal("a pickle tried to change a function's state")


class _Dtype:
    """A numpy number type under construction; pickles set its byte order by a state tuple."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_flags: Any) -> None:
        if not isinstance(code, str) or len(code) > 8:
            raise _Refusal("a numpy type that is no plain number type")
        try:
            dtype = np.dtype(code)
        except TypeError:
            raise _Refusal(f"a numpy type {code!r} that is no plain number type") from None
        if dtype.kind not in _NUMBER_KINDS or dtype.subdtype is not None or dtype.names is not None:
            raise _Refusal(f"a numpy type {code!r} that is no plain number type (objects could run code)")
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise _Refusal("a numpy type with an unknown byte order")
        if any(part is not None for part in state[2:5]):
            raise _Refusal("a numpy type with fields inside")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """A numpy array under construction: empty until its state, which holds shape, type and bytes, arrives."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refusal("a numpy array in an unknown form")
        _version, shape, dtype, fortran, data = state
        ready = _array(data, dtype, shape, "F" if fortran else "C")
        super().__setstate__((1, shape, ready.dtype, bool(fortran), bytes(data)))  # type: ignore[arg-type]


def _charge(size: int) -> None:
    """Takes `size` from what this file's values may cost in all. A door that copies its argument could otherwise be
    called a million times with the same gigabyte."""
    _budget.left = getattr(_budget, "left", 0) - size
    if _budget.left < 0:
        raise _Refusal("it makes many times its own size in values")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise _Refusal("a numpy array of something other than plain numbers")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or order not in ("C", "F"):
        raise _Refusal("a numpy array of an impossible shape")
    _charge(len(data))
    flat = np.frombuffer(bytes(data), dtype=dtype.dtype) if data else np.zeros(0, dtype.dtype)
    count = 1
    for n in shape:
        count *= n
    if count != flat.size:
        raise _Refusal(f"a numpy array that claims {count} numbers and holds {flat.size}")
    return flat.reshape(shape, order=order)


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _reconstruct(kind: Any, shape: Any, _code: Any) -> _Array:
    if kind is not _NDARRAY or shape != (0,):
        raise _Refusal("a numpy array in an unknown form")
    return np.ndarray.__new__(_Array, (0,))


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise _Refusal("bytes in an unknown encoding")
    _charge(len(text))
    return text.encode("latin-1")


def _empty(kind: type) -> Callable[..., Any]:
    def make(*content: Any) -> Any:
        if content and not (len(content) == 1 and isinstance(content[0], list | bytes)):
            raise _Refusal(f"a {kind.__name__} in an unknown form")
        _charge(sum(map(len, content)))
        return kind(*content)

    return make


def _refuse_call(*_arguments: Any) -> NoReturn:
    raise _Refusal("a numpy array in an unknown form")


_NDARRAY = _Door(_refuse_call)
_NUMPY_DOORS = {"_reconstruct": _Door(_reconstruct), "scalar": _Door(_scalar)}
_ALLOWED: dict[tuple[str, str], _Door] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Door(_Dtype),
    ("numpy.core.numeric", "_frombuffer"): _Door(_array),
    ("numpy._core.numeric", "_frombuffer"): _Door(_array),
    ("_codecs", "encode"): _Door(_encode),
    **{(f"numpy.{core}.multiarray", name): door for core in ("core", "_core") for name, door in _NUMPY_DOORS.items()},
    # Protocols 0 to 2 write these as calls.
    **{
        (module, kind.__name__): _Door(_empty(kind))
        for module in ("builtins", "__builtin__")
        for kind in (bytes, bytearray, set, frozenset)
    },
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        door = _ALLOWED.get((module, name))
        if door is None:
            raise _Refusal(f"it calls for {module}.{name}, which is not plain data")
        return door

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refusal("it holds a persistent id")


def _argument_sizes() -> list[int | None]:
    """By opcode: bytes of its argument; -1 a line, -4 and so on a length of that many bytes before; None unknown."""
    sizes: list[int | None] = [None] * 256
    counted = {pickletools.TAKEN_FROM_ARGUMENT1: -11, pickletools.TAKEN_FROM_ARGUMENT4: -14}
    counted |= {pickletools.TAKEN_FROM_ARGUMENT4U: -14, pickletools.TAKEN_FROM_ARGUMENT8U: -18}
    for opcode in pickletools.opcodes:
        if opcode.name in _REFUSED:
            continue
        n = 0 if opcode.arg is None else opcode.arg.n
        lines = 2 if opcode.name == "GLOBAL" else 1
        sizes[ord(opcode.code)] = -lines if n == pickletools.UP_TO_NEWLINE else counted.get(n, n)
    return sizes


_SIZES = _argument_sizes()
_REFUSED_CODES = {ord(op.code): _REFUSED[op.name] for op in pickletools.opcodes if op.name in _REFUSED}
_PUT, _BINPUT4, _STOP = ord("p"), ord("r"), ord(".")


def _scan(data: bytes) -> None:
    """Walk over the opcodes up to STOP without executing any; _Refusal at the first that is not plain data.

    One pass of a tight loop: about a second for ten million opcodes, and MMUD's training split has about that many.
    """
    position, end, sizes = 0, len(data), _SIZES
    while position < end:
        code = data[position]
        size = sizes[code]
        position += 1
        if size is None:
            raise _Refusal(f"it holds {_REFUSED_CODES.get(code, 'an unknown opcode')}")
        if code == _STOP:
            return
        if size < -10:
            width = -size - 10
            length = int.from_bytes(data[position : position + width], "little")
            position += width + length
        elif size < 0:
            start = position
            for _ in range(-size):
                position = data.find(b"\n", position) + 1
                if position == 0:
                    raise _Refusal("it is cut")
            if code == _PUT and (position - start > 12 or int(data[start : position - 1]) > end):
                raise _Refusal("a memo number is beyond reason")
        else:
            if code == _BINPUT4 and int.from_bytes(data[position : position + 4], "little") > end:
                raise _Refusal("a memo number is beyond reason")
            position += size
    raise _Refusal("it is cut")


def load_pickle(path: str | Path, *, max_bytes: int = MAX_BYTES, encoding: str = "ASCII") -> Any:
    """The plain data in the pickle at `path`.

    `encoding` is for text in Python 2 pickles (the RefCOCO files want "latin1"). ValueError names the file and what in
    it was refused; nothing of the file has been executed then. A missing file is a ValueError too.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{path} has {size} bytes, more than the limit of {max_bytes}: is it the right file?")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        _scan(data)
        _budget.left = _COST * len(data) + 2**20
        return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()
    except _Refusal as error:
        raise ValueError(
            f"{path} was refused and nothing in it was run: {error}. Annotations are plain lists, texts and numbers; "
            "save the file again as these, from a source you trust"
        ) from None
    except MemoryError:
        raise ValueError(f"{path} asks for more memory than there is: it is damaged or malicious") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is no readable pickle: {type(error).__name__}: {str(error)[:100]}") from None
    except (AttributeError, UnicodeError, RecursionError, ImportError) as error:
        raise ValueError(f"{path} is no readable pickle: {type(error).__name__}: {str(error)[:100]}") from None
