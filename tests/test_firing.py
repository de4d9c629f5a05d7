"""Which units fire and how far tasks share them: recording on a tiny model, overlap by hand, chance, the figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_tuner import NORMS, ROWS, batch, build, features

from pipeline.data.batch import IGNORE
from pipeline.model.adapters import add_lora
from pipeline.model.firing import Firing, record
from pipeline.scoring.overlap import (
    chance,
    format_overlap,
    frequency,
    halves,
    jaccard,
    matched_places,
    mean_chance,
    overlap_table,
    used_units,
)
from pipeline.scoring.overlap_figures import draw_firing, draw_overlap

LAYERS, UNITS = 3, 16


def test_the_units_that_stay_at_the_places_that_predict_the_answer() -> None:
    tuner = build(beta=0.4).train()
    two = batch([ROWS[1], ROWS[3]])
    found = record(tuner, [(two, features(2))] * 2, "caption")
    # One row of two is a caption; its answer has three tokens, and the prompt's last token predicts the first.
    assert found.fired.shape == (6, LAYERS, UNITS)
    place = int((two.labels[0] != IGNORE).nonzero()[0])
    assert found.tokens.tolist() == two.input_ids[0, place - 1 : place + 2].tolist() * 2
    assert found.samples.tolist() == [0, 0, 0, 2, 2, 2]
    # round(.4 x 16) units, the share without a draw; ties aside.
    assert set(found.fired.sum(2).flatten().tolist()) == {6}
    assert tuner.training
    assert all(network.observe is None for network in tuner.networks)
    seen: list[torch.Tensor] = []
    tuner.networks[1].observe = lambda _, za: seen.append(za)
    tuner.eval()(two, features(2), NORMS)
    assert np.array_equal(found.fired[0, 1], (seen[0][0, place - 1] != 0).numpy())


@pytest.mark.parametrize(
    "tuner, message",
    [
        (
            lambda: build(adapt=partial(add_lora, first_layer=0, projections="qv", rank=2, alpha=2.0)),
            "no sparse network",
        ),
        (lambda: build(beta=1.0), "keeps every unit"),
    ],
)
def test_models_without_anything_to_see_are_refused(tuner, message) -> None:
    with pytest.raises(ValueError, match=message):
        record(tuner(), [], "caption")


def test_overlap_by_hand() -> None:
    rates = np.array([[0.9, 0.8, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5]])
    assert used_units(rates).tolist() == [[True, True, False, False]] * 2
    other = np.array([[False, True, True, False], [True, True, False, False]])
    assert jaccard(used_units(rates), other).tolist() == [1 / 3, 1.0]
    assert frequency(np.array([[[True, False]], [[True, True]]])).tolist() == [[1.0, 0.5]]


def test_chance_is_the_mean_over_random_sets() -> None:
    rng = np.random.default_rng(0)
    sets = np.argsort(rng.random((2, 20_000, 20)), axis=2) < 8
    assert chance(8, 8, 20) == pytest.approx(jaccard(sets[0], sets[1]).mean(), abs=0.003)
    smaller = sets[1] & (np.cumsum(sets[1], axis=1) <= 3)
    assert chance(8, 3, 20) == pytest.approx(jaccard(sets[0], smaller).mean(), abs=0.003)
    assert chance(20, 20, 20) == 1.0


@given(st.lists(st.integers(0, 5), max_size=30).map(np.array), st.lists(st.integers(0, 5), max_size=30).map(np.array))
def test_matched_places_have_each_token_equally_often(a: np.ndarray, b: np.ndarray) -> None:
    places = matched_places(a, b, np.random.default_rng(0))
    for own, tokens in zip(places, (a, b), strict=True):
        assert len(set(own.tolist())) == len(own)
        assert all(0 <= place < len(tokens) for place in own)
    picked = [sorted(tokens[own].tolist()) if len(own) else [] for own, tokens in zip(places, (a, b), strict=True)]
    assert picked[0] == picked[1]
    assert len(picked[0]) == sum(min(np.sum(a == token), np.sum(b == token)) for token in range(6))


def task(units: list[int], tokens: list[int], samples: int = 4) -> Firing:
    """At every place of every sample the same units fire, in both layers."""
    fired = np.zeros((samples * len(tokens), 2, 8), dtype=bool)
    fired[:, :, units] = True
    return Firing(fired, np.tile(tokens, samples), np.repeat(np.arange(samples), len(tokens)))


def test_the_table_and_its_controls(tmp_path: Path) -> None:
    tasks = {"a": task([0, 1, 2], [1, 2]), "b": task([1, 2, 3], [2, 3, 3]), "c": task([5, 6, 7], [9])}
    # Task b uses other units at the token that it has in common with a.
    at = tasks["b"].tokens == 2
    tasks["b"].fired[at] = tasks["a"].fired[:1]
    tasks["b"].fired[~at] = task([3, 4, 5], [3]).fired[:1]
    found = overlap_table(tasks, seed=0)
    assert found["tasks"]["a/c"] == [0.0, 0.0]
    assert found["matched"]["a/b"] == [1.0, 1.0]
    assert found["tasks"]["a/b"] == [0.0, 0.0]
    assert found["matched"]["a/c"] is None
    assert set(map(tuple, found["halves"].values())) == {(1.0, 1.0)}
    first, second = halves(tasks["a"], np.random.default_rng(1))
    assert len(first) == len(second) == 4
    assert found["chance"]["a/b"] == [chance(3, 3, 8)] * 2 and mean_chance(found) == pytest.approx(chance(3, 3, 8))
    text = format_overlap({"tuned": found, "untuned": found}, 0.25)
    assert "| a and c | 0.00 | – | 0.00 | – |" in text
    with pytest.raises(ValueError, match="at least two samples"):
        overlap_table({"a": task([0], [1], samples=1)}, seed=0)
    rates = {name: frequency(one.fired) for name, one in tasks.items()}
    for path in (
        draw_firing(rates, tmp_path / "firing.png"),
        draw_overlap({"tuned": found, "untuned": found}, list(tasks), 0.25, tmp_path / "overlap.png"),
    ):
        with Image.open(path) as picture:
            assert min(picture.size) > 300
