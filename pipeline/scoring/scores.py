"""What a report holds: its conditions, and every score with its label, its decimals and its meaning.

A task of one's own adds its scores with `add_scores`; tables show the scores in the order of `SCORES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONDITIONS = {
    "tuned": "the tuned model",
    "untuned": "the same model before tuning",
    "shuffled": "the tuned model, each question with another sample's picture (for pictures: another sample's text)",
    "teacher_forced": "the tuned model with the right answer as its past, as peers score it",
}


@dataclass(frozen=True, slots=True)
class Score:
    """How one score is shown: its task, a label, decimals, and one line on what it is."""

    task: str
    label: str
    digits: int
    meaning: str


_PER_OBJECT = "mean IoU per object (gIoU), Hungarian matching; missed and extra masks count 0"
_OVERALL = "summed intersections over summed unions (cIoU); missed and extra masks stand in the union"
_HITS = "share of objects with IoU of at least that; missed and extra masks are below"
_NAMES = "share of answers whose words name exactly the right objects"
TENTHS = (5, 6, 7, 8, 9)


def _segmentation(name: str, task: str) -> dict[str, Score]:
    scores = {
        f"{name}_miou": Score(task, "mIoU", 3, _PER_OBJECT),
        f"{name}_oiou": Score(task, "oIoU", 3, _OVERALL),
    }
    scores |= {f"{name}_p{tenth}0": Score(task, f"P@.{tenth}", 3, _HITS) for tenth in TENTHS}
    return scores | {f"{name}_object_accuracy": Score(task, "right objects named", 3, _NAMES)}


def _caption(label: str, meaning: str) -> Score:
    return Score("captioning", label, 3, meaning)


def _picture(label: str, meaning: str, digits: int = 3) -> Score:
    return Score("picture generation", label, digits, meaning)


SCORES: dict[str, Score] = {
    **_segmentation("referring", "referring segmentation"),
    **_segmentation("reasoning", "reasoning segmentation"),
    **{f"caption_bleu{n}": _caption(f"BLEU-{n}", f"corpus BLEU of up to {n}-grams") for n in (1, 2, 3, 4)},
    "caption_meteor": _caption("METEOR", "METEOR 1.5; needs java"),
    "caption_rouge_l": _caption("ROUGE-L", "mean F of the longest common subsequence"),
    "caption_cider": _caption("CIDEr", "CIDEr-D over this set of references; papers print it times 100"),
    "caption_object_f1": _caption("object F1", "F1 of the objects that the caption names"),
    "picture_fid": _picture("FID", "Fréchet distance of Inception features; needs --inception_weights", 2),
    "picture_kid": _picture("KID", "kernel distance of Inception features; papers print it times 1000", 4),
    "picture_is": _picture("IS", "Inception score over 10 splits (fewer of a few pictures)", 2),
    "picture_clip_frechet": _picture("CLIP Fréchet distance", "as FID, in the space of the run's own CLIP: no FID"),
    "picture_clip_kernel": _picture("CLIP kernel distance", "as KID, in the space of the run's own CLIP: no KID", 4),
    "picture_text_r1_of_50": _picture(
        "text R@1 of 50", "own text nearest to the picture among 50 texts, by CLIP; chance .020"
    ),
    "picture_clip_cosine": _picture("CLIP cosine", "mean CLIP cosine of picture and text"),
}


def add_scores(scores: Mapping[str, Score]) -> None:
    """Adds the scores of a task to every report. Raises ValueError for a name that is taken by another score."""
    taken = [name for name, score in scores.items() if SCORES.get(name, score) != score]
    if taken:
        raise ValueError(f"there are scores named {', '.join(taken)} already: choose other names")
    SCORES.update(scores)
