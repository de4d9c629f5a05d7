"""Several runs' reports as one table: mean ± sample standard deviation over the runs (seeds) for each condition.

summary.json: {"tuned": {score: {"mean": m, "std": s, "values": [...]}}, "untuned": ..., "shuffled": ...,
"runs": [{"seed": ..., "commit": ..., ...}]}.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.scoring.report import replace_text
from pipeline.scoring.scores import CONDITIONS, SCORES


def read_report(run: Path) -> dict[str, Any]:
    """The report.json of a run's folder. ValueError if there is none."""
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: evaluate that run first (pipeline/evaluate_mmud.py --checkpoint {run})")
    return json.loads(path.read_text())


def summarise(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation (n-1 in the denominator) and values of every score; None where a run lacks the score.

    Raises ValueError for fewer than two reports, or for reports of different splits, protocols or sample counts.
    """
    if len(reports) < 2:
        raise ValueError(f"a mean over runs needs at least two reports, found {len(reports)}")
    for name in ("samples", "split", "protocol"):
        found = {json.dumps(report["run"].get(name), sort_keys=True) for report in reports}
        if len(found) > 1:
            raise ValueError(f"the reports differ in {name}: {', '.join(sorted(found))}; compare like with like")
    summary: dict[str, Any] = {}
    for condition in CONDITIONS:
        summary[condition] = {}
        for name in SCORES:
            # A report of before a score existed lacks it.
            values = [report.get(condition, {}).get(name) for report in reports]
            known = None not in values
            mean, std = (statistics.fmean(values), statistics.stdev(values)) if known else (None, None)
            summary[condition][name] = {"mean": mean, "std": std, "values": values}
    kept = ("seed", "commit", "checkpoint", "seconds", "samples", "split", "protocol", "device", "versions")
    summary["runs"] = [{key: report["run"].get(key) for key in kept} for report in reports]
    return summary


def format_summary(summary: Mapping[str, Any], title: str) -> str:
    """The table as Markdown, with the runs under it."""
    lines = [f"# {title}", "", f"Mean ± standard deviation over {len(summary['runs'])} seeds.", ""]
    forced = any(found["mean"] is not None for found in summary["teacher_forced"].values())
    conditions = [condition for condition in CONDITIONS if condition != "teacher_forced" or forced]
    lines += ["| task | score | " + " | ".join(conditions) + " |", "|---|---|" + "---:|" * len(conditions)]
    previous = ""
    for name, score in SCORES.items():
        cells = []
        for condition in conditions:
            found = summary[condition][name]
            known = found["mean"] is not None
            cells.append(f"{found['mean']:.{score.digits}f} ± {found['std']:.{score.digits}f}" if known else "–")
        lines.append(f"| {score.task if score.task != previous else ''} | {score.label} | {' | '.join(cells)} |")
        previous = score.task
    lines += ["", *(f"- **{name}**: {CONDITIONS[name]}" for name in conditions), ""]
    lines += ["| seed | commit | checkpoint | samples | seconds by stage |", "|---|---|---|---|---|"]
    for run in summary["runs"]:
        seconds = ", ".join(f"{stage} {s:.0f}" for stage, s in run["seconds"].items())
        samples = ", ".join(f"{n} {task}" for task, n in run["samples"].items())
        lines.append(
            f"| {run['seed']} | {run['commit'] or 'none'} | {Path(run['checkpoint']).name} | {samples} | {seconds} |"
        )
    first = summary["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines += ["", f"Split {first['split']}, {first['protocol']} decoding, on {first['device']}. {versions}."]
    return "\n".join(lines) + "\n"


def write_summary(runs: Sequence[Path], folder: Path, title: str) -> str:
    """Reads the runs' reports, writes summary.json and summary.md to `folder`, and returns the Markdown."""
    summary = summarise([read_report(run) for run in runs])
    folder.mkdir(parents=True, exist_ok=True)
    text = format_summary(summary, title)
    replace_text(folder / "summary.md", text)
    replace_text(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return text
