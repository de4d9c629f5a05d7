"""The paper's ablations and the comparison with PEFT's adapters, each as a list of rows: a name, a label, train flags.

Table 3 switches off the EMA, the sparsity and each task and tunes other projections, Table 4 crosses the active share
beta with the number of tasks, Table 5 changes the activation pattern. `learning_rates` and `baselines` are ours.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.tasks import TASKS
from pipeline.scoring.ablation_table import Row
from pipeline.scoring.records import read_object

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""Tried for each tuner's own part; everything else keeps the preset's rate."""
CHOSEN_BY: tuple[tuple[tuple[str, float], ...], ...] = (
    (("referring_miou", 1),),
    (("reasoning_miou", 1),),
    # Objects are named in the mini world only. CIDEr goes to 10, the other scores to 1: a tenth of it weighs alike.
    (("caption_object_f1", 1), ("caption_cider", 0.1)),
    (("picture_text_r1_of_50", 1),),
)
"""A learning rate is chosen by the mean of these on the validation split: of each task the first (score, factor) that
the runs have. A task without a score is left out, as pictures without a VQGAN and a prior or of fewer than 50 texts."""
_TUNERS = {"neural": "lr_sparse", "lora": "lr_adapter", "ia3": "lr_adapter"}
_LABELS = {"neural": "neural tuning", "lora": "LoRA, matched size", "ia3": "IA3"}


@dataclass(frozen=True, slots=True)
class Study:
    """What a table compares. split: of the data that its runs are scored on; reference: label of the row that the
    others are compared with, "" for none; note: a sentence on how the rows were made, "" for none."""

    title: str
    rows: tuple[Row, ...]
    split: str = "test"
    reference: str = ""
    note: str = ""


def make_study(name: str, folder: Path, train_flags: str = "", eval_flags: str = "") -> Study:
    """The study of that name. `folder` is that of its runs, the flags those that every run gets; baselines reads its
    sister learning_rates.

    Raises ValueError if baselines is asked for before learning_rates has been run, or with other flags.
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
    rows, note = _baselines(
        folder.parent / "learning_rates" / "table.json", {"train_flags": train_flags, "eval_flags": eval_flags}
    )
    return Study("Neural tuning beside LoRA and IA3", rows, reference=rows[0].label, note=note)


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


def _baselines(chosen_from: Path, flags: Mapping[str, str]) -> tuple[tuple[Row, ...], str]:
    """Each tuner at its best rate, and by what that was chosen. flags: train_flags and eval_flags of the baselines."""
    if not chosen_from.is_file():
        raise ValueError(
            f"baselines takes each tuner's learning rate from {chosen_from}, which is missing: run the study "
            "learning_rates first, next to it"
        )
    table = read_object(chosen_from, "make it again by learning_rates --table_only")
    for name, own in flags.items():
        # A table of before the flags were kept lacks them.
        other = table.get(name, own)
        if shlex.split(str(other)) != shlex.split(own):
            raise ValueError(
                f"{chosen_from} was made with --{name} {other!r}, baselines with {own!r}: rates that were chosen at "
                "another training or scoring mean little, so give both studies the same"
            )
    tried = {f"{tuner}_{rate:g}": (tuner, rate) for tuner in _TUNERS for rate in LEARNING_RATES}
    means = {row: _means(table, row) for row in tried}
    chosen = [found for choice in CHOSEN_BY if (found := _first_scored(choice, means, chosen_from))]
    if not chosen:
        names = ", ".join(score for choice in CHOSEN_BY for score, _ in choice)
        raise ValueError(f"{chosen_from} has none of {names}: finish the study learning_rates first")

    def total(row: str) -> float:
        return sum(means[row][score] * factor for score, factor in chosen)

    rows = []
    for tuner, flag in _TUNERS.items():
        _, rate = tried[max((row for row in tried if tried[row][0] == tuner), key=total)]
        rows.append(Row(tuner, f"{_LABELS[tuner]}, {rate:g}", ("--tuner", tuner, f"--{flag}", f"{rate:g}")))
    by = ", ".join(score if factor == 1 else f"{score} x {factor:g}" for score, factor in chosen)
    return tuple(rows), f"Each learning rate is the best by the mean of {by} on the validation split."


def _means(table: Mapping[str, Any], row: str) -> dict[str, float]:
    """The means of a row's scores in table.json, of those that it has."""
    found: Any = table
    for name in ("rows", row, "scores"):
        found = found.get(name) if isinstance(found, dict) else None
    scores = found if isinstance(found, dict) else {}
    means = {name: score.get("mean") for name, score in scores.items() if isinstance(score, dict)}
    return {name: mean for name, mean in means.items() if isinstance(mean, int | float)}


def _first_scored(
    choice: tuple[tuple[str, float], ...], means: Mapping[str, Mapping[str, float]], path: Path
) -> tuple[str, float] | None:
    """The first score of the choice that some row has, None if there is none. ValueError if other rows lack it."""
    for score, factor in choice:
        lacking = [row for row, found in means.items() if score not in found]
        if not lacking:
            return score, factor
        if len(lacking) < len(means):
            raise ValueError(
                f"{path} lacks {score} of {', '.join(lacking)}, which other rows have: finish the study learning_rates "
                "first"
            )
    return None
