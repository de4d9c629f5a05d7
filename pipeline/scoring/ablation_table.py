"""The runs of a study as the paper's kind of table: mean ± standard deviation over seeds, in Markdown, CSV and JSON.

A score that differs from that of the reference row (in a grid: of the reference label in the same column) by more than
two standard errors of the difference is marked.

table.json: {"title": ..., "reference": label or "", "train_flags": ..., "eval_flags": those of every run, "rows":
{name: {"label": ..., "column": ..., "flags": [...], "seeds": [...], "scores": {score: {"mean": m, "std": s or null,
"values": [...], "against_reference": "higher", "lower", "same" or null} or null}}}}.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.scoring.report import SCORES, replace_text


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of a study. name: of its folder; flags: of train.py; column: in a study with two dimensions."""

    name: str
    label: str
    flags: tuple[str, ...]
    column: str = ""


COLUMNS = (
    *("referring_miou", "referring_oiou", "reasoning_miou", "reasoning_oiou"),
    *("caption_bleu4", "caption_cider", "caption_object_f1", "picture_text_r1_of_50", "picture_clip_cosine"),
)
"""What table.md shows; table.csv and table.json have every score."""
Figures = Mapping[str, Mapping[str, Any] | None]
"""Score -> mean, std (None for one seed), values and against_reference; None where no run has it."""
_MARKS = {"higher": " ▲", "lower": " ▼"}


def figures(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Mean, sample standard deviation and values of each score of the tuned condition over the seeds' reports."""
    found: dict[str, dict[str, Any] | None] = {}
    for name in SCORES:
        # A report of before a score existed lacks it.
        values = [report["tuned"].get(name) for report in reports]
        if not values or None in values:
            found[name] = None
        else:
            std = statistics.stdev(values) if len(values) > 1 else None
            found[name] = {"mean": statistics.fmean(values), "std": std, "values": values, "against_reference": None}
    return found


def compare(one: Mapping[str, Any] | None, reference: Mapping[str, Any] | None) -> str | None:
    """ "higher" or "lower" if the means differ by more than 2 sqrt(s1^2/n1 + s2^2/n2), else "same".

    None where either is of fewer than two seeds, or missing.
    """
    if one is None or reference is None or one["std"] is None or reference["std"] is None:
        return None
    error = math.hypot(*(x["std"] / math.sqrt(len(x["values"])) for x in (one, reference)))
    difference = one["mean"] - reference["mean"]
    if abs(difference) <= 2 * error:
        return "same"
    return "higher" if difference > 0 else "lower"


def write_table(
    folder: Path,
    title: str,
    rows: Sequence[Row],
    reports: Mapping[str, Mapping[int, Mapping[str, Any]]],
    note: str,
    reference: str = "",
    train_flags: str = "",
    eval_flags: str = "",
) -> str:
    """Writes table.md, table.csv and table.json of the rows that have reports, and returns the Markdown.

    reports: row name -> seed -> its report.json. note: a line below the table, such as the command. reference: label
    of the row that the others are compared with; "" for none. train_flags, eval_flags: those of every run.
    """
    columns = list(dict.fromkeys(row.column for row in rows))
    rows = [row for row in rows if reports.get(row.name)]
    by_row = {row.name: figures(list(reports[row.name].values())) for row in rows}
    seeds = {row.name: sorted(reports[row.name]) for row in rows}
    of_column = {row.column: by_row[row.name] for row in rows if row.label == reference}
    for row in rows:
        for score, found in by_row[row.name].items():
            if found and row.column in of_column and row.label != reference:
                found["against_reference"] = compare(found, of_column[row.column][score])
    data = {
        row.name: {"label": row.label, "column": row.column, "flags": list(row.flags), "seeds": seeds[row.name]}
        | {"scores": by_row[row.name]}
        for row in rows
    }
    body = _grids(rows, by_row, columns) if rows[0].column else _plain(rows, by_row, seeds)
    marks = f" ▲ higher, ▼ lower than *{reference}* by more than two standard errors of the difference."
    intro = f"Mean ± standard deviation over the seeds.{marks if of_column else ''}"
    text = f"# {title}\n\n{intro}\n\n{body}\n{note}\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "table.md", text)
    replace_text(folder / "table.csv", _csv(rows, by_row))
    whole = {"title": title, "reference": reference, "train_flags": train_flags, "eval_flags": eval_flags}
    replace_text(folder / "table.json", json.dumps({**whole, "rows": data}, indent=1) + "\n")
    return text


def _shown(by_row: Mapping[str, Figures]) -> list[str]:
    """The columns that some row has a score for."""
    return [name for name in COLUMNS if any(row[name] for row in by_row.values())]


def _cell(found: Mapping[str, Any] | None, digits: int) -> str:
    if found is None:
        return "–"
    spread = "" if found["std"] is None else f" ± {found['std']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}{_MARKS.get(found['against_reference'] or '', '')}"


def _plain(rows: Sequence[Row], by_row: Mapping[str, Figures], seeds: Mapping[str, Sequence[int]]) -> str:
    names = _shown(by_row)
    heads = ["", *(f"{SCORES[name].task}: {SCORES[name].label}" for name in names), "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(names) + 1)]
    for row in rows:
        cells = [_cell(by_row[row.name][name], SCORES[name].digits) for name in names]
        lines.append("| " + " | ".join([row.label, *cells, str(len(seeds[row.name]))]) + " |")
    return "\n".join(lines) + "\n"


def _grids(rows: Sequence[Row], by_row: Mapping[str, Figures], columns: Sequence[str]) -> str:
    columns = [column for column in columns if any(row.column == column for row in rows)]
    labels = list(dict.fromkeys(row.label for row in rows))
    place: dict[tuple[str, str], Figures] = {(row.label, row.column): by_row[row.name] for row in rows}
    blocks = []
    for name in _shown(by_row):
        score = SCORES[name]
        lines = [f"## {score.task}: {score.label}", "", "| | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---:|" * len(columns))
        for label in labels:
            cells = [_cell(place.get((label, column), {}).get(name), score.digits) for column in columns]
            lines.append("| " + " | ".join([label, *cells]) + " |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _csv(rows: Sequence[Row], by_row: Mapping[str, Figures]) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["row", "label", "column", "flags", "score", "mean", "std", "seeds", "against_reference"])
    for row in rows:
        for name, found in by_row[row.name].items():
            if found:
                statistic = [found["mean"], found["std"], len(found["values"]), found["against_reference"]]
                table.writerow([row.name, row.label, row.column, " ".join(row.flags), name, *statistic])
    return out.getvalue()
