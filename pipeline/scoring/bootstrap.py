"""Confidence intervals of scores: the percentile bootstrap over samples (pictures), seeded.

A score of a set is a function of sums over its samples (areas, counts of n-grams, hits). A replicate draws as many
samples as there are, with replacement; how often each was drawn are its weights, so that one product of weights and
per-sample statistics gives the sums of all replicates. The samples' order must be fixed (by key) before: the draw goes
by row.

Letters in shapes: R replicates, n samples, k statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """replicates: how many sets are drawn, 0 for no intervals; level: share of them inside the interval."""

    replicates: int = 1000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.replicates < 0 or not 0 < self.level < 1:
            raise ValueError(f"a bootstrap needs replicates >= 0 and a level within 0..1, found {self}")

    def weights(self, n: int) -> np.ndarray:
        """How often each replicate drew each of n samples, int64 [R,n]; the same for all scores of the same samples."""
        return np.random.default_rng(self.seed).multinomial(n, np.full(n, 1 / n), size=self.replicates)

    def interval(
        self, statistics_nk: Sequence[Sequence[float]] | np.ndarray, score: Callable[[np.ndarray], np.ndarray]
    ) -> Interval | None:
        """The interval of `score`, which turns sums [R,k] of the per-sample statistics [n,k] into scores [R].

        Replicates without a score (NaN: nothing to divide by) are left out. None without samples or replicates.
        """
        rows = np.asarray(statistics_nk, dtype=np.float64)
        if not self.replicates or not len(rows):
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = score(self.weights(len(rows)) @ rows)
        scores = scores[np.isfinite(scores)]
        if not len(scores):
            return None
        low, high = np.quantile(scores, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)

    def of_ratio(
        self, numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray
    ) -> Interval | None:
        """The interval of Σ numerators / Σ denominators, one of each per sample."""
        return self.interval(np.column_stack([numerators, denominators]), lambda sums: sums[:, 0] / sums[:, 1])

    def of_mean(self, values: Sequence[float] | np.ndarray) -> Interval | None:
        """The interval of the mean of one value per sample."""
        return self.of_ratio(values, np.ones(len(values)))
