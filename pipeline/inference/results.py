"""What the model's answers are handed back as."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data import rle

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentedObject:
    """One object of an answer.

    number: i of its <OBJ-i>. phrase: the words that mention it, "" where the answer has none; span: their (start, end)
    in `Answer.text`. mask: bool [H,W] at the picture's own resolution. box: x1, y1, x2, y2 in pixels, None for an empty
    mask. score: 0..1, the probability of its token times the mean probability of the pixels in its mask.
    """

    number: int
    phrase: str
    span: tuple[int, int] | None
    mask: np.ndarray
    box: Box | None
    score: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, the mask as COCO RLE."""
        return {
            "number": self.number,
            "phrase": self.phrase,
            "span": self.span and list(self.span),
            "box": self.box and list(self.box),
            "score": round(self.score, 6),
            "rle": rle.encode(self.mask),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer about a picture.

    text: without tags; tagged: as the model wrote it, with <OBJ-i>. size: (height, width) of the picture. objects: in
    order of mention. left_out: objects whose mask is empty or whose score is below `min_score`.
    """

    task: str
    question: str
    text: str
    tagged: str
    size: tuple[int, int]
    objects: list[SegmentedObject] = field(default_factory=list)
    left_out: list[SegmentedObject] = field(default_factory=list)

    @property
    def nothing_found(self) -> bool:
        """Whether objects were asked for and none is there, by the model's word or by its scores."""
        return self.task in ("reasoning", "referring") and not self.objects

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "task": self.task,
            "question": self.question,
            "text": self.text,
            "tagged": self.tagged,
            "size": list(self.size),
            "nothing_found": self.nothing_found,
            "objects": [each.to_json() for each in self.objects],
            "left_out": [each.to_json() for each in self.left_out],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Pictures drawn for a text, as PNG files; none where the model did not write <GEN>."""

    text: str
    answer: str
    seed: int
    pictures: list[bytes] = field(default_factory=list)

    def images(self) -> list[Image.Image]:
        """The pictures, decoded."""
        return [Image.open(io.BytesIO(data)).convert("RGB") for data in self.pictures]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the pictures."""
        return {"task": "generation", "text": self.text, "answer": self.answer, "seed": self.seed}
