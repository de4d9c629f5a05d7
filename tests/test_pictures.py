"""Retrieval and cosine of pictures, and the objects that texts name: hand-computed cases, ties, chance. CPU only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.scoring.objects import caption_object_f1, object_f1, right_object_accuracy
from pipeline.scoring.pictures import mean_cosine, retrieval_r1, score_pictures


def test_own_texts_are_found(rng: np.random.Generator) -> None:
    texts = rng.normal(size=(120, 16))
    assert retrieval_r1(3 * texts, texts) == 1
    assert retrieval_r1(-texts, texts) == 0
    assert mean_cosine(3 * texts, texts) == pytest.approx(1)
    assert mean_cosine(-texts, texts) == pytest.approx(-1)


def test_chance_is_one_in_the_group(rng: np.random.Generator) -> None:
    images, texts = rng.normal(size=(2, 4000, 8))
    assert retrieval_r1(images, texts, group=50) == pytest.approx(1 / 50, abs=0.007)
    assert retrieval_r1(images, texts, group=4) == pytest.approx(1 / 4, abs=0.02)


def test_ties_share_the_credit(rng: np.random.Generator) -> None:
    constant = np.ones((60, 4))
    assert retrieval_r1(constant, constant, group=50) == pytest.approx(1 / 50)
    # Every text stands twice; with the whole set as the group each picture meets its twin.
    texts = np.repeat(rng.normal(size=(20, 32)), 2, axis=0)
    assert retrieval_r1(texts, texts + 1e-9, group=40) == pytest.approx(0.5)


def test_seed_decides_the_others(rng: np.random.Generator) -> None:
    texts = rng.normal(size=(200, 4))
    images = texts + rng.normal(size=texts.shape)
    first = retrieval_r1(images, texts, seed=1)
    assert first == retrieval_r1(images, texts, seed=1)
    assert len({retrieval_r1(images, texts, seed=seed) for seed in range(6)}) > 1


def test_a_picture_is_never_its_own_distractor() -> None:
    # With only two pictures and a group of two, the other one is always drawn.
    images = np.eye(2)
    assert retrieval_r1(images, images, group=2) == 1
    assert retrieval_r1(images, images[::-1], group=2) == 0


def test_tensors_and_small_sets(rng: np.random.Generator) -> None:
    rows = torch.from_numpy(rng.normal(size=(10, 4))).float()
    scores = score_pictures(rows, rows)
    assert scores["text_r1"] is None, "ten texts are not fifty"
    assert scores["clip_cosine"] == pytest.approx(1)
    assert (scores["group"], scores["samples"]) == (50, 10)
    assert score_pictures(np.zeros((0, 4)), np.zeros((0, 4)))["clip_cosine"] is None


def test_picture_refusals() -> None:
    with pytest.raises(ValueError, match="at least 50 pictures, found 3"):
        retrieval_r1(np.eye(3), np.eye(3))
    with pytest.raises(ValueError, match="differ in shape"):
        mean_cosine(np.eye(3), np.eye(4))
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, the first is row 1"):
        mean_cosine(np.array([[1.0, 0.0], [np.nan, 0.0]]), np.eye(2))
    with pytest.raises(ValueError, match="no pictures"):
        mean_cosine(np.zeros((0, 4)), np.zeros((0, 4)))


def parse(text: str) -> list[str]:
    return [word for word in text.split() if word in {"dog", "cat", "bird"}]


def test_object_f1_counts_multisets() -> None:
    scores = object_f1([["dog", "dog"], ["cat"], []], [["dog"], ["cat", "bird"], ["bird"]])
    assert (scores["named"], scores["there"], scores["right"]) == (3, 4, 2)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(2 / 4)
    assert scores["f1"] == pytest.approx(2 * 2 / 7)
    assert object_f1([["dog"]], [["cat"]])["f1"] == 0
    assert object_f1([[]], [[]])["f1"] is None


def test_caption_object_f1_reads_words() -> None:
    assert caption_object_f1(["a dog and a cat"], [["cat", "dog"]], parse)["f1"] == 1


def test_right_object_accuracy() -> None:
    answers = ["the dog", "the cat and the dog", "the dog", "the dog and the cat"]
    gold = [["dog"], ["dog", "cat"], ["cat"], ["dog"]]
    assert right_object_accuracy(answers, gold, parse) == {"accuracy": 0.5, "right": 2, "samples": 4}
    assert right_object_accuracy([], [], parse)["accuracy"] is None
    with pytest.raises(ValueError, match="1 answers for 0"):
        right_object_accuracy(["x"], [], parse)
