"""Masks as COCO run-length encodings: make, check, decode, compare. The one place that calls pycocotools' mask code.

A mask is {"size": [height, width], "counts": str}: COCO's compressed form, as in `instances.json`, with text counts so
that it is plain JSON. Runs go down the columns and begin with a run of zeros.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from pycocotools import mask as coco

from pipeline.data.brief import brief

MAX_PIXELS = 64_000_000
"""Largest mask in pixels; the size comes from files, and decoding allocates it."""
_ORDINARY = 4096
"""Characters of counts; a longer mask's runs are not kept, so that hostile files cannot fill memory."""


def _with_text_counts(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    return {"size": [int(rle["size"][0]), int(rle["size"][1])], "counts": counts}


def _runs(counts: str) -> np.ndarray:
    """The run lengths behind compressed counts, int64, not to be written to; those of ordinary masks are kept for a
    while, since a mask is checked when it is read and shrunk when its batch is made."""
    return _remembered(counts) if len(counts) <= _ORDINARY else _parse(counts)


@lru_cache(maxsize=256)  # more masks than a batch reads before it shrinks them
def _remembered(counts: str) -> np.ndarray:
    runs = _parse(counts)
    runs.setflags(write=False)
    return runs


def _parse(counts: str) -> np.ndarray:
    """The run lengths behind compressed counts, int64 (pycocotools' rleFrString, with its arithmetic and with checks).

    Five bits a character, the lowest first, 32 marks that more follow; from the fourth number on, each is the
    difference to the one before the last. Done for all characters at once: this runs for each mask that is read.
    """
    try:
        codes = np.frombuffer(counts.encode("latin-1"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        codes = np.array([-1])
    if codes.size and (codes.min() < 0 or codes.max() > 63):
        raise ValueError(f"a mask's counts hold a character that COCO's encoding does not use: {brief(counts, 40)}")
    if not codes.size:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(codes & 0x20 == 0)
    if not ends.size or ends[-1] != codes.size - 1:
        raise ValueError("a mask's counts end in the middle of a run")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("a mask's counts hold a run longer than any picture")
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 0x1F) << shifts, starts)
    runs = np.where(codes[ends] & 0x10 != 0, runs - (np.int64(1) << (5 * lengths)), runs)
    if np.abs(runs).max() > MAX_PIXELS:
        raise ValueError("a mask's counts hold a run longer than any picture")
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def check(rle: Any) -> None:
    """Raise ValueError unless `rle` is a whole compressed mask whose runs cover exactly its size.

    pycocotools itself trusts the runs, so masks from files pass here before they reach its C code.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError('a mask must be {"size": [height, width], "counts": text}')
    size = rle["size"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"a mask's size must be two positive whole numbers, found {brief(size)}")
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"a mask of {brief(size)} pixels is above the limit of {MAX_PIXELS}")
    if not isinstance(rle["counts"], str):
        raise ValueError(f"a mask's counts must be text, found {type(rle['counts']).__name__}")
    runs = _runs(rle["counts"])
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"a mask's runs do not add up to its size {size[0]} x {size[1]}: it is cut or damaged")


def encode(mask_HW: np.ndarray) -> dict[str, Any]:
    """The RLE of a mask [H,W] of any number type; non-zero is inside."""
    assert mask_HW.ndim == 2
    return _with_text_counts(coco.encode(np.asfortranarray(mask_HW != 0, dtype=np.uint8)))


def decode(rle: dict[str, Any]) -> np.ndarray:
    """The mask as uint8 [H,W] in {0,1}."""
    return coco.decode(rle)


def shrink(rle: dict[str, Any], side: int) -> np.ndarray:
    """A checked mask squashed to [side, side], float32 in {0,1}: 1 where at least half of the cell's area is inside.

    An object too thin for that keeps its most covered cells: an empty target would teach that nothing is there.
    The areas come from the runs themselves, exactly and without the mask at full size. Cut at the ends of the columns,
    runs are blocks one pixel wide. In units of 1/side pixel a cell is H high and W wide, and what a block covers of
    each cell is the running sum, along both axes, of sixteen numbers at its corners.
    """
    height, width = rle["size"]
    small_KK = np.zeros((side, side), np.float32)
    toggles = _runs(rle["counts"]).cumsum()
    end = toggles[1::2]
    start = toggles[0::2][: end.size]
    first, last = start // height, (end - 1) // height
    columns = last - first + 1
    run = np.repeat(np.arange(columns.size), columns)
    if not run.size:
        return small_KK
    x = first[run] + np.arange(run.size) - (columns.cumsum() - columns)[run]
    top = np.maximum(start[run] - x * height, 0)
    bottom = np.minimum(end[run] - x * height, height)
    rows, high = _differences(top * side, bottom * side, height)
    cols, wide = _differences(x * side, (x + 1) * side, width)
    above, before = int(rows.min()), int(cols.min())
    shape = int(rows.max()) + 1 - above, int(cols.max()) + 1 - before
    places = (rows[:, None] - above) * shape[1] + (cols - before)
    sums = np.bincount(places.ravel(), (high[:, None] * wide).ravel(), minlength=shape[0] * shape[1])
    covered = sums.reshape(shape).cumsum(0).cumsum(1)[: side - above, : side - before]
    around_object = small_KK[above : above + shape[0], before : before + shape[1]]
    around_object[:] = covered >= min(height * width / 2, max(1.0, covered.max()))
    return small_KK


def _differences(start: np.ndarray, end: np.ndarray, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """([4, n] cells, [4, n] numbers to put there) whose running sum is, cell by cell of length `cell`, how much of each
    stretch start..end [n] lies within it."""
    cells, numbers = np.empty((4, start.size), np.int64), np.empty((4, start.size))
    for at, position, sign in ((0, start, 1), (2, end, -1)):
        cells[at] = position // cell
        cells[at + 1] = cells[at] + 1
        numbers[at] = sign * (cells[at + 1] * cell - position)
        numbers[at + 1] = sign * cell - numbers[at]
    return cells, numbers


def area(rle: dict[str, Any]) -> int:
    """Pixels inside."""
    return int(coco.area(rle))


def from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    """The union of polygons, each flat: x1, y1, x2, y2, ... in pixels, on a picture of `height` x `width`.

    Parts that overlap count once. (Adding the decoded parts up, as is common, gives 2 there.)
    """
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon needs an even number of at least 6 coordinates, found {len(polygon)}")
    parts = coco.frPyObjects([[float(x) for x in polygon] for polygon in polygons], height, width)
    return _with_text_counts(coco.merge(parts))


def from_annotation(rle: dict[str, Any]) -> dict[str, Any]:
    """A checked mask of ours from an annotation's RLE: counts as bytes or text (compressed), or a list of runs."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if not isinstance(size, list | tuple) or len(size) != 2 or "counts" not in rle:
        raise ValueError('a mask must be {"size": [height, width], "counts": ...}')
    if isinstance(rle["counts"], list):
        height, width = int(size[0]), int(size[1])
        runs = rle["counts"]
        if not all(type(n) is int and n >= 0 for n in runs) or sum(runs) != height * width > 0:
            raise ValueError(f"a mask's runs do not add up to its size {brief([height, width])}")
        if height * width > MAX_PIXELS:
            raise ValueError(f"a mask of {brief([height, width])} pixels is above the limit of {MAX_PIXELS}")
        return _with_text_counts(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width))
    try:
        ours = _with_text_counts(rle)
    except (UnicodeDecodeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"a mask's RLE cannot be read: {error}") from None
    check(ours)
    return ours


def union(rles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One mask of all of `rles`; they must be of one size."""
    if len({tuple(rle["size"]) for rle in rles}) != 1:
        raise ValueError(f"masks of one object have different sizes: {sorted({tuple(r['size']) for r in rles})}")
    return _with_text_counts(coco.merge(list(rles)))


def intersection(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Pixels inside both masks."""
    return int(coco.area(coco.merge([a, b], intersect=True)))


def iou(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Exact intersection over union; 0 when both are empty."""
    both = intersection(a, b)
    either = area(a) + area(b) - both
    return both / either if either else 0.0


def bounding_box(rle: dict[str, Any]) -> tuple[float, float, float, float]:
    """The smallest box around the mask: x1, y1, x2, y2 in pixels."""
    x, y, w, h = (float(n) for n in coco.toBbox(rle))
    return (x, y, x + w, y + h)
