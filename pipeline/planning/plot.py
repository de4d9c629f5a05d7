"""Curves of a plan over the number of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from pipeline.planning.search import Plan


def draw(curves: Mapping[str, Sequence[tuple[int, Plan]]], title: str, path: Path) -> None:
    """Writes a PNG: hours of the run and seconds of a step over the number of GPUs, one line per curve.

    Plans that do not fit in the GPU's memory are left open circles.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name, points in curves.items():
        numbers = [number for number, _ in points]
        for axis, values in (
            (left, [plan.hours for _, plan in points]),
            (right, [100 * plan.mfu for _, plan in points]),
        ):
            (line,) = axis.plot(numbers, values, label=name, linewidth=1.6)
            for number, value, (_, plan) in zip(numbers, values, points, strict=True):
                face = line.get_color() if plan.fits else "white"
                axis.plot(number, value, "o", color=line.get_color(), markerfacecolor=face, markersize=5)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylabel("hours of the run")
    right.set_ylabel("MFU in %")
    right.set_ylim(0, 1.15 * max(100 * plan.mfu for points in curves.values() for _, plan in points))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"{title}\nPredicted, not measured. Open circles: does not fit.", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
