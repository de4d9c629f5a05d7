"""Segmentation scores from run-length encoded masks: mIoU (gIoU), oIoU (cIoU) and precision at IoU .5 to .9.

Areas and intersections are summed as integers and IoUs with an exactly rounded sum, so the result does not depend on
the order of the samples and is the same however many ranks made the predictions. Gather predictions, then score;
scores of ranks are never averaged.

Conventions, both named in the result:

- matching "hungarian": within a sample, predicted and true masks are paired one to one so that the sum of IoUs is
  largest; "index": the i-th predicted mask belongs to the i-th true one (the token <OBJ-i> carries i).
- What has no partner (a missed object, a mask too many) counts as one object of IoU 0, its area goes into the union. An
  object is therefore counted max(predicted, true) times per sample.
- empty "zero": a pair of two empty masks has IoU 0 (the paper's released code); "one": it has IoU 1 (LISA). An empty
  mask without a partner has IoU 0 either way.

`score_images` judges pictures instead of objects: the mean over pictures of what their objects reach, and, as gRefCOCO
does, all predicted masks of a picture as one against all true ones, where a picture may hold no target at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from pipeline.data import rle
from pipeline.scoring.bootstrap import Bootstrap, Interval

RLE = dict[str, Any]
MATCHINGS = ("hungarian", "index")
EMPTIES = ("zero", "one")
THRESHOLDS = (5, 6, 7, 8, 9)
"""Tenths of IoU at which precision is counted; the comparison is `intersection / union >= t`, in integers."""


@dataclass(frozen=True, slots=True)
class MaskPair:
    """One object of one sample: a predicted mask beside a true one, or either alone.

    predicted, target: positions in the sample's lists, None where there is no partner.
    intersection, union: pixels.
    """

    predicted: int | None
    target: int | None
    intersection: int
    union: int

    @property
    def matched(self) -> bool:
        """Whether both masks are there."""
        return self.predicted is not None and self.target is not None

    @property
    def iou(self) -> float:
        """Intersection over union; 0 for two empty masks."""
        return self.intersection / self.union if self.union else 0.0


def _overlaps(predicted: Sequence[RLE], targets: Sequence[RLE]) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union of every pair in pixels, int64 [P,T]."""
    sizes = {tuple(mask["size"]) for mask in (*predicted, *targets)}
    if len(sizes) > 1:
        raise ValueError(
            f"masks of one sample have different sizes (height, width): {sorted(sizes)}; "
            "bring the predicted masks to the picture's full size before scoring"
        )
    both = np.array([[rle.intersection(p, t) for t in targets] for p in predicted], dtype=np.int64)
    both = both.reshape(len(predicted), len(targets))
    areas_p = np.array([rle.area(mask) for mask in predicted], dtype=np.int64)
    areas_t = np.array([rle.area(mask) for mask in targets], dtype=np.int64)
    return both, areas_p[:, None] + areas_t[None, :] - both


def match_masks(
    predicted: Sequence[RLE | None], targets: Sequence[RLE], *, matching: str = "hungarian"
) -> list[MaskPair]:
    """Pair one sample's predicted masks with its true ones.

    predicted: in the order of their tokens; None keeps the place of an <OBJ-i> that the model did not give.
    Returns first the matched pairs by target, then targets without a prediction, then predictions without a target.
    Raises ValueError for an unknown matching and for masks of different sizes.
    """
    if matching not in MATCHINGS:
        raise ValueError(f"matching is {matching!r}; choose one of {', '.join(MATCHINGS)}")
    given = [(place, mask) for place, mask in enumerate(predicted) if mask is not None]
    places = [place for place, _ in given]
    both_PT, either_PT = _overlaps([mask for _, mask in given], targets)
    if matching == "index":
        chosen = [(place, row) for row, place in enumerate(places) if place < len(targets)]
    else:
        rows, cols = linear_sum_assignment(both_PT / np.maximum(either_PT, 1), maximize=True)
        chosen = sorted(zip(cols.tolist(), rows.tolist()))
    pairs = [MaskPair(places[row], t, int(both_PT[row, t]), int(either_PT[row, t])) for t, row in chosen]
    missed = set(range(len(targets))) - {t for t, _ in chosen}
    extra = set(range(len(given))) - {row for _, row in chosen}
    pairs += [MaskPair(None, t, 0, rle.area(targets[t])) for t in sorted(missed)]
    pairs += [MaskPair(places[row], None, 0, rle.area(given[row][1])) for row in sorted(extra)]
    return pairs


def summarise_pairs(pairs: Iterable[MaskPair], *, empty: str = "zero") -> dict[str, float | int | None]:
    """Scores over the pairs of all samples: miou, oiou, p_at_0.5 to p_at_0.9 in [0,1] and counts of objects.

    The scores are None when there is no pair at all. oiou with an empty union follows `empty` as well.
    """
    if empty not in EMPTIES:
        raise ValueError(f"empty is {empty!r}; choose one of {', '.join(EMPTIES)}")
    pairs = list(pairs)
    agree_on_nothing = 1 if empty == "one" else 0

    def fraction(pair: MaskPair) -> tuple[int, int]:
        if pair.union == 0:
            return (agree_on_nothing if pair.matched else 0), 1
        return pair.intersection, pair.union

    fractions = [fraction(pair) for pair in pairs]
    n = len(pairs)
    intersection, union = sum(pair.intersection for pair in pairs), sum(pair.union for pair in pairs)
    overall = intersection / union if union else float(agree_on_nothing)
    scores: dict[str, float | int | None] = {
        # fsum is exact, so the mean does not depend on the order of the samples.
        "miou": math.fsum(i / u for i, u in fractions) / n if n else None,
        "oiou": overall if n else None,
    }
    for tenth in THRESHOLDS:
        hits = sum(10 * i >= tenth * u for i, u in fractions)
        scores[f"p_at_0.{tenth}"] = hits / n if n else None
    scores["objects"] = n
    scores["matched"] = sum(pair.matched for pair in pairs)
    scores["predicted"] = sum(pair.predicted is not None for pair in pairs)
    scores["true"] = sum(pair.target is not None for pair in pairs)
    return scores


def score_masks(
    predictions: Sequence[Sequence[RLE | None]],
    targets: Sequence[Sequence[RLE]],
    *,
    matching: str = "hungarian",
    empty: str = "zero",
) -> dict[str, Any]:
    """Score the masks of many samples.

    predictions, targets: per sample a list of COCO RLE masks of one size, full resolution. The i-th prediction is that
    of <OBJ-i>, None where the model gave none; for matching "hungarian" the order does not matter.

    Returns miou, oiou, p_at_0.5 ... p_at_0.9, the counts objects, matched, predicted, true, samples, and the
    conventions. Raises ValueError for lists of different lengths, unknown conventions, or masks of different sizes in
    one sample.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} samples of predictions for {len(targets)} samples of targets")
    pairs = [pair for p, t in zip(predictions, targets, strict=True) for pair in match_masks(p, t, matching=matching)]
    return {**summarise_pairs(pairs, empty=empty), "samples": len(targets), "matching": matching, "empty": empty}


def mask_intervals(
    predictions: Sequence[Sequence[RLE | None]], targets: Sequence[Sequence[RLE]], bootstrap: Bootstrap
) -> dict[str, Interval | None]:
    """Intervals over samples of miou, oiou and p_at_0.5 ... p_at_0.9 (Hungarian, two empty masks have IoU 0)."""
    groups = [match_masks(p, t) for p, t in zip(predictions, targets, strict=True)]
    objects = [len(group) for group in groups]
    ious = [math.fsum(pair.iou for pair in group) for group in groups]
    both = [sum(pair.intersection for pair in group) for group in groups]
    either = [sum(pair.union for pair in group) for group in groups]
    found = {"miou": bootstrap.of_ratio(ious, objects), "oiou": bootstrap.of_ratio(both, either)}
    for tenth in THRESHOLDS:
        hits = [sum(pair.union > 0 and 10 * pair.intersection >= tenth * pair.union for pair in g) for g in groups]
        found[f"p_at_0.{tenth}"] = bootstrap.of_ratio(hits, objects)
    return found


def score_images(predictions: Sequence[Sequence[RLE | None]], targets: Sequence[Sequence[RLE]]) -> dict[str, Any]:
    """Scores per picture, each picture counting once.

    per_image_miou: mean over pictures of the mean IoU of their objects (max(predicted, true) of them, Hungarian).
    merged_miou, merged_oiou: gIoU and cIoU of gRefCOCO: a picture's predicted masks as one against its true ones as
        one; without a target, IoU 1 where nothing was predicted, else 0 with the predicted area in the union.
    no_target_accuracy: N-acc, share of pictures without a target for which nothing was predicted.
    target_accuracy: T-acc, share of pictures with a target for which something was predicted.
    images, no_target_images: counts. "Nothing" is no mask, or empty masks alone; a score of no pictures is None.
    Raises ValueError for lists of different lengths and for masks of different sizes in one picture.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} samples of predictions for {len(targets)} samples of targets")
    per_image: list[float] = []
    merged: list[float] = []
    intersection = union = silent_right = answered = no_target = 0
    for predicted, true in zip(predictions, targets, strict=True):
        pairs = match_masks(predicted, true)
        if pairs:
            per_image.append(math.fsum(pair.iou for pair in pairs) / len(pairs))
        given = [mask for mask in predicted if mask is not None and rle.area(mask)]
        there = [mask for mask in true if rle.area(mask)]
        one, other = (rle.union(given) if given else None), (rle.union(there) if there else None)
        both = rle.intersection(one, other) if one and other else 0
        either = (rle.area(one) if one else 0) + (rle.area(other) if other else 0) - both
        intersection, union = intersection + both, union + either
        merged.append(both / either if either else 1.0)
        if other is None:
            no_target += 1
            silent_right += one is None
        else:
            answered += one is not None
    with_target = len(targets) - no_target
    return {
        "per_image_miou": math.fsum(per_image) / len(per_image) if per_image else None,
        "merged_miou": math.fsum(merged) / len(merged) if merged else None,
        "merged_oiou": intersection / union if union else None,
        "no_target_accuracy": silent_right / no_target if no_target else None,
        "target_accuracy": answered / with_target if with_target else None,
        "images": len(targets),
        "no_target_images": no_target,
    }
