"""Mask scores: hand-computed cases, both matchings, conventions, exactness, and order independence. CPU only."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from pipeline.data import rle
from pipeline.scoring.masks import match_masks, score_masks, summarise_pairs

H, W = 12, 16


def box(x1: int, y1: int, x2: int, y2: int, h: int = H, w: int = W) -> dict:
    mask = np.zeros((h, w), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return rle.encode(mask)


LEFT, RIGHT, EMPTY = box(0, 0, 4, 4), box(8, 0, 12, 4), box(0, 0, 0, 0)
HALF = box(0, 0, 2, 4)


def test_hand_computed() -> None:
    scores = score_masks([[HALF], [RIGHT]], [[LEFT], [RIGHT]])
    assert scores["miou"] == (0.5 + 1) / 2
    assert scores["oiou"] == (8 + 16) / (16 + 16)
    assert [scores[f"p_at_0.{t}"] for t in (5, 6, 7, 8, 9)] == [1, 0.5, 0.5, 0.5, 0.5]
    assert (scores["objects"], scores["matched"], scores["predicted"], scores["true"], scores["samples"]) == (
        2,
        2,
        2,
        2,
        2,
    )


def test_hungarian_pairs_by_overlap_and_index_by_place() -> None:
    swapped = [[RIGHT, HALF]], [[LEFT, RIGHT]]
    assert score_masks(*swapped)["miou"] == 0.75
    by_index = score_masks(*swapped, matching="index")
    assert by_index["miou"] == 0 == by_index["oiou"]


def test_hungarian_is_optimal_not_greedy(rng: np.random.Generator) -> None:
    for _ in range(20):
        predicted = [rle.encode(rng.random((6, 7)) < 0.4) for _ in range(4)]
        targets = [rle.encode(rng.random((6, 7)) < 0.4) for _ in range(3)]
        best = max(sum(rle.iou(predicted[p], t) for p, t in zip(order, targets)) for order in permutations(range(4), 3))
        assert sum(pair.iou for pair in match_masks(predicted, targets)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("matching", ["hungarian", "index"])
def test_unmatched_count_as_zero_with_their_area_in_the_union(matching: str) -> None:
    missed = score_masks([[LEFT]], [[LEFT, RIGHT]], matching=matching)
    assert missed["miou"] == 0.5
    assert missed["oiou"] == 16 / 32
    extra = score_masks([[LEFT, RIGHT]], [[LEFT]], matching=matching)
    assert extra["miou"] == 0.5
    assert extra["oiou"] == 16 / 32
    nothing = score_masks([[]], [[LEFT, RIGHT]], matching=matching)
    assert (nothing["miou"], nothing["oiou"], nothing["objects"], nothing["matched"]) == (0, 0, 2, 0)


def test_a_token_that_is_missing_keeps_its_place() -> None:
    # The model gave <OBJ-2> alone.
    predicted, targets = [None, RIGHT], [LEFT, RIGHT]
    pairs = match_masks(predicted, targets, matching="index")
    assert [(pair.predicted, pair.target) for pair in pairs] == [(1, 1), (None, 0)]
    assert match_masks(predicted, targets) == pairs
    beyond = match_masks([None, None, RIGHT], targets, matching="index")
    assert [(pair.predicted, pair.target) for pair in beyond] == [(None, 0), (None, 1), (2, None)]


def test_empty_conventions() -> None:
    assert score_masks([[EMPTY]], [[EMPTY]], empty="zero")["miou"] == 0
    one = score_masks([[EMPTY]], [[EMPTY]], empty="one")
    assert (one["miou"], one["oiou"], one["p_at_0.9"], one["empty"]) == (1, 1, 1, "one")
    assert score_masks([[LEFT]], [[EMPTY]], empty="one")["miou"] == 0
    alone = score_masks([[LEFT, EMPTY]], [[LEFT]], empty="one")
    assert alone["miou"] == 0.5, "an empty mask too many is no agreement"


def test_nothing_to_score() -> None:
    scores = score_masks([[]], [[]])
    assert scores["miou"] is None
    assert scores["oiou"] is None
    assert scores["objects"] == 0


def test_thresholds_are_exact() -> None:
    # 7/10 is not a float; counted in integers it reaches .7.
    scores = score_masks([[box(0, 0, 7, 1)]], [[box(0, 0, 10, 1)]])
    assert (scores["p_at_0.7"], scores["p_at_0.8"]) == (1, 0)


def test_large_areas_stay_exact() -> None:
    # float32 sums lose single pixels above 2^24.
    full, less = box(0, 0, 5000, 5000, 5000, 5000), box(0, 0, 4999, 5000, 5000, 5000)
    scores = score_masks([[less]] * 3 + [[full]], [[full]] * 4)
    assert scores["oiou"] == (3 * 4999 * 5000 + 5000 * 5000) / (4 * 5000 * 5000)


def test_order_of_samples_does_not_matter(rng: np.random.Generator) -> None:
    predictions = [[rle.encode(rng.random((9, 9)) < 0.5) for _ in range(rng.integers(0, 4))] for _ in range(60)]
    targets = [[rle.encode(rng.random((9, 9)) < 0.5) for _ in range(rng.integers(0, 4))] for _ in range(60)]
    expected = score_masks(predictions, targets)
    for _ in range(5):
        order = rng.permutation(60)
        assert score_masks([predictions[i] for i in order], [targets[i] for i in order]) == expected


def test_agrees_with_pixels(rng: np.random.Generator) -> None:
    predicted, target = rng.random((2, 13, 17)) < 0.5
    (pair,) = match_masks([rle.encode(predicted)], [rle.encode(target)])
    assert (pair.intersection, pair.union) == ((predicted & target).sum(), (predicted | target).sum())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        score_masks([[box(0, 0, 2, 2, 4, 4)]], [[LEFT]])
    with pytest.raises(ValueError, match="choose one of hungarian, index"):
        score_masks([[LEFT]], [[LEFT]], matching="greedy")
    with pytest.raises(ValueError, match="choose one of zero, one"):
        summarise_pairs([], empty="half")
    with pytest.raises(ValueError, match="1 samples of predictions for 2"):
        score_masks([[LEFT]], [[LEFT], [LEFT]])
