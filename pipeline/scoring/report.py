"""The report of an evaluation: report.json for machines, report.md for people, and one table for the terminal.

report.json holds the conditions, each with exactly the keys of `SCORES`, "intervals" and "run":

    {"tuned": {...}, "untuned": {...}, "shuffled": {...}, "teacher_forced": {...},
     "intervals": {condition: {score: [low, high]}},
     "run": {"samples": ..., "seconds": {stage: s}, "versions": {package: version}, "commit": ...,
             "settings": {what the figures depend on besides: setting: value}, ...}}

A score that was not computed is null, never left out. Scores are fractions ([0,1]; CIDEr [0,10]; cosine [-1,1]; the
distances from 0 up; IS from 1 up), to six decimals: the next depend on how many samples went through a model at a time.
What else a scorer returned (other conventions, counts) goes to details.json beside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.scoring.scores import CONDITIONS, SCORES

DIGITS = 6
RUN_KEYS = ("samples", "seconds", "versions", "commit")


def _plain(value: Any, name: str) -> float | None:
    """A score as a Python float, None for not computed. NaN is no score: it is refused, with its name."""
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the score {name} is {number}; a score that cannot be computed is None")
    return round(number, DIGITS)


def build_report(
    conditions: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
    intervals: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The report as one dictionary, checked.

    conditions: scores by name for some or all of `CONDITIONS`; what is missing becomes None.
    intervals: (low, high) by condition and score, for those that have one.
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
    report["intervals"] = {
        condition: {
            name: [_plain(end, f"an end of {condition}.{name}") for end in ends]
            for name, ends in found.items()
            if ends is not None
        }
        for condition, found in (intervals or {}).items()
    }
    report["run"] = dict(run)
    return report


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _rows(report: Mapping[str, Any], *, intervals: bool = False) -> list[tuple[str, str, list[str]]]:
    """(task, label, a cell per shown condition) of every score; the interval stands behind the figure if asked for."""

    def cell(condition: str, name: str, digits: int) -> str:
        text = _cell(report[condition][name], digits)
        ends = report["intervals"].get(condition, {}).get(name) if intervals else None
        return f"{text} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else text

    return [
        (score.task, score.label, [cell(condition, name, score.digits) for condition in shown_conditions(report)])
        for name, score in SCORES.items()
    ]


def shown_conditions(report: Mapping[str, Any]) -> list[str]:
    """The conditions that tables show: teacher-forced answers only where they were asked for."""
    forced = any(value is not None for value in report.get("teacher_forced", {}).values())
    return [condition for condition in CONDITIONS if condition != "teacher_forced" or forced]


def format_table(report: Mapping[str, Any]) -> str:
    """The one table for the terminal: a row per score, a column per condition, "–" where there is no score."""
    rows, conditions = _rows(report), shown_conditions(report)
    wide = max(len(task) for task, _, _ in rows)
    label_wide = max(len(label) for _, label, _ in rows)
    column = max(map(len, conditions)) + 2
    head = " " * (wide + 2 + label_wide) + "".join(f"{condition:>{column}}" for condition in conditions)
    lines = [head, "─" * len(head)]
    previous = rows[0][0]
    for task, label, cells in rows:
        if task != previous:
            lines.append("")
        shown = task if task != previous or len(lines) == 2 else ""
        lines.append(f"{shown:<{wide}}  {label:<{label_wide}}" + "".join(f"{cell:>{column}}" for cell in cells))
        previous = task
    return "\n".join(lines)


def tokenizer_note(report: Mapping[str, Any]) -> str:
    """What is to be said beside caption scores that are not comparable with published ones; "" where they are."""
    settings = report["run"].get("settings", {})
    if settings.get("caption tokenizer") != "simple":
        return ""
    return (
        "Captions were split by a tokenizer of our own, for want of java: BLEU, ROUGE-L and CIDEr differ from those "
        "after COCO's tokenizer, by which published figures are made."
    )


def _samples_line(samples: Any) -> str:
    return ", ".join(f"{n} {name}" for name, n in samples.items()) if isinstance(samples, Mapping) else str(samples)


def _run_line(name: str, value: Any) -> str:
    if name == "settings":
        value = ", ".join(f"{setting} {'none' if it in ('', None) else it}" for setting, it in value.items())
    return f"- {name}: {value}"


def format_markdown(report: Mapping[str, Any], *, title: str = "Evaluation", notes: str = "", sheet: str = "") -> str:
    """report.md: the table, what each score means, the conditions, the run. sheet: the contact sheet's file name."""
    run = report["run"]
    lines = [f"# {title}", ""]
    if notes:
        lines += [notes, ""]
    conditions = shown_conditions(report)
    lines += ["| task | score | " + " | ".join(conditions) + " |", "|---|---|" + "---:|" * len(conditions)]
    previous = ""
    for task, label, cells in _rows(report, intervals=True):
        lines.append(f"| {task if task != previous else ''} | {label} | " + " | ".join(cells) + " |")
        previous = task
    if report["intervals"]:
        lines += ["", "In brackets: 95 % bootstrap intervals over samples."]
    if note := tokenizer_note(report):
        lines += ["", note]
    lines += ["", *(f"- **{name}**: {CONDITIONS[name]}" for name in conditions), ""]
    if sheet:
        lines += ["## Examples", "", f"![contact sheet]({sheet})", ""]
    lines += ["## What the scores are", ""]
    meanings: dict[str, str] = {}
    for score in SCORES.values():
        meanings.setdefault(score.label, score.meaning)
    lines += [f"- **{label}**: {meaning}" for label, meaning in meanings.items()]
    lines += ["", "## Run", "", f"- samples: {_samples_line(run['samples'])}", f"- commit: {run['commit'] or 'none'}"]
    lines += [_run_line(name, value) for name, value in run.items() if name not in RUN_KEYS]
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
