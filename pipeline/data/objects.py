"""What the annotation formats share: checked texts and lists, masks and boxes on a picture's own size.

Each value comes from a file of strangers. What is wrong with it is a RowError, whose reason is counted in the report.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data import rle
from pipeline.data.images import FORMATS, load, open_picture

MOST_COORDINATES = 200_000
LONGEST_TEXT = 20_000
_RUNS = 10_000_000
_EDGE = 2.0
"""Pixels by which annotators' polygons may stick out of the picture."""


class RowError(ValueError):
    """Why a row is left out: `reason` to count by, the message for the report."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def plain(value: Any) -> Any:
    """numpy values as Python's."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def picture_of(image: bytes) -> tuple[int, int, str]:
    """(height, width, "jpg" or "png") of a picture's bytes, after decoding all of it; RowError if it cannot be."""
    try:
        picture = load(image)
        return picture.height, picture.width, FORMATS[str(open_picture(image).format)]
    except ValueError as error:
        raise RowError("picture unreadable", str(error)) from None


def text_of(value: Any, field: str) -> str:
    """`value` if it is text of a bearable length, else RowError naming `field`."""
    if not isinstance(value, str):
        raise RowError("row malformed", f"field {field} must be text, found {type(value).__name__}")
    if len(value) > LONGEST_TEXT:
        raise RowError("row malformed", f"field {field} has {len(value)} characters, more than {LONGEST_TEXT}")
    return value


def sequence_of(value: Any, field: str, most: int) -> Sequence[Any]:
    """`value` if it is a list of at most `most` entries (a numpy array counts as one), else RowError."""
    value = plain(value)
    if not isinstance(value, list | tuple):
        raise RowError("row malformed", f"field {field} must be a list, found {type(value).__name__}")
    if len(value) > most:
        raise RowError("row malformed", f"field {field} has {len(value)} entries, more than {most}")
    return value


def mask_of(mask: Any, where: str, height: int, width: int) -> dict[str, Any]:
    """A mask as annotations write it, on the picture's own size in pixels, as a checked RLE.

    `mask` is one flat polygon, a list of polygons, an RLE dict, or a list of RLE dicts; parts are united. `where` names
    it in messages. RowError if it is empty, unreadable, of another size or outside the picture.
    """
    mask = plain(mask)
    parts = [mask] if isinstance(mask, dict) else list(sequence_of(mask, where, MOST_COORDINATES))
    if not parts:
        raise RowError("mask empty", f"{where}: no polygon and no RLE")
    try:
        if isinstance(parts[0], dict):
            found = _from_rles(parts, where)
        else:
            nested = isinstance(plain(parts[0]), list | tuple)
            found = _from_polygons(_checked_polygons(parts if nested else [parts], where), where, height, width)
    except RowError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise RowError("mask unreadable", f"{where}: {error}") from None
    if list(found["size"]) != [height, width]:
        raise RowError(
            "mask of another size", f"{where}: {found['size']} (height, width), the picture {[height, width]}"
        )
    if not rle.area(found):
        raise RowError("mask empty", f"{where}: not one pixel inside")
    return found


def _from_rles(parts: list[Any], where: str) -> dict[str, Any]:
    counts = [part.get("counts") for part in parts if isinstance(part, dict)]
    if sum(len(each) for each in counts if isinstance(each, str | bytes | list)) > _RUNS:
        raise RowError("mask unreadable", f"{where}: its RLEs hold more than {_RUNS} counts")
    return rle.union([rle.from_annotation(part) for part in parts])


def _checked_polygons(polygons: list[Any], where: str) -> list[list[float]]:
    lists = [sequence_of(polygon, where, MOST_COORDINATES) for polygon in polygons]
    # Many names may stand for one long list, so nothing is copied before the sum is known.
    if sum(map(len, lists)) > MOST_COORDINATES:
        raise RowError("mask unreadable", f"{where}: more than {MOST_COORDINATES} coordinates")
    found = [[plain(number) for number in polygon] for polygon in lists]
    if not all(isinstance(number, int | float) for polygon in found for number in polygon):
        raise RowError("mask unreadable", f"{where}: a polygon must hold numbers only")
    return found


def _from_polygons(polygons: list[list[float]], where: str, height: int, width: int) -> dict[str, Any]:
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64)
        if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all():
            raise RowError("mask unreadable", f"{where}: a polygon must be an even number of at least 6 numbers")
        x, y = points[0::2], points[1::2]
        low, right, bottom = float(points.min()), float(x.max()), float(y.max())
        if low < -_EDGE or right > width + _EDGE or bottom > height + _EDGE:
            raise RowError(
                "mask outside picture",
                f"{where}: it reaches x {right:g}, y {bottom:g} (least {low:g}), the picture is {width} x {height}",
            )
    return rle.from_polygons(polygons, height, width)


def box_of(box: Any, mask: dict[str, Any], height: int, width: int) -> tuple[float, float, float, float]:
    """x, y, width, height to x1, y1, x2, y2 within the picture; the mask's own box if that is no box."""
    try:
        x, y, w, h = (float(n) for n in plain(box))
    except (TypeError, ValueError, OverflowError):
        return rle.bounding_box(mask)
    corners = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if not (corners[0] < corners[2] and corners[1] < corners[3]):
        return rle.bounding_box(mask)
    return tuple(round(n, 2) for n in corners)  # type: ignore[return-value]
