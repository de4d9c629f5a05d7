"""The contact sheet's cards of answers."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.data import rle
from pipeline.data.images import load
from pipeline.data.loader import SampleSource
from pipeline.scoring.contact_sheet import CaptionCard, MaskCard, PictureCard, Section
from pipeline.scoring.masks import score_masks
from pipeline.scoring.predictions import Prediction

HEADINGS = {
    "reasoning": ("Reasoning segmentation", "a question about the picture; the answer names and marks its objects"),
    "referring": ("Referring segmentation", "phrases in, masks out"),
    "caption": ("Captioning", "the model's caption, the true one in grey"),
    "generation": ("Text-to-image", "the picture drawn for the text, and the one that the text describes"),
}


def contact_sections(predictions: Sequence[Prediction], dataset: SampleSource, per_task: int = 10) -> list[Section]:
    """The first answers of each task as sections of cards, in the split's order, good and bad alike."""
    sections = []
    for task, (heading, note) in HEADINGS.items():
        some = [p for p in predictions if p.task == task][:per_task]
        cards = [_card(p, np.asarray(load(dataset[p.reference["index"]].image))) for p in some]
        if cards:
            sections.append(Section(heading=heading, note=note, cards=cards))
    return sections


def _card(p: Prediction, picture: np.ndarray) -> MaskCard | CaptionCard | PictureCard:
    if p.task == "caption":
        return CaptionCard(picture=picture, caption=p.text, reference=p.reference["caption"])
    if p.task == "generation":
        drawn = None if p.picture is None else np.asarray(Image.open(io.BytesIO(p.picture)).convert("RGB"))
        return PictureCard(picture=drawn, text=p.reference["caption"], reference=picture)
    iou = score_masks([p.masks], [p.reference["masks"]])["miou"]
    height, width = p.reference["size"]
    return MaskCard(
        # Masks are of the picture's own size; the picture was shrunk if it was packed with --resize.
        picture=np.asarray(Image.fromarray(picture).resize((width, height))),
        predicted=[None if m is None else rle.decode(m).astype(bool) for m in p.masks],
        true=[rle.decode(m).astype(bool) for m in p.reference["masks"]],
        question=p.reference["question"],
        answer=p.text,
        iou=iou,
    )
