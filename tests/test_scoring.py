"""Intervals, pictures' distances, mask scores against pycocotools, the paper's tables. CPU only."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from pipeline.data import rle
from pipeline.scoring import distributions
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.captions import bleu_of_counts, score_captions
from pipeline.scoring.distributions import Inception, frechet_distance, inception_score, kernel_distance
from pipeline.scoring.masks import mask_intervals, match_masks, score_images, score_masks
from pipeline.scoring.paper_tables import PRINTED, TABLES, table_runs, write_tables
from pipeline.scoring.report import build_report, write_report

H, W = 12, 16


def box(x1: int, y1: int, x2: int, y2: int) -> dict[str, Any]:
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[y1:y2, x1:x2] = 1
    return rle.encode(mask)


LEFT, RIGHT, EMPTY, HALF = box(0, 0, 4, 4), box(8, 0, 12, 4), box(0, 0, 0, 0), box(0, 0, 2, 4)


def test_intervals_cover_the_truth_as_often_as_they_say(rng: np.random.Generator) -> None:
    inside = 0
    for trial in range(200):
        low, high = Bootstrap(300, seed=trial).of_mean(rng.normal(5.0, 2.0, size=60))  # type: ignore[misc]
        inside += low <= 5.0 <= high
    # .95 of 200 is 190; a percentile interval of 60 values covers a little less.
    assert 176 <= inside <= 199


def test_intervals_are_seeded_and_resample_numerator_and_denominator_together(rng: np.random.Generator) -> None:
    hits, counts = rng.random(50), rng.random(50) + 1
    first = Bootstrap(500, seed=1).of_ratio(hits, counts)
    assert first == Bootstrap(500, seed=1).of_ratio(hits, counts) != Bootstrap(500, seed=2).of_ratio(hits, counts)
    assert Bootstrap(500).of_ratio([2.0, 4.0, 6.0], [4, 8, 12]) == (0.5, 0.5)
    assert Bootstrap(500).of_mean([]) is None
    assert Bootstrap(0).of_mean([1.0, 2.0]) is None
    # Replicates in which nothing can be divided are left out.
    assert Bootstrap(500).of_ratio([0.0, 1.0], [0, 1]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="replicates >= 0"):
        Bootstrap(-1)


def test_mask_scores_against_pycocotools(rng: np.random.Generator) -> None:
    predicted = [[rle.encode(rng.random((H, W)) < 0.6) for _ in range(n)] for n in (1, 3, 2, 4)]
    true = [[rle.encode(rng.random((H, W)) < 0.6) for _ in range(n)] for n in (1, 3, 3, 2)]
    ious = []
    for some, targets in zip(predicted, true, strict=True):
        theirs = coco.iou(some, targets, [False] * len(targets))
        for pair in match_masks(some, targets):
            matched = pair.predicted is not None and pair.target is not None
            wanted = theirs[pair.predicted, pair.target] if matched else 0.0
            assert pair.iou == pytest.approx(wanted, abs=1e-12)
            ious.append(wanted)
    assert score_masks(predicted, true)["miou"] == pytest.approx(np.mean(ious), abs=1e-12)


def test_pictures_by_hand() -> None:
    # One of two found (half of it); nothing said; too many; overlapping predictions, whose union counts once.
    predicted = [[HALF], [], [LEFT, RIGHT], [LEFT, HALF]]
    true = [[LEFT, RIGHT], [LEFT], [LEFT], [LEFT]]
    found = score_images(predicted, true)
    assert found["per_image_miou"] == pytest.approx((0.25 + 0 + 0.5 + 0.5) / 4)
    assert found["merged_miou"] == pytest.approx((8 / 32 + 0 + 16 / 32 + 1) / 4)
    assert found["merged_oiou"] == pytest.approx((8 + 0 + 16 + 16) / (32 + 16 + 32 + 16))
    assert (found["target_accuracy"], found["no_target_accuracy"]) == (3 / 4, None)


def test_answers_that_there_is_nothing() -> None:
    predicted: list[list[Any]] = [[], [EMPTY], [LEFT], [], [None, LEFT]]
    true: list[list[Any]] = [[], [], [], [LEFT], [LEFT]]
    found = score_images(predicted, true)
    assert (found["no_target_accuracy"], found["no_target_images"]) == (2 / 3, 3)
    assert found["target_accuracy"] == 1 / 2
    assert found["merged_miou"] == (1 + 1 + 0 + 0 + 1) / 5
    assert found["merged_oiou"] == 16 / (16 + 16 + 16)
    # Per object, a picture without a target and without a mask has nothing to count; a mask too many has.
    assert score_masks(predicted[:1], true[:1])["objects"] == 0
    assert score_masks(predicted[2:3], true[2:3])["objects"] == 1
    assert score_images([], [])["merged_miou"] is None


def test_mask_intervals_hold_the_scores(rng: np.random.Generator) -> None:
    predicted = [[box(0, 0, int(rng.integers(1, 9)), 4)] for _ in range(80)]
    true = [[LEFT]] * 80
    scores, intervals = score_masks(predicted, true), mask_intervals(predicted, true, Bootstrap(300))
    for name, ends in intervals.items():
        assert ends is not None and ends[0] <= scores[name] <= ends[1]
    assert mask_intervals([[LEFT]] * 5, [[LEFT]] * 5, Bootstrap(50))["p_at_0.9"] == (1.0, 1.0)


def test_caption_counts_are_the_published_ones(data_dir: Path) -> None:
    folder = data_dir / "caption_scores"
    truths, guesses, expected = (json.loads((folder / f"{n}.json").read_text()) for n in ("gts", "res", "expected"))
    some = list(truths)[:40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.scoring.captions.java_command", lambda: None)
        with pytest.warns(UserWarning, match="METEOR"):
            found = score_captions(truths, {key: text for key, (text,) in guesses.items()}, tokenizer="none")
        with pytest.warns(UserWarning, match="METEOR"):
            few = score_captions(
                {key: truths[key] for key in some},
                {key: guesses[key][0] for key in some},
                tokenizer="none",
                bootstrap=Bootstrap(200),
            )
    assert found["bleu_counts"] == expected["bleu_counts"]
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"):
        low, high = few["intervals"][name]
        assert low < few[name] < high and high - low < 1


def test_bleu_of_counts_by_hand() -> None:
    # 4 words for 5, of which 3 and 1 and 0 and 0 n-grams are right: the brevity penalty is exp(1 - 5/4).
    (bleu,) = bleu_of_counts(np.array([[4, 5, 4, 3, 2, 1, 3, 1, 0, 0]]))
    assert bleu[:2] == pytest.approx([0.75 * np.exp(-0.25), np.sqrt(0.75 / 3) * np.exp(-0.25)], rel=1e-6)
    assert bleu[3] < 1e-6


def standardised(rng: np.random.Generator, n: int, dims: int) -> np.ndarray:
    """Rows whose mean is exactly 0 and whose covariance (n-1) is exactly the identity."""
    rows = rng.normal(size=(n, dims))
    rows -= rows.mean(axis=0)
    return rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T


def test_frechet_distance_of_gaussians(rng: np.random.Generator) -> None:
    white = standardised(rng, 500, 4)
    mean, scale = np.array([1.0, -2.0, 0.0, 0.5]), np.array([2.0, 0.5, 1.0, 3.0])
    # |m|² + Σ (1 - s)² for diagonal covariances.
    wanted = (mean**2).sum() + ((1 - scale) ** 2).sum()
    assert frechet_distance(white, white * scale + mean) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(white[:1], white) is None


def test_kernel_distance_is_the_unbiased_estimate(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(30, 3)), rng.normal(size=(30, 3)) + 0.5

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 3 + 1) ** 3

    def off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (30 * 29)

    wanted = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    found = kernel_distance(x, y)
    # Subsets of all thirty are all alike.
    assert found["mean"] == pytest.approx(wanted, rel=1e-9)
    assert (found["subset_size"], found["std"]) == (30, pytest.approx(0, abs=1e-9))
    assert kernel_distance(x[:1], y)["mean"] is None


def test_kernel_distance_of_gaussians(rng: np.random.Generator) -> None:
    # With u = x·y/d and independent x, y ~ N(m, I) or N(0, I): E(1+u)³ = 1 + 3Eu + 3Eu² + Eu³. In one dimension, for
    # y' of mean m: Eu = m², Eu² = (1+m²)², Eu³ = (3m+m³)²; for x with y: 0, 1+m², 0; for x with x': 0, 1, 0.
    m = 0.8
    within = 1 + 3 * m**2 + 3 * (1 + m**2) ** 2 + (3 * m + m**3) ** 2
    wanted = (1 + 3) + within - 2 * (1 + 3 * (1 + m**2))
    found = kernel_distance(rng.normal(size=(20000, 1)), rng.normal(m, 1.0, size=(20000, 1)))
    assert found["subset_size"] == 1000
    assert found["mean"] == pytest.approx(wanted, rel=0.05)


def test_inception_score_by_hand() -> None:
    # Ten sure classes in equal shares: exp(log 10) in a split that holds each as often; one class alone: 1.
    sure = np.eye(10)[np.arange(1000) % 10] * 1e3
    assert inception_score(sure, splits=2)["mean"] == pytest.approx(10, rel=0.02)
    assert inception_score(np.tile([5.0, 0.0, 0.0], (40, 1)))["mean"] == pytest.approx(1)
    # Half sure, half undecided between two classes; p(y) = (3/4, 1/4): KL by hand.
    two = np.array([[1e3, 0.0]] * 2 + [[0.0, 0.0]] * 2)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        found = inception_score(two, splits=1)
    kl = (np.log(1 / 0.75) + 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)) / 2
    assert found["mean"] == pytest.approx(np.exp(kl))
    assert inception_score(sure[:5])["mean"] is None
    # Eleven pictures make parts of two: six, not ten.
    assert (inception_score(sure)["splits"], inception_score(sure[:11])["splits"]) == (10, 6)
    assert inception_score(sure, seed=1) == inception_score(sure, seed=1)


def test_only_the_inception_of_fid_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        Inception(tmp_path / "none.pth", torch.device("cpu"))
    path = tmp_path / "other.pth"
    path.write_bytes(b"some other network")
    with pytest.raises(ValueError, match="FID, KID and IS are figures of the one Inception"):
        Inception(path, torch.device("cpu"))


def test_inceptions_features_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The class reads a file at once, so random weights of its shapes come from a class that does not.
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None, raising=True)
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    monkeypatch.setattr(distributions, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    network = Inception(path, torch.device("cpu"))
    pool, logits = network([picture(9, 7, 30), picture(20, 20, 200)])
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008)
    assert pool.dtype == np.float32 and not np.array_equal(pool[0], pool[1])
    assert np.allclose(logits, pool @ network.network.fc.weight.detach().numpy().T, rtol=1e-4, atol=1e-4)


def picture(height: int, width: int, grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def test_tables_mark_what_was_printed(tmp_path: Path) -> None:
    run = {"samples": {}, "seconds": {}, "versions": {}, "commit": "c", "split": "testA", "protocol": "free-running"}
    figures = {"referring_miou": 0.5, "referring_oiou": 0.25, "caption_cider": 1.25}
    reports = {
        "mine": build_report(
            {"tuned": figures}, {**run, "phrases": "drawn"}, {"tuned": {"referring_miou": (0.4, 0.6)}}
        ),
        "phrases": build_report(
            {"tuned": figures, "teacher_forced": figures}, {**run, "phrases": "each alone", "data": "shards/refcoco+"}
        ),
    }
    text = write_tables(reports, tmp_path).read_text()
    rows = {name: list(csv.reader((tmp_path / f"{name}.csv").open())) for name in (*TABLES, "refcoco")}
    assert [row[:2] for row in rows["table1"][1:]] == [
        ["mine", "measured"],
        ["phrases", "measured"],
        ["phrases", "measured"],
        ["LISA-13B", "printed"],
    ]
    place = rows["table1"][0].index("referring mIoU")
    assert rows["table1"][1][place] == "50.0 [40.0, 60.0]"
    assert "125.0" in rows["table2"][1]
    assert rows["refcoco"][1] == ["phrases", "measured", "25.0", "50.0", "refcoco+ testA"]
    assert "not on MMUD" in text and all(printed.source in text for printed in PRINTED)


def test_runs_of_one_folder_name_have_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"samples": 4, "seconds": {}, "versions": {}, "commit": "c", "split": "test", "protocol": "free-running"}
    for name in ("a/seed0", "b/seed0"):
        write_report(build_report({"tuned": {"referring_miou": 0.5}}, {**run, "checkpoint": name}), tmp_path / name)
    monkeypatch.chdir(tmp_path / "a/seed0")

    def names(*runs: str) -> list[str]:
        table_runs([Path(run) for run in runs], tmp_path / "out")
        rows = csv.reader((tmp_path / "out/table1.csv").open())
        return [name for name, kind, *_ in rows if kind == "measured"]

    assert names("../../a/seed0", "../../b/seed0") == ["a/seed0", "b/seed0"]
    assert names(".") == ["seed0"]
    with pytest.raises(ValueError, match="--tables names . twice"):
        names(".", "../seed0")
    with pytest.raises(ValueError, match="--tables names no run"):
        names()
