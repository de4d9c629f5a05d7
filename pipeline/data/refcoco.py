"""RefCOCO, RefCOCO+, RefCOCOg and RefClef in the layout of the `refer` toolbox: `refs(<by>).p` and `instances.json`.

`refs(<by>).p` is a pickled list of {ref_id, ann_id, image_id, split, sentences: [{sent, raw, ...}], file_name, ...},
often written by Python 2. A ref's outline and box are those of the annotation `ann_id` in instances.json. A ref's own
file_name is not that of a picture (it has a number at its end) and is ignored.

One sample is one picture with all that is referred to in it in that split: an annotation with several refs is one
object with all their sentences. There are no captions and no questions: only the referring task can use these samples.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data.brief import brief
from pipeline.data.coco_json import PictureRow, PictureSource, Wanted, read_coco
from pipeline.data.manifest import file_sha256
from pipeline.data.objects import plain
from pipeline.data.unpickle import load_pickle

VERSION = 1
"""Of this reading of the files; part of the fingerprint. Raise it when the same files give other samples."""
_REFS = re.compile(r"refs\((?P<by>[A-Za-z0-9_]+)\)\.p")
_LETTERED = re.compile(r"test([A-Z]+)")


class RefcocoSource(PictureSource):
    """One data set of the family: `root` holds instances.json and refs(<by>).p, `image_root` the pictures.

    by: whose division into splits, as in `refs(unc).p`; may be "" where there is one file only. Splits are named as
    elsewhere here: `train`, `valid` (their `val`), `test`, and where test sets have letters `testA`, `testB`, `testC`.
    A ref of testA is one with an A after `test` in its label: `testAB` stands in both testA and testB.
    ValueError names what is missing and where to point the flags.
    """

    def __init__(self, root: str | Path, image_root: str | Path, by: str = "") -> None:
        root, image_root = Path(root), Path(image_root)
        for flag, folder in (("--refcoco_root", root), ("--image_root", image_root)):
            if not folder.is_dir():
                raise ValueError(f"{flag} {folder} is no folder: point it to where that part of the data set lies")
        refs, instances = _refs_file(root, by), root / "instances.json"
        if not instances.is_file():
            raise ValueError(f"{instances} is missing: --refcoco_root needs it beside {refs.name}")
        files = {path.name: file_sha256(path) for path in (refs, instances)}
        super().__init__(root.resolve().name.lower(), VERSION, image_root, files)
        self._instances = read_coco(instances)
        self._refs = _checked(load_pickle(refs, encoding="latin1"), refs)
        self._labels = sorted({ref["split"] for ref in self._refs})

    def splits(self) -> list[str]:
        """train, valid, then testA, testB, ... where test sets have letters, else test."""
        letters = sorted({letter for label in self._labels for letter in _letters(label)})
        plain_test = [label for label in self._labels if label.startswith("test") and not _letters(label)]
        tests = [f"test{letter}" for letter in letters] + (["test"] if plain_test else [])
        named = [name for name in ("train", "valid") if _label(name) in self._labels]
        known = {"train", "val", *(label for label in self._labels if label.startswith("test"))}
        return named + tests + [label for label in self._labels if label not in known]

    def make_rows(self, split: str) -> Iterable[PictureRow]:
        """A row per picture of the split, in the order of the pictures' ids."""
        pictures: dict[int, list[dict[str, Any]]] = {}
        for place, ref in enumerate(self._refs):
            if not _belongs(ref["split"], split):
                continue
            image_id = ref.get("image_id")
            if type(image_id) is not int or image_id not in self._instances.images:
                detail = f"ref {place}: instances.json has no picture of image_id {brief(image_id)}"
                yield PictureRow(image={}, problems=(("picture missing", detail),), source=self.name)
            else:
                pictures.setdefault(image_id, []).append(ref)
        for image_id in sorted(pictures):
            yield self._row(image_id, pictures[image_id])

    def _row(self, image_id: int, refs: list[dict[str, Any]]) -> PictureRow:
        problems: list[tuple[str, str]] = []
        sentences: dict[int, list[Any]] = {}
        for ref in refs:
            ann_id = ref.get("ann_id")
            annotation = self._instances.annotations.get(ann_id) if type(ann_id) is int else None
            where = f"ref {brief(ref.get('ref_id'), 20)}"
            if annotation is None:
                problems.append(("annotation missing", f"{where}: instances.json has no annotation {brief(ann_id)}"))
            elif annotation["image_id"] != image_id:
                problems.append(
                    ("annotation of another picture", f"{where}: annotation {ann_id} is of {annotation['image_id']}")
                )
            else:
                sentences.setdefault(annotation["id"], []).extend(_sentences(ref))
        return PictureRow(
            image=self._instances.images[image_id],
            wanted=tuple(self._wanted(ann_id, tuple(texts)) for ann_id, texts in sentences.items()),
            problems=tuple(problems),
            source=self.name,
        )

    def _wanted(self, ann_id: int, phrases: tuple[Any, ...]) -> Wanted:
        annotation = self._instances.annotations[ann_id]
        category = annotation.get("category_id")
        name = self._instances.categories.get(category, "") if type(category) is int else ""
        return Wanted(where=f"annotation {ann_id}", annotation=annotation, phrases=phrases, category=name)


def _refs_file(root: Path, by: str) -> Path:
    have = {found["by"]: path for path in sorted(root.iterdir()) if (found := _REFS.fullmatch(path.name))}
    if by:
        if by not in have:
            raise ValueError(f"--refcoco_by {by}: {root} has no refs({by}).p; it has: {', '.join(have) or 'none'}")
        return have[by]
    if len(have) == 1:
        return next(iter(have.values()))
    if have:
        raise ValueError(f"{root} has refs of several divisions; choose one with --refcoco_by: {', '.join(have)}")
    inner = [path.name for path in sorted(root.iterdir()) if (path / "instances.json").is_file()]
    hint = f"; it has the folders {', '.join(inner)}: name one of them" if inner else ""
    raise ValueError(f"--refcoco_root {root} holds no refs(<by>).p{hint}")


def _checked(refs: Any, path: Path) -> list[dict[str, Any]]:
    if not isinstance(refs, list | tuple):
        raise ValueError(f"{path} must hold a list of refs, found {type(refs).__name__}")
    found = []
    for place, ref in enumerate(refs):
        if not isinstance(ref, dict) or not isinstance(ref.get("split"), str) or not ref["split"].isalnum():
            raise ValueError(f"{path}, entry {place}: must be a record with a text `split`, found {brief(ref)}")
        found.append({name: plain(value) for name, value in ref.items()})
    return found


def _sentences(ref: dict[str, Any]) -> list[Any]:
    sentences = ref.get("sentences")
    if not isinstance(sentences, list | tuple):
        return []
    return [_sentence(each) for each in sentences if isinstance(each, dict)]


def _sentence(record: dict[str, Any]) -> Any:
    """`sent`, or `raw` where that is missing or blank; checked by who uses it."""
    sent = record.get("sent", "")
    return record.get("raw", "") if isinstance(sent, str) and not sent.strip() else sent


def _letters(label: str) -> str:
    found = _LETTERED.fullmatch(label)
    return found[1] if found else ""


def _label(split: str) -> str:
    return "val" if split == "valid" else split


def _belongs(label: str, split: str) -> bool:
    """Whether a ref labelled `label` is of our `split`."""
    wanted = _letters(split)
    return wanted in _letters(label) if len(wanted) == 1 else label == _label(split)
