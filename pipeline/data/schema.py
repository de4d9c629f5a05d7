"""The one schema: what a sample is, wherever it came from. The file format is described in shards/FORMAT.md."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.data import rle
from pipeline.data.brief import brief

SCHEMA_VERSION = 1
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
"""A key may hold no dot (webdataset ends a key at the first one) and no slash; 90 so that ustar's 100 suffice."""
OBJECT_TAG = re.compile(r"<OBJ-([0-9]{1,6})>")
IMAGE_FORMATS = ("jpg", "png")

_FAR = 1e9
"""No corner of a box is so far out; also false of NaN, and whole numbers too large for a float may be compared."""
_TEXTS = ("caption", "question", "answer", "source")


def _is_text(value: Any) -> bool:
    """JSON may hold halves of a UTF-16 pair, which are no characters: no file and no tokenizer takes them."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _need(condition: bool, name: str, wanted: str, found: Any) -> None:
    if not condition:
        raise ValueError(f"field '{name}' must be {wanted}, found {brief(found)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRecord:
    """One object of a picture.

    phrases   ways to refer to it
    box       x1, y1, x2, y2 in pixels
    mask      compressed COCO RLE {"size": [height, width], "counts": text}
    category  its kind, e.g. "dog"; in the mini world "small red circle"
    """

    phrases: tuple[str, ...]
    box: tuple[float, float, float, float]
    mask: dict[str, Any]
    category: str

    def __post_init__(self) -> None:
        _need(all(_is_text(p) and p.strip() for p in self.phrases), "phrases", "texts", self.phrases)
        _need(len(self.phrases) > 0, "phrases", "at least one text", self.phrases)
        numbers = len(self.box) == 4 and all(isinstance(n, int | float) and abs(n) < _FAR for n in self.box)
        _need(numbers, "box", "four finite numbers", self.box)
        _need(self.box[0] <= self.box[2] and self.box[1] <= self.box[3], "box", "x1, y1, x2, y2 in order", self.box)
        _need(_is_text(self.category) and bool(self.category.strip()), "category", "a text", self.category)
        rle.check(self.mask)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"phrases": list(self.phrases), "box": list(self.box), "mask": self.mask, "category": self.category}

    @classmethod
    def from_dict(cls, record: Any) -> "ObjectRecord":
        """The reverse of to_dict; ValueError names the field."""
        _need(isinstance(record, dict), "objects", "a list of records", type(record).__name__)
        missing = {"phrases", "box", "mask", "category"} - record.keys()
        _need(not missing, "objects", f"complete; missing: {', '.join(sorted(missing))}", sorted(record))
        _need(isinstance(record["phrases"], list), "phrases", "a list of texts", record["phrases"])
        _need(isinstance(record["box"], list), "box", "four finite numbers", record["box"])
        return cls(
            phrases=tuple(record["phrases"]),
            box=tuple(record["box"]),
            mask=record["mask"],
            category=record["category"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture with everything known of it. Checked when made: a Sample that exists is a good one.

    image          the file's bytes, as they came or resized once at packing
    height, width  of the masks and boxes, in pixels: the picture's own size, EXIF turning applied. If the picture was
                   resized at packing, this is its size before: masks stay at full resolution
    question, answer  both "" where there is none; the answer holds <OBJ-i>, i the 1-based index into objects
    clip           the picture's CLIP embedding, float16 [E], or None
    """

    key: str
    image: bytes
    image_format: Literal["jpg", "png"]
    height: int
    width: int
    caption: str
    question: str
    answer: str
    objects: tuple[ObjectRecord, ...]
    source: str
    clip: np.ndarray | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        well_formed = isinstance(self.key, str) and KEY.fullmatch(self.key) is not None
        _need(well_formed, "key", "1 to 90 letters, digits, _ or -", self.key)
        _need(self.image_format in IMAGE_FORMATS, "image_format", "jpg or png", self.image_format)
        _need(isinstance(self.image, bytes) and len(self.image) > 0, "image", "bytes", type(self.image).__name__)
        for name in ("height", "width"):
            value = getattr(self, name)
            _need(type(value) is int and value > 0, name, "a positive whole number", value)
        for name in _TEXTS:
            _need(_is_text(getattr(self, name)), name, "a text", getattr(self, name))
        _need(bool(self.question) == bool(self.answer), "answer", "given if and only if a question is", self.answer)
        for number, record in enumerate(self.objects, start=1):
            if list(record.mask["size"]) != [self.height, self.width]:
                raise ValueError(
                    f"the mask of object {number} is of {record.mask['size']} pixels (height, width), "
                    f"the picture of {[self.height, self.width]}"
                )
        for tag in OBJECT_TAG.finditer(self.answer):
            within = 1 <= int(tag[1]) <= len(self.objects)
            _need(within, "answer", f"about objects 1..{len(self.objects)}", tag[0])
        if self.clip is not None:
            good = self.clip.ndim == 1 and self.clip.dtype == np.float16 and bool(np.isfinite(self.clip).all())
            _need(good, "clip", "a finite float16 vector", f"{self.clip.dtype} {self.clip.shape}")

    def to_json(self) -> bytes:
        """Everything but the picture and the embedding, as UTF-8 JSON; the same sample gives the same bytes."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "key": self.key,
            "height": self.height,
            "width": self.width,
            **{name: getattr(self, name) for name in _TEXTS},
            "objects": [each.to_dict() for each in self.objects],
        }
        return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes, *, image: bytes, image_format: str, clip: np.ndarray | None = None) -> "Sample":
        """The reverse of to_json. ValueError names the field that is missing or wrong."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"broken JSON: {error}") from None
        _need(isinstance(record, dict), "sample", "a JSON object", type(record).__name__)
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {brief(version)}, not {SCHEMA_VERSION}: pack the data set again")
        missing = {"key", "height", "width", "objects", *_TEXTS} - record.keys()
        _need(not missing, "sample", f"complete; missing: {', '.join(sorted(missing))}", sorted(record))
        _need(isinstance(record["objects"], list), "objects", "a list of records", type(record["objects"]).__name__)
        return cls(
            key=record["key"],
            image=image,
            image_format=image_format,  # type: ignore[arg-type]
            height=record["height"],
            width=record["width"],
            caption=record["caption"],
            question=record["question"],
            answer=record["answer"],
            objects=tuple(ObjectRecord.from_dict(each) for each in record["objects"]),
            source=record["source"],
            clip=clip,
        )


@dataclass(frozen=True, slots=True)
class Rejected:
    """A sample that a source leaves out: its key, a reason to count by, and what exactly is wrong with it."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Partly:
    """A sample without some of its objects, and why each of these was left out."""

    sample: Sample
    left_out: tuple[Rejected, ...]
