"""Every score of an evaluation from its predictions, task by task. No model is needed here.

A task is scored by the function that `SCORERS` holds for it; `add_scorer` enters that of a task of one's own. Answers
are put in the split's order first, so that the figures do not depend on the ranks and batches that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data import rle
from pipeline.scoring.bootstrap import Bootstrap, Interval
from pipeline.scoring.captions import METRICS, score_captions
from pipeline.scoring.distributions import frechet_distance, inception_score, kernel_distance
from pipeline.scoring.masks import EMPTIES, MATCHINGS, mask_intervals, score_images, score_masks
from pipeline.scoring.objects import object_f1, read_counts
from pipeline.scoring.pictures import cosines, retrieval_credits, score_pictures
from pipeline.scoring.predictions import PictureFeatures, Prediction
from pipeline.scoring.scores import SCORES, TENTHS, Score, add_scores

Parse = Callable[[str], Iterable[Hashable]]
GROUP = 50
"""Texts among which a picture has to find its own."""
CUT = "answers that met max_new_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How answers are scored.

    full_name, colour_shape: read object names in a text (the mini world's grammar); None where a data set has no closed
    vocabulary, and the figures that need them are None then. seed: of the texts a picture is ranked among, of KID's
    subsets and IS's splits. one_mask: an answer's masks count as one, their union, as where each phrase is asked for
    alone (RefCOCO: one mask for each phrase).
    """

    tasks: tuple[str, ...]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    seed: int = 0
    one_mask: bool = False
    full_name: Parse | None = None
    colour_shape: Parse | None = None


@dataclass(slots=True)
class Scored:
    """figures: the report's scores, None where one cannot be had. intervals: of those that have one. details: all else
    that the scorers said, conventions included."""

    figures: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, Interval | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, value: float | None, interval: Interval | None = None) -> None:
        """Enters one score of `SCORES`."""
        self.figures[name] = value
        if value is not None and interval is not None:
            self.intervals[name] = interval


Scorer = Callable[[list[Prediction], Rules, PictureFeatures | None, str], Scored]
"""(a task's predictions, at least one; rules; features of its pictures; condition) -> scores."""


def score_predictions(
    predictions: Sequence[Prediction], features: PictureFeatures | None, rules: Rules, condition: str
) -> Scored:
    """Every score of one condition; those of tasks without predictions are None.

    features: row by row with the predictions of picture generation, in their order here.
    """
    total = Scored(figures=dict.fromkeys(SCORES))
    for task in rules.tasks:
        some = [p for p in predictions if p.task == task]
        if some and task in SCORERS:
            found = SCORERS[task](some, rules, features, condition)
            total.figures |= found.figures
            total.intervals |= found.intervals
            cut = [p.cut for p in some]
            total.details[task] = {**found.details, CUT: None if None in cut else sum(map(bool, cut))}
    return total


def add_scorer(task: str, scores: Mapping[str, Score], scorer: Scorer) -> None:
    """Enters a task's scores (name -> how it is shown) and the function that makes them."""
    add_scores(scores)
    SCORERS[task] = scorer


def score_segmentation(some: list[Prediction], rules: Rules, _: PictureFeatures | None, condition: str) -> Scored:
    """Masks of a segmentation task, and whether its words name the right objects. With `one_mask` an answer in two
    pieces is one mask, so that neither counts as a mask too many."""
    scored, task = Scored(), some[0].task
    predicted, true = [p.masks for p in some], [p.reference["masks"] for p in some]
    if rules.one_mask:
        given = [[mask for mask in masks if mask is not None] for masks in predicted]
        predicted = [[rle.union(masks)] if masks else [] for masks in given]
    intervals = mask_intervals(predicted, true, rules.bootstrap)
    every = {(m, e): score_masks(predicted, true, matching=m, empty=e) for m in MATCHINGS for e in EMPTIES}
    head = every["hungarian", "zero"]
    names = {"miou": "miou", "oiou": "oiou"} | {f"p_at_0.{tenth}": f"p{tenth}0" for tenth in TENTHS}
    for theirs, ours in names.items():
        scored.put(f"{task}_{ours}", head[theirs], intervals[theirs])
    scored.details["objects"] = {f"{m} matching, two empty masks count {e}": found for (m, e), found in every.items()}
    scored.details["images"] = score_images(predicted, true)
    scored.put(f"{task}_object_accuracy", None)
    if rules.full_name is not None:
        gold = [rules.full_name(" ".join(p.reference["names"])) for p in some]
        counts = read_counts([rules.full_name(p.text) for p in some], gold)
        right = [float(named == there == both) for named, there, both in counts]
        scored.put(f"{task}_object_accuracy", sum(right) / len(right), rules.bootstrap.of_mean(right))
    return scored


def score_captioning(some: list[Prediction], rules: Rules, _: PictureFeatures | None, condition: str) -> Scored:
    """Captions of the whole set, and the objects they name."""
    scored = Scored()
    # By place: keys are unique within one data set only, and a split may be of several.
    truths = {i: [p.reference["caption"]] for i, p in enumerate(some)}
    found = score_captions(truths, {i: p.text for i, p in enumerate(some)}, bootstrap=rules.bootstrap)
    for name in METRICS:
        scored.put(f"caption_{name}", found[name], found["intervals"].get(name))
    scored.details = {name: found[name] for name in ("samples", "tokenizer", "missing", "bleu_counts")}
    scored.put("caption_object_f1", None)
    if rules.colour_shape is not None:
        named = [list(rules.colour_shape(p.text)) for p in some]
        gold = [list(rules.colour_shape(p.reference["caption"])) for p in some]
        counts = np.array(read_counts(named, gold))
        interval = rules.bootstrap.of_ratio(2 * counts[:, 2], counts[:, 0] + counts[:, 1])
        scored.put("caption_object_f1", object_f1(named, gold)["f1"], interval)
    return scored


def score_generation(some: list[Prediction], rules: Rules, features: PictureFeatures | None, condition: str) -> Scored:
    """Drawn pictures by their features; a text whose answer holds no <GEN> has a grey picture.

    "shuffled" pairs each text with another one's picture; of fewer than two there is no other. The set of pictures is
    the same then, so that the distances between sets say nothing and are None.
    """
    scored = Scored()
    if features is None or (condition == "shuffled" and len(some) < 2):
        return scored
    assert len(features.clip_pictures) == len(some)
    shown, texts = features.clip_pictures, features.clip_texts
    if condition == "shuffled":
        shown = np.roll(shown, len(some) // 2, axis=0)
    found = score_pictures(shown, texts, group=GROUP, seed=rules.seed)
    hits = retrieval_credits(shown, texts, group=GROUP, seed=rules.seed) if len(some) >= GROUP else []
    scored.put(f"picture_text_r1_of_{GROUP}", found["text_r1"], rules.bootstrap.of_mean(hits))
    scored.put("picture_clip_cosine", found["clip_cosine"], rules.bootstrap.of_mean(cosines(shown, texts)))
    scored.details = {"group": found["group"], "samples": found["samples"]}
    scored.details["without a picture"] = sum(p.picture is None for p in some)
    if condition == "shuffled":
        return scored
    kernel = kernel_distance(features.clip_true, shown, seed=rules.seed)
    scored.put("picture_clip_frechet", frechet_distance(features.clip_true, shown))
    scored.put("picture_clip_kernel", kernel["mean"])
    scored.details["CLIP kernel distance"] = kernel
    if features.pool is not None and features.pool_true is not None and features.logits is not None:
        kid = kernel_distance(features.pool_true, features.pool, seed=rules.seed)
        inception = inception_score(features.logits, seed=rules.seed)
        scored.put("picture_fid", frechet_distance(features.pool_true, features.pool))
        scored.put("picture_kid", kid["mean"])
        scored.put("picture_is", inception["mean"])
        scored.details |= {"KID": kid, "IS": inception}
    else:
        scored.details["missing"] = (
            "FID, KID and IS: the answers were saved without Inception's features (--inception_weights)"
        )
    return scored


SCORERS: dict[str, Scorer] = {
    "referring": score_segmentation,
    "reasoning": score_segmentation,
    "caption": score_captioning,
    "generation": score_generation,
}
