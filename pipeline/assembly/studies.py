"""The paper's ablations and the comparison with PEFT's adapters, each as a list of rows: a name, a label, train flags.

Table 3 switches off the EMA, the sparsity and each task and tunes other projections, Table 4 crosses the active share
beta with the number of tasks, Table 5 changes the activation pattern. `learning_rates` and `baselines` are ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.tasks import TASKS
from pipeline.scoring.ablation_table import Row

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""Tried for each tuner's own part; everything else keeps the preset's rate."""
CHOSEN_BY = ("referring_miou", "reasoning_miou", "caption_object_f1", "picture_text_r1_of_50")
"""A learning rate is chosen by the mean of these scores on the validation split: one score of each task."""
_TUNERS = {"neural": "lr_sparse", "lora": "lr_adapter", "ia3": "lr_adapter"}
_LABELS = {"neural": "neural tuning", "lora": "LoRA, matched size", "ia3": "IA3"}


@dataclass(frozen=True, slots=True)
class Study:
    """What a table compares. split: of the data that its runs are scored on; reference: label of the row that the
    others are compared with, "" for none."""

    title: str
    rows: tuple[Row, ...]
    split: str = "test"
    reference: str = ""


def make_study(name: str, folder: Path) -> Study:
    """The study of that name. `folder` is that of its runs; baselines reads its sister learning_rates.

    Raises ValueError if baselines is asked for before learning_rates has been run.
    """
    if name == "table3":
        return Study("Neural tuning, one thing changed at a time", _table3(), reference="all")
    if name == "table4":
        return Study("Active share by number of tasks", _table4(), reference="β = 0.4")
    if name == "table5":
        patterns = ("gaussian", "top2beta", "level", "distribution")
        rows = tuple(Row(one, one, ("--activation_pattern", one)) for one in patterns)
        return Study("Activation patterns", rows, reference=patterns[0])
    if name == "learning_rates":
        return Study("Learning rate of each tuner, on the validation split", _learning_rates(), split="valid")
    rows = _baselines(folder.parent / "learning_rates" / "table.json")
    return Study("Neural tuning beside LoRA and IA3", rows, reference=rows[0].label)


def _table3() -> tuple[Row, ...]:
    rows = [
        Row("full", "all", ()),
        Row("no_ema", "without EMA", ("--alpha", "0")),
        Row("no_sparsity", "without sparsity", ("--beta", "1")),
        Row("neither", "without both", ("--alpha", "0", "--beta", "1")),
    ]
    for task in TASKS:
        rest = ",".join(other for other in TASKS if other != task)
        rows.append(Row(f"no_{task}", f"without {task}", ("--tasks", rest)))
    for projections in ("q", "k", "v", "qk", "kv", "qkv"):
        rows.append(Row(projections, f"tuned: {', '.join(projections)}", ("--projections", projections)))
    return tuple(rows)


def _table4() -> tuple[Row, ...]:
    names = list(TASKS)
    return tuple(
        Row(
            f"beta{beta:g}_tasks{count}",
            f"β = {beta:g}",
            ("--beta", f"{beta:g}", "--tasks", ",".join(names[:count])),
            column=f"{count} task{'s' if count > 1 else ''}",
        )
        for beta in (0.2, 0.4, 0.6, 0.8, 1.0)
        for count in range(1, len(names) + 1)
    )


def _learning_rates() -> tuple[Row, ...]:
    return tuple(
        Row(f"{tuner}_{rate:g}", f"{_LABELS[tuner]}, {rate:g}", ("--tuner", tuner, f"--{name}", f"{rate:g}"))
        for tuner, name in _TUNERS.items()
        for rate in LEARNING_RATES
    )


def _baselines(chosen_from: Path) -> tuple[Row, ...]:
    try:
        tried = json.loads(chosen_from.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"baselines takes each tuner's learning rate from {chosen_from}: run the study learning_rates first, next "
            f"to it ({error})"
        ) from error
    rows = []
    for tuner, name in _TUNERS.items():
        means: dict[float, float] = {}
        for rate in LEARNING_RATES:
            scores = tried.get(f"{tuner}_{rate:g}", {}).get("scores", {})
            found = [scores[score]["mean"] for score in CHOSEN_BY if scores.get(score)]
            if len(found) < len(CHOSEN_BY):
                raise ValueError(f"{chosen_from} lacks {tuner} at {rate:g}: finish the study learning_rates first")
            means[rate] = sum(found) / len(found)
        best = max(means, key=lambda rate: means[rate])
        rows.append(Row(tuner, f"{_LABELS[tuner]}, {best:g}", ("--tuner", tuner, f"--{name}", f"{best:g}")))
    return tuple(rows)
