"""COCO's JSON files, and samples made of pictures that such files describe (RefCOCO's family and COCO itself).

`instances_*.json` and `captions_*.json` are {"images": [{id, file_name, height, width}], "annotations": [{id,
image_id, ...}], "categories": [{id, name}]}; instances have `category_id`, `bbox` (x, y, width, height) and
`segmentation`: a list of polygons, an RLE, a list of RLEs, or [] for an object that nobody outlined.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.brief import brief
from pipeline.data.files import picture_sizes, read_picture, unique_keys
from pipeline.data.manifest import digest_of
from pipeline.data.objects import RowError, box_of, mask_of, picture_of, plain, text_of
from pipeline.data.schema import ObjectRecord, Partly, Rejected, Sample

MAX_BYTES = 4 * 2**30
"""Largest annotation file that is read; COCO's instances_train2017.json has 449 MB."""
MOST_OBJECTS = 200
MOST_PHRASES = 1_000


@dataclass(frozen=True, slots=True)
class CocoFile:
    """images, annotations: id -> record as it stands in the file; categories: id -> name."""

    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, str]


def read_coco(path: Path) -> CocoFile:
    """The file at `path`, its records by id. ValueError names the file, the entry and the field that is wrong."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the limit of {MAX_BYTES}: is it the right file?")
    try:
        found = json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON: {str(error)[:100]}; copy it again") from None
    except MemoryError:
        raise ValueError(f"{path} asks for more memory than there is: it is damaged or malicious") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold one JSON object, found {type(found).__name__}: is it COCO's?")
    categories = _by_id(found.get("categories", []), path, "categories", {"name": str})
    return CocoFile(
        images=_by_id(found.get("images"), path, "images", {"file_name": str}),
        annotations=_by_id(found.get("annotations"), path, "annotations", {"image_id": int}),
        categories={number: record["name"] for number, record in categories.items()},
    )


def _by_id(records: Any, path: Path, part: str, fields: dict[str, type]) -> dict[int, dict[str, Any]]:
    if not isinstance(records, list):
        raise ValueError(f"{path}, field '{part}': must be a list, found {type(records).__name__}")
    found: dict[int, dict[str, Any]] = {}
    for place, record in enumerate(records):
        where = f"{path}, {part}[{place}]"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: must be a record, found {type(record).__name__}")
        for field, kind in {"id": int, **fields}.items():
            if type(record.get(field)) is not kind:
                raise ValueError(f"{where}, field '{field}': must be {kind.__name__}, found {brief(record.get(field))}")
        if record["id"] in found:
            raise ValueError(f"{where}, field 'id': {record['id']} comes twice")
        found[record["id"]] = record
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An object that a sample shall have: its annotation, phrases and category. `where` names it in messages."""

    where: str
    annotation: dict[str, Any]
    phrases: tuple[Any, ...]
    category: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRow:
    """What the annotations say of one picture.

    image     its record in the JSON file; empty where a row is known to be useless, then `problems` says why
    problems  (reason, detail) of each object that was left out already while joining
    """

    image: dict[str, Any]
    wanted: tuple[Wanted, ...] = ()
    caption: str = ""
    problems: tuple[tuple[str, str], ...] = ()
    source: str

    @property
    def file_name(self) -> str:
        """The picture's name, "" if the row has none."""
        return str(self.image.get("file_name", ""))


def to_sample(row: PictureRow, *, key: str, image: bytes) -> Sample | Partly | Rejected:
    """The Sample of a row and its picture's bytes; objects that cannot be used are left out one by one."""
    try:
        height, width, image_format = picture_of(image)
        said = [row.image.get(name, here) for name, here in (("height", height), ("width", width))]
        if said != [height, width]:
            raise RowError(
                "picture of another size", f"the annotations are of {said} (height, width), it has {[height, width]}"
            )
        caption = text_of(row.caption, "caption")
        problems, objects = list(row.problems), []
        for wanted in row.wanted:
            try:
                objects.append(_record(wanted, height, width))
            except RowError as error:
                problems.append((error.reason, str(error)))
            except ValueError as error:
                problems.append(("row malformed", f"{wanted.where}: {error}"))
        if len(objects) > MOST_OBJECTS:
            raise RowError("row malformed", f"{len(objects)} objects, more than {MOST_OBJECTS}")
        if not objects and not caption.strip():
            raise RowError("no object left", "; ".join(f"{reason}: {detail}" for reason, detail in problems)[:500])
        sample = Sample(
            key=key,
            image=image,
            image_format=image_format,  # type: ignore[arg-type]
            height=height,
            width=width,
            caption=caption.strip(),
            question="",
            answer="",
            objects=tuple(objects),
            source=row.source,
        )
    except RowError as error:
        return Rejected(key, error.reason, str(error))
    except ValueError as error:
        return Rejected(key, "row malformed", str(error))
    left_out = tuple(Rejected(key, f"object: {reason}", detail) for reason, detail in problems)
    return Partly(sample, left_out) if left_out else sample


def _record(wanted: Wanted, height: int, width: int) -> ObjectRecord:
    phrases = [" ".join(text_of(plain(text), wanted.where).split()) for text in wanted.phrases[:MOST_PHRASES]]
    phrases = list(dict.fromkeys(phrase for phrase in phrases if phrase))
    if not phrases:
        raise RowError("no phrase", f"{wanted.where}: no sentence refers to it")
    mask = mask_of(wanted.annotation.get("segmentation"), wanted.where, height, width)
    return ObjectRecord(
        phrases=tuple(phrases),
        box=box_of(wanted.annotation.get("bbox"), mask, height, width),
        mask=mask,
        category=wanted.category.strip() or "object",
    )


class PictureRows:
    """Some rows of one split, with all that is needed to make samples of them. Small enough to send to a process."""

    def __init__(self, split: str, rows: dict[int, PictureRow], keys: dict[int, str], image_root: Path) -> None:
        self._split, self._rows, self._keys, self._image_root = split, rows, keys, image_root

    def load(self, split: str, i: int) -> Sample | Partly | Rejected:
        """Row i of the split."""
        assert split == self._split
        row, key = self._rows[i], self._keys[i]
        if not row.image:
            return Rejected(key, *row.problems[0])
        try:
            _, image = read_picture(self._image_root, row.file_name)
        except RowError as error:
            return Rejected(key, error.reason, str(error))
        return to_sample(row, key=key, image=image)


class PictureSource:
    """A source whose samples are PictureRows: what RefcocoSource and CocoSource share. `files`: name -> sha256."""

    def __init__(self, name: str, version: int, image_root: Path, files: dict[str, str]) -> None:
        self.name, self._version, self._image_root, self._files = name, version, image_root, files
        self._made: dict[str, list[PictureRow]] = {}
        self._all_keys: dict[str, list[str]] = {}

    def splits(self) -> list[str]:
        """The splits that can be asked for."""
        raise NotImplementedError

    def make_rows(self, split: str) -> Iterable[PictureRow]:
        """All rows of a split, in a fixed order."""
        raise NotImplementedError

    def rows(self, split: str) -> list[PictureRow]:
        """All rows of a split, made once."""
        if split not in self._made:
            if split not in self.splits():
                raise ValueError(f"{self.name} has no split '{split}', only: {', '.join(self.splits())}")
            self._made[split] = list(self.make_rows(split))
            self._all_keys[split] = unique_keys([row.file_name for row in self._made[split]])
        return self._made[split]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples: the annotation files' hashes, and names and sizes of the pictures."""
        names = {row.file_name for split in self.splits() for row in self.rows(split) if row.file_name}
        return {
            "source": self.name,
            "version": self._version,
            "files": self._files,
            "pictures": digest_of(picture_sizes(self._image_root, sorted(names))),
        }

    def keys(self, split: str) -> list[str]:
        """The key of each row."""
        self.rows(split)
        return self._all_keys[split]

    def portion(self, split: str, indices: Sequence[int]) -> PictureRows:
        """A source of these rows alone."""
        rows = self.rows(split)
        keys = self._all_keys[split]
        return PictureRows(split, {i: rows[i] for i in indices}, {i: keys[i] for i in indices}, self._image_root)

    def load(self, split: str, i: int) -> Sample | Partly | Rejected:
        """Row i of the split."""
        return self.portion(split, [i]).load(split, i)
