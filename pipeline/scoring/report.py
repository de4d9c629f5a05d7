"""The report of an evaluation: report.json for machines, report.md for people, and one table for the terminal.

report.json holds exactly three conditions, each with exactly the keys of `SCORES`, and "run":

    {"tuned": {...}, "untuned": {...}, "shuffled": {...},
     "run": {"samples": ..., "seconds": {stage: s}, "versions": {package: version}, "commit": ..., ...}}

A score that was not computed is null, never left out. Scores are fractions ([0,1]; CIDEr [0,10]; cosine [-1,1]). What
else a scorer returned (precision at thresholds, counts, conventions) goes to details.json beside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONDITIONS = {
    "tuned": "the tuned model",
    "untuned": "the same model before tuning",
    "shuffled": "the tuned model, each question with another sample's picture (for pictures: another sample's text)",
}


@dataclass(frozen=True, slots=True)
class Score:
    """How one score is shown: its task, a label, decimals, and one line on what it is."""

    task: str
    label: str
    digits: int
    meaning: str


_PER_OBJECT = "mean IoU per object, Hungarian matching; missed and extra masks count 0"
_OVERALL = "summed intersections over summed unions; missed and extra masks stand in the union"
_NAMES = "share of answers whose words name exactly the right objects"
SCORES = {
    "referring_miou": Score("referring segmentation", "mIoU", 3, _PER_OBJECT),
    "referring_oiou": Score("referring segmentation", "oIoU", 3, _OVERALL),
    "referring_object_accuracy": Score("referring segmentation", "right objects named", 3, _NAMES),
    "reasoning_miou": Score("reasoning segmentation", "mIoU", 3, _PER_OBJECT),
    "reasoning_oiou": Score("reasoning segmentation", "oIoU", 3, _OVERALL),
    "reasoning_object_accuracy": Score("reasoning segmentation", "right objects named", 3, _NAMES),
    "caption_bleu4": Score("captioning", "BLEU-4", 3, "corpus BLEU of 4-grams"),
    "caption_cider": Score("captioning", "CIDEr", 3, "CIDEr-D over this set of references; papers print it times 100"),
    "caption_object_f1": Score("captioning", "object F1", 3, "F1 of the objects that the caption names"),
    "picture_text_r1_of_50": Score(
        "picture generation",
        "text R@1 of 50",
        3,
        "own text nearest to the picture among 50 texts, by CLIP; chance .020",
    ),
    "picture_clip_cosine": Score("picture generation", "CLIP cosine", 3, "mean CLIP cosine of picture and text"),
}
RUN_KEYS = ("samples", "seconds", "versions", "commit")


def _plain(value: Any, name: str) -> float | None:
    """A score as a Python float, None for not computed. NaN is no score: it is refused, with its name."""
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the score {name} is {number}; a score that cannot be computed is None")
    return number


def build_report(conditions: Mapping[str, Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """The report as one dictionary, checked.

    conditions: scores by name for some or all of `CONDITIONS`; what is missing becomes None.
    run: at least samples (int or per-task counts), seconds (per stage), versions, commit; anything else JSON can hold.
    Raises ValueError for an unknown condition or score, a missing run key, or a score that is NaN or infinite.
    """
    unknown = sorted(set(conditions) - set(CONDITIONS))
    if unknown:
        raise ValueError(f"unknown conditions {unknown}; known are {list(CONDITIONS)}")
    missing = [key for key in RUN_KEYS if key not in run]
    if missing:
        raise ValueError(f"the report's run lacks {missing}")
    report: dict[str, Any] = {}
    for condition in CONDITIONS:
        scores = conditions.get(condition, {})
        odd = sorted(set(scores) - set(SCORES))
        if odd:
            raise ValueError(f"unknown scores {odd} of {condition}; known are {list(SCORES)}")
        report[condition] = {name: _plain(scores.get(name), f"{condition}.{name}") for name in SCORES}
    report["run"] = dict(run)
    return report


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    return [
        (score.task, score.label, [_cell(report[condition][name], score.digits) for condition in CONDITIONS])
        for name, score in SCORES.items()
    ]


def format_table(report: Mapping[str, Any]) -> str:
    """The one table for the terminal: a row per score, a column per condition, "–" where there is no score."""
    rows = _rows(report)
    wide = max(len(task) for task, _, _ in rows)
    label_wide = max(len(label) for _, label, _ in rows)
    column = max(map(len, CONDITIONS)) + 2
    head = " " * (wide + 2 + label_wide) + "".join(f"{condition:>{column}}" for condition in CONDITIONS)
    lines = [head, "─" * len(head)]
    previous = rows[0][0]
    for task, label, cells in rows:
        if task != previous:
            lines.append("")
        shown = task if task != previous or len(lines) == 2 else ""
        lines.append(f"{shown:<{wide}}  {label:<{label_wide}}" + "".join(f"{cell:>{column}}" for cell in cells))
        previous = task
    return "\n".join(lines)


def _samples_line(samples: Any) -> str:
    return ", ".join(f"{n} {name}" for name, n in samples.items()) if isinstance(samples, Mapping) else str(samples)


def format_markdown(report: Mapping[str, Any], *, title: str = "Evaluation", notes: str = "", sheet: str = "") -> str:
    """report.md: the table, what each score means, the conditions, the run. sheet: the contact sheet's file name."""
    run = report["run"]
    lines = [f"# {title}", ""]
    if notes:
        lines += [notes, ""]
    lines += ["| task | score | " + " | ".join(CONDITIONS) + " |", "|---|---|" + "---:|" * len(CONDITIONS)]
    previous = ""
    for task, label, cells in _rows(report):
        lines.append(f"| {task if task != previous else ''} | {label} | " + " | ".join(cells) + " |")
        previous = task
    lines += ["", *(f"- **{name}**: {meaning}" for name, meaning in CONDITIONS.items()), ""]
    if sheet:
        lines += ["## Examples", "", f"![contact sheet]({sheet})", ""]
    lines += ["## What the scores are", ""]
    meanings: dict[str, str] = {}
    for score in SCORES.values():
        meanings.setdefault(score.label, score.meaning)
    lines += [f"- **{label}**: {meaning}" for label, meaning in meanings.items()]
    lines += ["", "## Run", "", f"- samples: {_samples_line(run['samples'])}", f"- commit: {run['commit'] or 'none'}"]
    lines += [f"- {name}: {value}" for name, value in run.items() if name not in RUN_KEYS]
    lines += [f"- versions: {', '.join(f'{name} {version}' for name, version in run['versions'].items())}"]
    lines += ["", "| stage | seconds |", "|---|---:|"]
    lines += [f"| {stage} | {seconds:.1f} |" for stage, seconds in run["seconds"].items()]
    return "\n".join(lines) + "\n"


def _finite(value: Any) -> Any:
    """The same containers with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_report(
    report: Mapping[str, Any],
    folder: str | Path,
    *,
    title: str = "Evaluation",
    notes: str = "",
    sheet: str = "",
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.json, report.md and, where given, details.json to `folder`; returns the path of report.json.

    report: from `build_report`. sheet: file name of the contact sheet in the same folder, "" for none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if details is not None:
        replace_text(folder / "details.json", json.dumps(_finite(details), indent=2, allow_nan=False) + "\n")
    replace_text(folder / "report.md", format_markdown(report, title=title, notes=notes, sheet=sheet))
    target = folder / "report.json"
    replace_text(target, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return target
