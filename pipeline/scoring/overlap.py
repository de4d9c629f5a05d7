"""How far two tasks use the same units: Jaccard overlap of their most used units, layer by layer, and its controls.

A task's units in a layer are the n that fire most often there, n being how many fire at a place. Beside the overlap of
two tasks stand: the same over places matched by token (each token equally often on both sides), since tasks also differ
in their words; two halves of one task's samples, the most that could be reached; and chance, of random sets.

Shape suffixes: N answer places, L tuned layers, Z sparse dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Protocol

import numpy as np


class Fired(Protocol):
    """What fired in one task, as pipeline.model.firing.Firing has it."""

    @property
    def fired(self) -> np.ndarray:
        """[N,L,Z] bool."""

    @property
    def tokens(self) -> np.ndarray:
        """[N]: the token that stands at each place."""

    @property
    def samples(self) -> np.ndarray:
        """[N]: the sample that each place is of."""


def frequency(fired: np.ndarray) -> np.ndarray:
    """[L,Z]: the share of places at which each unit fires."""
    return fired.mean(0)


def used_units(rates_LZ: np.ndarray) -> np.ndarray:
    """[L,Z] bool: the n most used units of each layer, n = how many fire at a place on average, at least 1."""
    used = np.zeros(rates_LZ.shape, dtype=bool)
    for layer, rates in enumerate(rates_LZ):
        n = max(1, round(float(rates.sum())))
        # Ties go to the lower number.
        used[layer, np.argsort(-rates, kind="stable")[:n]] = True
    return used


def jaccard(a_LZ: np.ndarray, b_LZ: np.ndarray) -> np.ndarray:
    """[L]: |A ∩ B| / |A ∪ B| of two sets of units in each layer."""
    return (a_LZ & b_LZ).sum(1) / np.maximum((a_LZ | b_LZ).sum(1), 1)


def chance(a: int, b: int, z_dim: int) -> float:
    """The expected Jaccard overlap of two random sets of a and b out of z_dim units (hypergeometric); a, b >= 1."""
    return sum(
        math.comb(a, k) * math.comb(z_dim - a, b - k) / math.comb(z_dim, b) * k / (a + b - k)
        for k in range(max(0, a + b - z_dim), min(a, b) + 1)
    )


def matched_places(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of two token lists, as many as possible, such that each token stands equally often in both."""
    places: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for token in np.intersect1d(a, b):
        of_a, of_b = (np.flatnonzero(tokens == token) for tokens in (a, b))
        count = min(len(of_a), len(of_b))
        places[0].append(rng.permutation(of_a)[:count])
        places[1].append(rng.permutation(of_b)[:count])
    if not places[0]:
        none = np.zeros(0, dtype=np.int64)
        return none, none
    return np.concatenate(places[0]), np.concatenate(places[1])


def halves(task: Fired, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """fired [N,L,Z] of two random halves of a task's samples."""
    samples = rng.permutation(np.unique(task.samples))
    first = np.isin(task.samples, samples[: len(samples) // 2])
    return task.fired[first], task.fired[~first]


def overlap_table(tasks: Mapping[str, Fired], seed: int) -> dict[str, dict[str, list[float] | None]]:
    """{"tasks": {"a/b": [per layer]}, "matched": the same over token-matched places, "halves": {task: [per layer]},
    "chance": {"a/b": [per layer]}, of random sets as large as those of "tasks"}.

    None where two tasks share no token. Raises ValueError for a task with fewer than two samples.
    """
    if short := [name for name, task in tasks.items() if len(np.unique(task.samples)) < 2]:
        raise ValueError(f"{', '.join(short)}: at least two samples are needed to compare halves; take more --samples")
    table: dict[str, dict[str, list[float] | None]] = {"tasks": {}, "matched": {}, "halves": {}, "chance": {}}
    rng = np.random.default_rng(seed)

    def compare(a: np.ndarray, b: np.ndarray) -> list[float] | None:
        if not len(a) or not len(b):
            return None
        return jaccard(used_units(frequency(a)), used_units(frequency(b))).tolist()

    for name, task in tasks.items():
        table["halves"][name] = compare(*halves(task, rng))
    for (name, a), (other, b) in combinations(tasks.items(), 2):
        table["tasks"][f"{name}/{other}"] = compare(a.fired, b.fired)
        sizes_L2 = np.stack([used_units(frequency(task.fired)).sum(1) for task in (a, b)], axis=1)
        table["chance"][f"{name}/{other}"] = [chance(int(n), int(m), a.fired.shape[2]) for n, m in sizes_L2]
        places = matched_places(a.tokens, b.tokens, rng)
        table["matched"][f"{name}/{other}"] = compare(a.fired[places[0]], b.fired[places[1]])
    return table


def mean(values: Sequence[float] | None) -> float | None:
    """Over the layers."""
    return None if values is None else float(np.mean(values))


def mean_chance(table: Mapping[str, Mapping[str, list[float] | None]]) -> float:
    """What random sets would reach, mean over pairs of tasks and layers; 1 for a single task."""
    values = [value for layers in table["chance"].values() for value in layers or ()]
    return float(np.mean(values)) if values else 1.0


def format_overlap(found: Mapping[str, Mapping[str, Mapping[str, list[float] | None]]], by_chance: float) -> str:
    """The Markdown table; found: model ("tuned", "untuned") -> `overlap_table`'s answer."""
    models = list(found)
    kinds = {"tasks": "all places", "matched": "same tokens"}
    heads = [f"{model}, {label}" for model in models for label in kinds.values()]
    lines = ["| tasks | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    for pair in found[models[0]]["tasks"]:
        cells = [shown(mean(found[model][kind][pair])) for model in models for kind in kinds]
        lines.append(f"| {pair.replace('/', ' and ')} | " + " | ".join(cells) + " |")
    for task in found[models[0]]["halves"]:
        cells = [text for model in models for text in (shown(mean(found[model]["halves"][task])), "")]
        lines.append(f"| {task}, two halves of its samples | " + " | ".join(cells) + " |")
    lines += ["", f"Jaccard overlap of the most used units, mean over layers. Random sets would reach {by_chance:.2f}."]
    return "\n".join(lines) + "\n"
