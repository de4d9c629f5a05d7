"""Pictures on a disk: the file that an annotation's name means, and the key of the sample that is made of it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.objects import RowError

MAX_BYTES = 256 * 2**20
"""Largest picture file that is read."""
_COCO_2014 = re.compile(r"COCO_(?:train|val)2014_([0-9]{12}\.jpg)")
_COCO_2017 = re.compile(r"[0-9]{12}\.jpg")


def find_image(image_root: Path, image_path: str) -> Path | None:
    """The file that a row's image_path means, somewhere under `image_root`, or None.

    The path may have Windows separators and begin on the authors' drive: its longest ending that exists is taken. The
    same picture is called 000000000009.jpg in COCO 2017 and COCO_train2014_000000000009.jpg in COCO 2014: both are
    tried.
    """
    parts = [part for part in re.split(r"[\\/]+", image_path) if part not in ("", ".", "..") and ":" not in part]
    if not parts or "\0" in image_path:
        return None
    name = parts[-1]
    names = [name]
    if short := _COCO_2014.fullmatch(name):
        names.append(short[1])
    elif _COCO_2017.fullmatch(name):
        names += [f"COCO_{part}2014_{name}" for part in ("train", "val")]
    for candidate in names:
        for start in range(len(parts)):
            path = image_root.joinpath(*parts[start:-1], candidate)
            if path.is_file():
                return path
    return None


def read_picture(image_root: Path, name: str) -> tuple[Path, bytes]:
    """The file that `name` means and its bytes; RowError if it is missing, too large or cannot be read."""
    path = find_image(image_root, name)
    if path is None:
        raise RowError("picture missing", f"{name!r} is not under {image_root}")
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise RowError("picture unreadable", f"{path} has {size} bytes, more than the limit of {MAX_BYTES}")
        return path, path.read_bytes()
    except OSError as error:
        raise RowError("picture unreadable", f"{path}: {error.strerror}") from None


def unique_keys(names: Sequence[str]) -> list[str]:
    """A key per file name: its stem, and a number where a stem comes again; `row-<place>` for a blank name."""
    keys: list[str] = []
    used: dict[str, int] = {}
    taken: set[str] = set()
    for place, name in enumerate(names):
        stem = re.split(r"[\\/]+", name)[-1].rsplit(".", 1)[0]
        base = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:75] or f"row-{place}"
        key = base
        while key in taken:
            used[base] = used.get(base, 1) + 1
            key = f"{base}-{used[base]}"
        taken.add(key)
        keys.append(key)
    return keys


def picture_sizes(image_root: Path, names: Iterable[str]) -> list[list[Any]]:
    """[file name, bytes] of the picture that each name means, [] where there is none: a part of a fingerprint."""
    found = (find_image(image_root, name) for name in names)
    return [[path.name, path.stat().st_size] if path else [] for path in found]
