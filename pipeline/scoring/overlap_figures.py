"""Two figures of what fires: each task's units layer by layer, and the overlap of tasks as matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from pipeline.scoring.overlap import mean

STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
Table = Mapping[str, Mapping[str, list[float] | None]]


def draw_firing(rates: Mapping[str, np.ndarray], path: Path) -> Path:
    """One panel per task of rates [L,Z]: how often each unit fires.

    In each layer the units stand in one order for all panels: by the task that uses them most, then by how much more.
    """
    tasks = list(rates)
    stacked = np.stack([rates[task] for task in tasks])
    lead = stacked.argmax(0)
    rest = np.sort(stacked, axis=0)
    margin = rest[-1] - (rest[-2] if len(tasks) > 1 else 0)
    order = np.lexsort((-margin, lead), axis=-1)
    with plt.rc_context(STYLE):
        layers = stacked.shape[1]
        figure, axes = plt.subplots(
            len(tasks),
            1,
            figsize=(7.2, 0.9 + len(tasks) * (0.55 + 0.16 * layers)),
            sharex=True,
            constrained_layout=True,
        )
        image = None
        for axis, task, values in zip(np.atleast_1d(axes), tasks, stacked, strict=True):
            image = axis.imshow(
                np.take_along_axis(values, order, axis=1),
                aspect="auto",
                cmap="magma",
                vmin=0,
                vmax=1,
                interpolation="none",
            )
            axis.set_title(task, loc="left")
            axis.set_ylabel("layer")
            axis.set_yticks(range(0, layers, max(1, layers // 4)))
        np.atleast_1d(axes)[-1].set_xlabel("units of each layer, by the task that uses them most")
        assert image is not None
        figure.colorbar(image, ax=axes, label="share of answer tokens at which the unit fires", shrink=0.8)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def draw_overlap(found: Mapping[str, Table], tasks: list[str], by_chance: float, path: Path) -> Path:
    """One matrix per model and kind of places; the diagonal is two halves of one task's samples."""
    panels = [(f"{model}, {label}", model, kind) for model in found for kind, label in _KINDS.items()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(2.7 * len(panels) + 0.8, 3.1), constrained_layout=True)
        image = None
        for axis, (title, model, kind) in zip(np.atleast_1d(axes), panels, strict=True):
            values = np.full((len(tasks), len(tasks)), np.nan)
            for i, a in enumerate(tasks):
                values[i, i] = mean(found[model]["halves"][a])
                for j, b in enumerate(tasks[i + 1 :], i + 1):
                    one = mean(found[model][kind][f"{a}/{b}"])
                    values[i, j] = values[j, i] = np.nan if one is None else one
            image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1)
            for i, j in np.ndindex(values.shape):
                if not np.isnan(values[i, j]):
                    shade = "white" if values[i, j] < 0.6 else "black"
                    axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=shade, fontsize=8)
            axis.set_title(title)
            axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
            axis.set_yticks(range(len(tasks)), tasks if axis is np.atleast_1d(axes)[0] else [])
        assert image is not None
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="Jaccard overlap")
        bar.ax.axhline(by_chance, color="white", linewidth=1.5)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


_KINDS = {"tasks": "all places", "matched": "same tokens"}
