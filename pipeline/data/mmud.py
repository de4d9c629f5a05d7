"""MMUD as published: `<split>.pkl` or `<split>_withlength.pkl`, and a folder of pictures.

A source offers fingerprint(), splits(), keys(split) and load(split, i); the writer asks nothing else of it. portion()
is optional: it gives a worker process only the rows it packs instead of a whole pickle each.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import mmud_rows
from pipeline.data.files import picture_sizes, read_picture, unique_keys
from pipeline.data.manifest import digest_of, file_sha256
from pipeline.data.objects import RowError
from pipeline.data.schema import Rejected, Sample
from pipeline.data.unpickle import load_pickle

VERSION = 1
"""Of this reading of the files; part of the fingerprint. Raise it when the same files give other samples."""
SPLITS = ("train", "valid", "test")
_FORMS = ("{split}_withlength.pkl", "{split}.pkl")


def _image_paths(rows: Sequence[Any]) -> list[str]:
    """The image_path of each row, "" where a row is none."""
    names = []
    for row in rows:
        try:
            names.append(mmud_rows.image_path_of(row))
        except RowError:
            names.append("")
    return names


class MmudRows:
    """Some rows of one split, with all that is needed to make samples of them. Small enough to send to a process."""

    def __init__(
        self, split: str, rows: dict[int, Any], keys: dict[int, str], image_root: Path, clip_root: Path | None
    ) -> None:
        self._split, self._rows, self._keys = split, rows, keys
        self._image_root, self._clip_root = image_root, clip_root

    def load(self, split: str, i: int) -> Sample | Rejected:
        """Row i of the split."""
        assert split == self._split
        row, key = self._rows[i], self._keys[i]
        try:
            path, image = read_picture(self._image_root, mmud_rows.image_path_of(row))
            clip = self._clip(path.stem)
        except RowError as error:
            return Rejected(key, error.reason, str(error))
        return mmud_rows.to_sample(row, key=key, image=image, clip=clip)

    def _clip(self, stem: str) -> np.ndarray | None:
        """The picture's embedding from `<clip_root>/<stem>.pkl`: a numpy array or list of E numbers."""
        if self._clip_root is None:
            return None
        path = self._clip_root / f"{stem}.pkl"
        try:
            vector = np.asarray(load_pickle(path, max_bytes=2**20), dtype=np.float32).reshape(-1).astype(np.float16)
        except (ValueError, TypeError) as error:
            raise RowError("clip embedding unreadable", f"{path.name}: {error}") from None
        if not vector.size or not np.isfinite(vector).all():
            raise RowError("clip embedding unreadable", f"{path.name}: empty, or not finite in float16")
        return vector


class MmudSource:
    """MMUD under `root` (the pickles), `image_root` (the pictures) and, if there are any, `clip_root` (embeddings).

    ValueError names what is missing and where to point the flags.
    """

    name = "mmud"

    def __init__(self, root: str | Path, image_root: str | Path, clip_root: str | Path | None = None) -> None:
        self._root, self._image_root = Path(root), Path(image_root)
        self._clip_root = Path(clip_root) if clip_root else None
        for flag, folder in (
            ("--mmud_root", self._root),
            ("--image_root", self._image_root),
            ("--clip_root", self._clip_root),
        ):
            if folder is not None and not folder.is_dir():
                raise ValueError(f"{flag} {folder} is no folder: point it to where that part of MMUD lies")
        self._files = {split: file for split in SPLITS if (file := self._find(split))}
        if not self._files:
            raise ValueError(
                f"--mmud_root {self._root} holds none of {', '.join(f'{split}.pkl' for split in SPLITS)} nor "
                "their _withlength.pkl forms: point it to the folder with MMUD's pickles"
            )
        self._rows: dict[str, list[Any]] = {}
        self._all_keys: dict[str, list[str]] = {}
        self._fingerprint: dict[str, Any] | None = None

    def _find(self, split: str) -> Path | None:
        return next((path for form in _FORMS if (path := self._root / form.format(split=split)).is_file()), None)

    def splits(self) -> list[str]:
        """The splits whose pickle is there."""
        return list(self._files)

    def _load_rows(self, split: str) -> list[Any]:
        if split not in self._files:
            raise ValueError(f"--mmud_root {self._root} has no pickle of the split '{split}', only of {self.splits()}")
        if split not in self._rows:
            rows = load_pickle(self._files[split])
            if not isinstance(rows, list | tuple):
                raise ValueError(f"{self._files[split]} must hold a list of 12-tuples, found {type(rows).__name__}")
            self._rows[split] = list(rows)
            self._all_keys[split] = unique_keys(_image_paths(rows))
        return self._rows[split]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples: the pickles' hashes, and names and sizes of the pictures found for them."""
        if self._fingerprint is None:
            self._fingerprint = {
                "source": self.name,
                "version": VERSION,
                "pickles": {split: file_sha256(path) for split, path in self._files.items()},
                "pictures": digest_of(
                    [picture_sizes(self._image_root, _image_paths(self._load_rows(split))) for split in self._files]
                ),
                "clip": self._clip_root is not None,
            }
        return self._fingerprint

    def keys(self, split: str) -> list[str]:
        """The key of each row, in the pickle's order."""
        self._load_rows(split)
        return self._all_keys[split]

    def portion(self, split: str, indices: Sequence[int]) -> MmudRows:
        """A source of these rows alone."""
        rows, keys = self._load_rows(split), self._all_keys.get(split, [])
        return MmudRows(
            split,
            {i: rows[i] for i in indices},
            {i: keys[i] for i in indices},
            self._image_root,
            self._clip_root,
        )

    def load(self, split: str, i: int) -> Sample | Rejected:
        """Row i of the split."""
        return self.portion(split, [i]).load(split, i)

    def iterate(self, split: str) -> Iterator[Sample | Rejected]:
        """All rows, in the pickle's order."""
        return (self.load(split, i) for i in range(len(self.keys(split))))
