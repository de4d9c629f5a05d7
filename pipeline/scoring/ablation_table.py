"""The runs of a study as the paper's kind of table: mean ± standard deviation over seeds, in Markdown, CSV and JSON.

table.json: {"title": ..., "rows": {name: {"label": ..., "column": ..., "flags": [...], "seeds": [...],
"scores": {score: {"mean": m, "std": s, "values": [...]} or null}}}}.
"""

from __future__ import annotations

import csv
import io
import json
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
Figures = Mapping[str, Mapping[str, float] | None]
"""Score -> mean, std (0 for one seed) and values; None where no run has it."""


def figures(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Mean, sample standard deviation and values of each score of the tuned condition over the seeds' reports."""
    found: dict[str, dict[str, Any] | None] = {}
    for name in SCORES:
        values = [report["tuned"][name] for report in reports]
        if not values or None in values:
            found[name] = None
        else:
            std = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return found


def write_table(
    folder: Path, title: str, rows: Sequence[Row], reports: Mapping[str, Mapping[int, Mapping[str, Any]]], note: str
) -> str:
    """Writes table.md, table.csv and table.json of what is finished, and returns the Markdown.

    reports: row name -> seed -> its report.json. note: a line below the table, such as the command.
    """
    by_row = {row.name: figures(list(reports.get(row.name, {}).values())) for row in rows}
    seeds = {row.name: sorted(reports.get(row.name, {})) for row in rows}
    data = {
        row.name: {"label": row.label, "column": row.column, "flags": list(row.flags), "seeds": seeds[row.name]}
        | {"scores": by_row[row.name]}
        for row in rows
    }
    body = _grids(rows, by_row) if rows[0].column else _plain(rows, by_row, seeds)
    text = f"# {title}\n\nMean ± standard deviation over the seeds.\n\n{body}\n{note}\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "table.md", text)
    replace_text(folder / "table.csv", _csv(rows, by_row))
    replace_text(folder / "table.json", json.dumps({"title": title, "rows": data}, indent=1) + "\n")
    return text


def _shown(by_row: Mapping[str, Figures]) -> list[str]:
    """The columns that some row has a score for."""
    return [name for name in COLUMNS if any(row[name] for row in by_row.values())]


def _cell(found: Mapping[str, float] | None, digits: int) -> str:
    return "–" if found is None else f"{found['mean']:.{digits}f} ± {found['std']:.{digits}f}"


def _plain(rows: Sequence[Row], by_row: Mapping[str, Figures], seeds: Mapping[str, Sequence[int]]) -> str:
    names = _shown(by_row)
    heads = ["", *(f"{SCORES[name].task}: {SCORES[name].label}" for name in names), "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(names) + 1)]
    for row in rows:
        cells = [_cell(by_row[row.name][name], SCORES[name].digits) for name in names]
        lines.append("| " + " | ".join([row.label, *cells, str(len(seeds[row.name]))]) + " |")
    return "\n".join(lines) + "\n"


def _grids(rows: Sequence[Row], by_row: Mapping[str, Figures]) -> str:
    columns, labels = (list(dict.fromkeys(values)) for values in zip(*((r.column, r.label) for r in rows), strict=True))
    place = {(row.label, row.column): by_row[row.name] for row in rows}
    blocks = []
    for name in _shown(by_row):
        score = SCORES[name]
        lines = [f"## {score.task}: {score.label}", "", "| | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---:|" * len(columns))
        for label in labels:
            cells = [_cell(place[label, column][name], score.digits) for column in columns]
            lines.append("| " + " | ".join([label, *cells]) + " |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _csv(rows: Sequence[Row], by_row: Mapping[str, Figures]) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["row", "label", "column", "flags", "score", "mean", "std", "seeds"])
    for row in rows:
        for name, found in by_row[row.name].items():
            if found:
                values: Any = found["values"]
                table.writerow(
                    [
                        row.name,
                        row.label,
                        row.column,
                        " ".join(row.flags),
                        name,
                        found["mean"],
                        found["std"],
                        len(values),
                    ]
                )
    return out.getvalue()
