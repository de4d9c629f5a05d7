"""COCO's captions and instances: `annotations/{captions,instances}_{train,val}<year>.json` and the pictures.

One sample is one picture: its captions joined, as MMUD has them, and as objects those that are the only one of their
category in the picture, so that their category's name refers to them alone. Crowds and others are left out and counted.
What it is for is the picture prior: captions and pictures.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data.brief import brief
from pipeline.data.coco_json import CocoFile, PictureRow, PictureSource, Wanted, read_coco
from pipeline.data.manifest import file_sha256

VERSION = 1
"""Of this reading of the files; part of the fingerprint. Raise it when the same files give other samples."""
_FILE = re.compile(r"(?P<kind>captions|instances)_(?P<part>train|val)(?P<year>[0-9]{4})\.json")
_SPLITS = {"train": "train", "val": "valid"}


class CocoSource(PictureSource):
    """COCO under `root` (the JSON files, or a folder `annotations` with them) and `image_root` (the pictures).

    year: which release's files; may be "" where there is one only. A split needs captions or instances or both.
    ValueError names what is missing and where to point the flags.
    """

    def __init__(self, root: str | Path, image_root: str | Path, year: str = "") -> None:
        root, image_root = Path(root), Path(image_root)
        for flag, folder in (("--coco_root", root), ("--image_root", image_root)):
            if not folder.is_dir():
                raise ValueError(f"{flag} {folder} is no folder: point it to where that part of COCO lies")
        folder = root / "annotations" if (root / "annotations").is_dir() else root
        found = [match for path in sorted(folder.iterdir()) if (match := _FILE.fullmatch(path.name))]
        years = sorted({match["year"] for match in found})
        if not years or (year and year not in years):
            raise ValueError(
                f"--coco_root {root} holds no captions_train{year or 2017}.json or instances_train{year or 2017}.json"
                + (f"; it has the years {', '.join(years)}" if years else "")
            )
        if not year and len(years) > 1:
            raise ValueError(f"{root} has files of several years; choose one with --coco_year: {', '.join(years)}")
        chosen = [match for match in found if match["year"] == (year or years[0])]
        files = {match[0]: file_sha256(folder / match[0]) for match in chosen}
        super().__init__("coco", VERSION, image_root, files)
        self._paths: dict[str, dict[str, Path]] = defaultdict(dict)
        for match in chosen:
            self._paths[_SPLITS[match["part"]]][match["kind"]] = folder / match[0]

    def splits(self) -> list[str]:
        """train and valid (COCO's val), those that are there."""
        return [split for split in _SPLITS.values() if split in self._paths]

    def make_rows(self, split: str) -> Iterable[PictureRow]:
        """A row per picture of the split, in the order of the pictures' ids."""
        files = {kind: read_coco(path) for kind, path in self._paths[split].items()}
        images = {number: image for file in files.values() for number, image in file.images.items()}
        captions = _by_image(files.get("captions"))
        instances = _by_image(files.get("instances"))
        names = files["instances"].categories if "instances" in files else {}
        for number in sorted(images):
            wanted, problems = _objects(instances.get(number, []), names)
            yield PictureRow(
                image=images[number],
                caption=_joined(captions.get(number, [])),
                wanted=wanted,
                problems=problems,
                source=self.name,
            )


def _by_image(file: CocoFile | None) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number in sorted(file.annotations) if file else []:
        assert file
        found[file.annotations[number]["image_id"]].append(file.annotations[number])
    return found


def _joined(captions: list[dict[str, Any]]) -> str:
    texts = [" ".join(text.split()) for each in captions if isinstance(text := each.get("caption"), str)]
    return " ".join(text if text.endswith((".", "!", "?")) else text + "." for text in texts if text)


def _objects(
    annotations: list[dict[str, Any]], names: dict[int, str]
) -> tuple[tuple[Wanted, ...], tuple[tuple[str, str], ...]]:
    wanted: list[Wanted] = []
    problems: list[tuple[str, str]] = []
    kinds = [each.get("category_id") for each in annotations]
    counts = Counter(kind for kind in kinds if type(kind) is int)
    for each, kind in zip(annotations, kinds, strict=True):
        where = f"annotation {each['id']}"
        if type(kind) is not int or kind not in names:
            problems.append(("unknown category", f"{where}: category_id {brief(kind)}"))
        elif each.get("iscrowd"):
            problems.append(("a crowd", f"{where}: {names[kind]}"))
        elif counts[kind] > 1:
            problems.append(("not the only one of its kind", f"{where}: {counts[kind]} x {names[kind]}"))
        else:
            wanted.append(Wanted(where=where, annotation=each, phrases=(f"the {names[kind]}",), category=names[kind]))
    return tuple(wanted), tuple(problems)
