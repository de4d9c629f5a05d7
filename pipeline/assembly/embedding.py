"""A source whose samples carry the CLIP embedding of their picture, made while packing (`--clip_features`).

The embedding is of the whole picture squashed to CLIP's input, as in training, projected and not normalised, float16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.images import to_pixels
from pipeline.data.manifest import file_sha256
from pipeline.data.schema import Partly, Rejected, Sample
from pipeline.data.writer import Rows, Source, portion_of
from pipeline.model.vision import VisionTower


@lru_cache(maxsize=1)
def _tower(model: str, weights: str) -> VisionTower:
    """One per process: packing processes are spawned, and a tower is not sent to them."""
    torch.set_num_threads(1)
    return VisionTower.from_local(model, weights or None)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddedRows:
    """Rows of a source, with embeddings; small enough to send to a process."""

    rows: Rows
    model: str
    weights: str

    def load(self, split: str, i: int) -> Sample | Partly | Rejected:
        """Row i of the split, its picture embedded."""
        found = self.rows.load(split, i)
        if isinstance(found, Rejected):
            return found
        if isinstance(found, Partly):
            return Partly(self._embedded(found.sample), found.left_out)
        return self._embedded(found)

    def _embedded(self, sample: Sample) -> Sample:
        tower = _tower(self.model, self.weights)
        pixels = to_pixels(sample.image, image_size=tower.image_size, mean=tower.mean, std=tower.std)
        # One picture at a time: within a larger batch the last bits would depend on its neighbours.
        vector = tower(pixels[None]).embedding[0].float().numpy().astype(np.float16)
        return dataclasses.replace(sample, clip=vector)


class EmbeddedSource:
    """`source` with embeddings of the open_clip model `model` ("local-dir:PATH", or a name with its weights file).

    ValueError if the model does not load.
    """

    def __init__(self, source: Source, model: str, weights: str = "") -> None:
        self._source, self._model, self._weights = source, model, weights
        _tower(model, weights)
        folder = Path(model.removeprefix("local-dir:"))
        files = [Path(weights)] if weights else sorted(path for path in folder.iterdir() if path.is_file())
        self._files = {path.name: file_sha256(path) for path in files}

    def fingerprint(self) -> dict[str, Any]:
        """That of the source, and the model's files."""
        name = "local-dir" if self._model.startswith("local-dir:") else self._model
        return {**self._source.fingerprint(), "clip_features": {"model": name, "files": self._files}}

    def splits(self) -> list[str]:
        """Those of the source."""
        return self._source.splits()

    def keys(self, split: str) -> list[str]:
        """Those of the source."""
        return self._source.keys(split)

    def portion(self, split: str, indices: Sequence[int]) -> EmbeddedRows:
        """A source of these rows alone."""
        return EmbeddedRows(portion_of(self._source, split, indices), self._model, self._weights)

    def load(self, split: str, i: int) -> Sample | Partly | Rejected:
        """Row i of the split, its picture embedded."""
        return self.portion(split, [i]).load(split, i)
