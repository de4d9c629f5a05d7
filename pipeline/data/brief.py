"""A value in a message. Values come from strangers: writing one out in full may take forever.

A list that holds ten times a list that holds ten times a list, twenty levels deep, is a few bytes in a pickle.
"""

import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = 4
_REPR.maxstring = 80


def brief(value: Any, most: int = 80) -> str:
    """`value` as Python would write it, at most `most` characters of it."""
    if isinstance(value, bytes | bytearray):
        value = bytes(value[:most])
    try:
        return _REPR.repr(value)[:most]
    except ValueError:
        # Python does not write out whole numbers of more than 4,300 digits.
        return f"a very large {type(value).__name__}"
