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

from pipeline.data.brief import brief
from pipeline.data.objects import RowError, box_of, mask_of, picture_of, plain, sequence_of, text_of
from pipeline.data.schema import ObjectRecord, Rejected, Sample

MOST_OBJECTS = 200
MOST_PHRASES = 1_000
_MOST_CHARACTERS = 200_000
"""Of all phrases of one object: a pickle may hold one long text and name it a thousand times."""

_DIALOGUE = re.compile(r"\s*##\s*Question\s*:?(?P<question>.*?)##\s*Answer\s*:?(?P<answer>.*)", re.DOTALL)
_TAG = re.compile(r"<(?:LCL|OBJ)-(\d{1,6})>")
_OTHER_TAG = re.compile(r"<(?:SEP|GLB|GEN|image)>")


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


def _phrases(texts: Any, number: int) -> tuple[str, ...]:
    field = f"sample_texts, object {number}"
    texts = [texts] if isinstance(texts, str) else sequence_of(texts, field, MOST_PHRASES)
    if sum(len(text_of(text, field)) for text in texts) > _MOST_CHARACTERS:
        raise RowError("row malformed", f"field {field}: more than {_MOST_CHARACTERS} characters of phrases")
    phrases = [" ".join(text.split()) for text in texts]
    phrases = list(dict.fromkeys(phrase for phrase in phrases if phrase))
    if not phrases:
        raise RowError("row malformed", f"field {field}: no phrase")
    return tuple(phrases)


def _category(name: Any) -> str:
    name = plain(name)
    return (name.strip() if isinstance(name, str) else brief(name)) or "object"


def _objects(row: Sequence[Any], height: int, width: int) -> tuple[ObjectRecord, ...]:
    texts, masks, boxes = (
        sequence_of(row[place], name, MOST_OBJECTS)
        for place, name in ((3, "sample_texts"), (4, "sample_masks"), (5, "sample_boxs"))
    )
    names = sequence_of(row[9], "category_text", MOST_OBJECTS)
    counts = {len(texts), len(masks), len(boxes), len(names)}
    if len(counts) != 1:
        raise RowError(
            "fields of different lengths",
            f"{len(texts)} sample_texts, {len(masks)} sample_masks, {len(boxes)} sample_boxs and {len(names)} "
            "category_text: there must be as many of each",
        )
    objects = []
    for number, (text, mask, box, name) in enumerate(zip(texts, masks, boxes, names, strict=True), start=1):
        found = mask_of(mask, f"field sample_masks, object {number}", height, width)
        objects.append(
            ObjectRecord(
                phrases=_phrases(text, number),
                box=box_of(box, found, height, width),
                mask=found,
                category=_category(name),
            )
        )
    return tuple(objects)


def image_path_of(row: Any) -> str:
    """The row's image_path; RowError if the row is none."""
    if not isinstance(row, tuple | list) or len(row) < 10:
        size = f" of {len(row)}" if isinstance(row, tuple | list) else ""
        raise RowError("row malformed", f"a row must be a tuple of 12 fields, found {type(row).__name__}{size}")
    return text_of(row[0], "image_path")


def to_sample(row: Any, *, key: str, image: bytes, clip: np.ndarray | None) -> Sample | Rejected:
    """The Sample of a row and its picture's bytes, or why there is none."""
    try:
        image_path_of(row)
        height, width, image_format = picture_of(image)
        question, answer = parse_dialogue(text_of(row[2], "enriched_text"))
        objects = _objects(row, height, width)
        last = max((int(tag[1]) for tag in _TAG.finditer(answer)), default=0)
        if last > len(objects) or "<OBJ-0>" in answer:
            raise RowError("tag without object", f"the answer names <LCL-{last}>, the row has {len(objects)} objects")
        return Sample(
            key=key,
            image=image,
            image_format=image_format,  # type: ignore[arg-type]
            height=height,
            width=width,
            caption=text_of(row[1], "caption").strip(),
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
