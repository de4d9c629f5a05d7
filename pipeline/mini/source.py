"""The mini world as a data source: scenes in MMUD's schema, drawn on demand from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.data import rle
from pipeline.data.schema import ObjectRecord, Sample
from pipeline.mini import scenes
from pipeline.mini.questions import choose_question, referring_phrases

VERSION = 1
"""Part of the fingerprint: raise it when the same seed draws other scenes, words or pictures than before."""

DEFAULT_SIZES = {"train": 16_000, "valid": 400, "test": 500}


class MiniSource:
    """Scenes of the splits that `sizes` names; sample i of a split is a pure function of (seed, split, i)."""

    name = "mini"

    def __init__(self, sizes: dict[str, int] | None = None, seed: int = 0) -> None:
        self.sizes = dict(sizes or DEFAULT_SIZES)
        self.seed = seed
        unknown = set(self.sizes) - set(scenes.SPLITS)
        if unknown:
            raise ValueError(
                f"the mini world has the splits {', '.join(scenes.SPLITS)}, not {', '.join(sorted(unknown))}"
            )

    def fingerprint(self) -> dict[str, object]:
        """What decides every byte of the samples."""
        return {"source": "mini", "version": VERSION, "seed": self.seed, "sizes": self.sizes}

    def splits(self) -> list[str]:
        return list(self.sizes)

    def keys(self, split: str) -> list[str]:
        return [self.keys_at(split, i) for i in range(self.sizes[split])]

    def load(self, split: str, index: int) -> Sample:
        """Draws one scene, with its caption, one reasoning question-answer, and phrases, box and mask per object."""
        scene = scenes.scene_at(split, index, self.seed)
        qa = choose_question(scene, np.random.default_rng([self.seed, scenes.SPLITS.index(split), index, 9]))
        objects = []
        for i, o in enumerate(scene.objects):
            mask = scenes.object_mask(o)
            ys, xs = np.nonzero(mask)
            objects.append(
                ObjectRecord(
                    phrases=tuple(referring_phrases(scene, i)),
                    box=(float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)),
                    mask=rle.encode(mask),
                    category=o.text,
                )
            )
        return Sample(
            key=self.keys_at(split, index),
            image=scenes.encode_jpeg(scenes.render(scene)),
            image_format="jpg",
            height=scenes.SIDE,
            width=scenes.SIDE,
            caption=scene.caption(),
            question=qa.question,
            answer=qa.answer,
            objects=tuple(objects),
            clip=None,
            source="mini",
        )

    @staticmethod
    def keys_at(split: str, index: int) -> str:
        return f"mini-{split}-{index:06d}"


def foundation_folder() -> Path:
    """models/mini of this checkout: where the tracked foundation weights lie."""
    return Path(__file__).resolve().parents[2] / "models" / "mini"
