"""The paper's tables from reports, as Markdown and CSV, with printed numbers beside ours.

Table 1 holds segmentation, Table 2 captions and pictures. A row is a run of ours (with its 95 % interval) or a model
whose figures others printed: those are marked "printed", with where they stand and on what they were taken. Only
numbers that we have seen in print are here; the rest is left empty ("–"), also where a paper has one.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.scoring.records import make_folder, read_report
from pipeline.scoring.report import replace_text


@dataclass(frozen=True, slots=True)
class Column:
    """A score of the report as a table shows it: times `scale`, with so many decimals."""

    score: str
    label: str
    scale: float = 100.0
    digits: int = 1


@dataclass(frozen=True, slots=True)
class Printed:
    """A model's figures as others printed them, by score, and where."""

    model: str
    source: str
    figures: Mapping[str, str] = field(default_factory=dict)


TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "table1": (
        "Segmentation",
        tuple(
            Column(f"{task}_{score}", f"{task} {label}")
            for task in ("reasoning", "referring")
            for score, label in (("miou", "mIoU"), ("oiou", "oIoU"), ("p50", "P@.5"), ("p70", "P@.7"), ("p90", "P@.9"))
        ),
    ),
    "table2": (
        "Captions and pictures",
        (
            *(Column(f"caption_bleu{n}", f"BLEU-{n}") for n in (1, 2, 3, 4)),
            Column("caption_meteor", "METEOR"),
            Column("caption_rouge_l", "ROUGE-L"),
            Column("caption_cider", "CIDEr"),
            Column("picture_fid", "FID", 1.0, 2),
            Column("picture_kid", "KID x 1000", 1000.0, 2),
            Column("picture_is", "IS", 1.0, 2),
            Column("picture_clip_cosine", "CLIP cosine"),
        ),
    ),
}
PRINTED = (
    Printed(
        "Neural Tuning (the paper's models)",
        "arXiv 2408.03001, on MMUD; KID over its models, read as times 1000, number of pictures unstated; "
        "7B takes 80 ms for a pair on an RTX 4090 and 2.47 TFLOPs (multiply-adds) for 257 + 110 tokens",
        {"picture_kid": "12–16"},
    ),
    Printed(
        "LISA-13B",
        "as its users quote it (issue 82 of its repository; 56.9 was reproduced there); not on MMUD, teacher-forced",
        {"reasoning_miou": "60.0"},
    ),
)


def _ours(report: Mapping[str, Any], condition: str, column: Column) -> str:
    value = report.get(condition, {}).get(column.score)
    if value is None:
        return "–"
    text = f"{column.scale * value:.{column.digits}f}"
    ends = report.get("intervals", {}).get(condition, {}).get(column.score)
    return text + (f" [{', '.join(f'{column.scale * end:.{column.digits}f}' for end in ends)}]" if ends else "")


def table_rows(reports: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> list[list[str]]:
    """Cells (model, kind, a cell per column, note): each run free-running and, where it was scored, teacher-forced,
    then what others printed."""
    rows = []
    for name, report in reports.items():
        run = report["run"]
        for condition, protocol in (("tuned", run["protocol"]), ("teacher_forced", "teacher-forced")):
            cells = [_ours(report, condition, column) for column in columns]
            if condition == "tuned" or set(cells) != {"–"}:
                rows.append([name, "measured", *cells, f"{run['split']} split, {protocol}"])
    for printed in PRINTED:
        cells = [printed.figures.get(column.score, "–") for column in columns]
        if set(cells) != {"–"}:
            rows.append([printed.model, "printed", *cells, printed.source])
    return rows


def _markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 3) + "---|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _refcoco(reports: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the runs that were scored phrase by phrase, as the RefCOCO family is."""
    columns = (Column("referring_oiou", ""), Column("referring_miou", ""))
    return [
        [name, "measured", *(_ours(report, "tuned", column) for column in columns), where]
        for name, report in reports.items()
        if report["run"].get("phrases") == "each alone"
        for where in [f"{Path(report['run'].get('data') or '').name} {report['run']['split']}"]
    ]


def write_tables(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Writes tables.md, table1.csv and table2.csv of the runs' reports (by name), and refcoco.csv where one was scored
    phrase by phrase; returns the path of tables.md."""
    make_folder(folder)
    lines = [
        "# The paper's tables",
        "",
        "Rows marked *measured* are ours, in per cent unless the head says otherwise, with 95 % bootstrap intervals "
        "over samples. Rows marked *printed* are copied from where the note says and were not measured here.",
        "",
    ]
    made = [
        (name, title, [c.label for c in columns], table_rows(reports, columns))
        for name, (title, columns) in TABLES.items()
    ]
    if rows := _refcoco(reports):
        made.append(("refcoco", "RefCOCO family: one mask for each phrase", ["oIoU", "mIoU"], rows))
    for name, title, labels, rows in made:
        head = ["model", "figures are", *labels, "note"]
        heading = f"Table {name[-1]}. {title}" if name.startswith("table") else title
        lines += _markdown(heading, head, rows)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([head, *rows])
        replace_text(folder / f"{name}.csv", buffer.getvalue())
    path = folder / "tables.md"
    replace_text(path, "\n".join(lines))
    return path


def table_runs(runs: Sequence[Path], folder: Path) -> str:
    """The tables of several evaluated runs, a row of each; returns the Markdown.

    Raises ValueError for no run, for one that is named twice, and for one without a whole report.
    """
    if not runs:
        raise ValueError("--tables names no run: give the folders of evaluated runs, with commas")
    reports = [read_report(run) for run in runs]
    return write_tables(dict(zip(_names(runs), reports, strict=True)), folder).read_text(encoding="utf-8")


def _names(runs: Sequence[Path]) -> list[str]:
    """The ends of the runs' paths, as long as it takes to tell them apart. ValueError if two are the same."""
    # Links keep the name they were given.
    paths = [Path(os.path.abspath(run)).parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = [str(Path(*parts[-length:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    twice = next(str(run) for run, parts in zip(runs, paths, strict=True) if paths.count(parts) > 1)
    raise ValueError(f"--tables names {twice} twice: name each run once")
