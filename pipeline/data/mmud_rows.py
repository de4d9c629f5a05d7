"""One row of an MMUD pickle to one Sample.

A row is a tuple: image_path, caption, enriched_text, sample_texts, sample_masks, sample_boxs, height, width, category,
category_text, and in most files caption_len and enriched_text_len. What the files hold in fact, and how it is read:

- image_path may be a Windows path of the authors' machine: only its last parts mean anything here.
- enriched_text is "##Question: ... ##Answer <SEP>... <LCL-1> ...", with or without a line break before ##Answer and a
  colon after it. <LCL-i> is the i-th object, counted from 1; <SEP> means nothing.
- A mask is ONE flat polygon (x1, y1, x2, y2, ...), or a list of RLE dicts with counts as bytes or text.
- sample_boxs are x, y, width, height.
- height and width are sometimes swapped and never needed: the picture's own size is trusted. Polygons are in pixels of
  the picture as seen, so they are drawn on that size and must lie within it; an RLE must be of exactly that size.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data import rle
from pipeline.data.images import FORMATS, load, open_picture
from pipeline.data.schema import ObjectRecord, Rejected, Sample

MOST_OBJECTS = 200
MOST_PHRASES = 1_000
MOST_COORDINATES = 200_000
LONGEST_TEXT = 20_000
_EDGE = 2.0
"""Pixels by which annotators' polygons may stick out of the picture."""

_DIALOGUE = re.compile(r"\s*##\s*Question\s*:?(?P<question>.*?)##\s*Answer\s*:?(?P<answer>.*)", re.DOTALL)
_TAG = re.compile(r"<(?:LCL|OBJ)-(\d{1,6})>")
_OTHER_TAG = re.compile(r"<(?:SEP|GLB|GEN|image)>")


class RowError(ValueError):
    """Why a row is left out: `reason` to count by, the message for the report."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse_dialogue(text: str) -> tuple[str, str]:
    """(question, answer with <OBJ-i>) of an enriched_text; ("", "") of a blank one."""
    if not text.strip():
        return "", ""
    found = _DIALOGUE.fullmatch(text)
    if not found:
        raise RowError("question unreadable", f"enriched_text is not '##Question: ... ##Answer ...': {text[:80]!r}")
    question, answer = (" ".join(_OTHER_TAG.sub(" ", found[name]).split()) for name in ("question", "answer"))
    answer = _TAG.sub(lambda tag: f"<OBJ-{int(tag[1])}>", answer)
    question = " ".join(_TAG.sub(" ", question).split())
    if not question or not answer:
        raise RowError("question unreadable", "enriched_text has an empty question or answer")
    return question, answer


def _plain(value: Any) -> Any:
    """numpy values as Python's."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError("row malformed", f"field {field} must be text, found {type(value).__name__}")
    if len(value) > LONGEST_TEXT:
        raise RowError("row malformed", f"field {field} has {len(value)} characters, more than {LONGEST_TEXT}")
    return value


def _sequence(value: Any, field: str, most: int) -> Sequence[Any]:
    value = _plain(value)
    if not isinstance(value, list | tuple):
        raise RowError("row malformed", f"field {field} must be a list, found {type(value).__name__}")
    if len(value) > most:
        raise RowError("row malformed", f"field {field} has {len(value)} entries, more than {most}")
    return value


def _mask(mask: Any, number: int, height: int, width: int) -> dict[str, Any]:
    """The mask of object `number` on the picture's own size, as a checked RLE."""
    where = f"field sample_masks, object {number}"
    mask = _plain(mask)
    parts = [mask] if isinstance(mask, dict) else list(_sequence(mask, where, MOST_COORDINATES))
    if not parts:
        raise RowError("mask empty", f"{where}: no polygon and no RLE")
    try:
        if isinstance(parts[0], dict):
            found = rle.union([rle.from_annotation(part) for part in parts])
        else:
            nested = isinstance(_plain(parts[0]), list | tuple)
            found = _from_polygons([_plain(part) for part in parts] if nested else [parts], where, height, width)
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


def _from_polygons(polygons: list[Any], where: str, height: int, width: int) -> dict[str, Any]:
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


def _box(box: Any, mask: dict[str, Any], height: int, width: int) -> tuple[float, float, float, float]:
    """x, y, width, height to x1, y1, x2, y2 within the picture; the mask's own box if that is no box."""
    try:
        x, y, w, h = (float(n) for n in _plain(box))
    except (TypeError, ValueError):
        return rle.bounding_box(mask)
    corners = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if not (corners[0] < corners[2] and corners[1] < corners[3]):
        return rle.bounding_box(mask)
    return tuple(round(n, 2) for n in corners)  # type: ignore[return-value]


def _phrases(texts: Any, number: int) -> tuple[str, ...]:
    field = f"sample_texts, object {number}"
    texts = [texts] if isinstance(texts, str) else _sequence(texts, field, MOST_PHRASES)
    phrases = [" ".join(_text(text, field).split()) for text in texts]
    phrases = list(dict.fromkeys(phrase for phrase in phrases if phrase))
    if not phrases:
        raise RowError("row malformed", f"field {field}: no phrase")
    return tuple(phrases)


def _objects(row: Sequence[Any], height: int, width: int) -> tuple[ObjectRecord, ...]:
    texts, masks, boxes = (
        _sequence(row[place], name, MOST_OBJECTS)
        for place, name in ((3, "sample_texts"), (4, "sample_masks"), (5, "sample_boxs"))
    )
    names = _sequence(row[9], "category_text", MOST_OBJECTS)
    counts = {len(texts), len(masks), len(boxes), len(names)}
    if len(counts) != 1:
        raise RowError(
            "row malformed",
            f"{len(texts)} sample_texts, {len(masks)} sample_masks, {len(boxes)} sample_boxs and {len(names)} "
            "category_text: there must be as many of each",
        )
    objects = []
    for number, (text, mask, box, name) in enumerate(zip(texts, masks, boxes, names, strict=True), start=1):
        found = _mask(mask, number, height, width)
        objects.append(
            ObjectRecord(
                phrases=_phrases(text, number),
                box=_box(box, found, height, width),
                mask=found,
                category=str(_plain(name)).strip() or "object",
            )
        )
    return tuple(objects)


def image_path_of(row: Any) -> str:
    """The row's image_path; RowError if the row is none."""
    if not isinstance(row, tuple | list) or len(row) < 10:
        size = f" of {len(row)}" if isinstance(row, tuple | list) else ""
        raise RowError("row malformed", f"a row must be a tuple of 12 fields, found {type(row).__name__}{size}")
    return _text(row[0], "image_path")


def to_sample(row: Any, *, key: str, image: bytes, clip: np.ndarray | None) -> Sample | Rejected:
    """The Sample of a row and its picture's bytes, or why there is none."""
    try:
        image_path_of(row)
        try:
            picture = load(image)
        except ValueError as error:
            raise RowError("picture unreadable", str(error)) from None
        height, width = picture.height, picture.width
        question, answer = parse_dialogue(_text(row[2], "enriched_text"))
        objects = _objects(row, height, width)
        last = max((int(tag[1]) for tag in _TAG.finditer(answer)), default=0)
        if last > len(objects) or "<OBJ-0>" in answer:
            raise RowError("tag without object", f"the answer names <LCL-{last}>, the row has {len(objects)} objects")
        return Sample(
            key=key,
            image=image,
            image_format=FORMATS[str(open_picture(image).format)],  # type: ignore[arg-type]
            height=height,
            width=width,
            caption=_text(row[1], "caption").strip(),
            question=question,
            answer=answer,
            objects=objects,
            source="mmud",
            clip=clip,
        )
    except RowError as error:
        return Rejected(key, error.reason, str(error))
    except ValueError as error:
        return Rejected(key, "row malformed", str(error))
