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

from pipeline.scoring.records import make_folder, read_report
from pipeline.scoring.report import replace_text
from pipeline.scoring.scores import CONDITIONS, SCORES


def summarise(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation (n-1 in the denominator) and values of every score; None where a run lacks the score.

    Raises ValueError for fewer than two reports, for two of one run, or for reports of different samples, splits,
    protocols, data sets, kinds of phrases, or settings of the evaluation (but its seed).
    """
    if len(reports) < 2:
        raise ValueError(f"a mean over runs needs at least two reports, found {len(reports)}")
    runs = [report["run"] for report in reports]
    _check_alike(runs)
    made = [(run["checkpoint"], run.get("seed")) for run in runs if run.get("checkpoint")]
    if twice := next((one for one in made if made.count(one) > 1), None):
        raise ValueError(f"two reports are of one run, {twice[0]} of seed {twice[1]}: name each run once")
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
    summary["runs"] = [{key: run.get(key) for key in kept} for run in runs]
    return summary


def _check_alike(runs: Sequence[Mapping[str, Any]]) -> None:
    facts = [{name: run.get(name) for name in ("samples", "split", "protocol", "data", "phrases")} for run in runs]
    # Reports of before the settings were kept lack them: those are not compared.
    kept = [run["settings"] for run in runs if run.get("settings") is not None]
    names = sorted({name for settings in kept for name in settings} - {"seed"})
    settings = [{f"settings.{name}": one.get(name) for name in names} for one in kept]
    for alike in (facts, settings):
        for name in alike[0] if alike else ():
            found = {json.dumps(one[name], sort_keys=True) for one in alike}
            if len(found) > 1:
                raise ValueError(f"the reports differ in {name}: {', '.join(sorted(found))}; compare like with like")


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
        samples = run["samples"]
        if isinstance(samples, Mapping):
            samples = ", ".join(f"{n} {task}" for task, n in samples.items())
        lines.append(
            f"| {run['seed']} | {run['commit'] or 'none'} | {Path(run['checkpoint']).name} | {samples} | {seconds} |"
        )
    first = summary["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines += ["", f"Split {first['split']}, {first['protocol']} decoding, on {first['device']}. {versions}."]
    return "\n".join(lines) + "\n"


def write_summary(runs: Sequence[Path], folder: Path, title: str) -> str:
    """Reads the runs' reports, writes summary.json and summary.md to `folder`, and returns the Markdown.

    Raises ValueError for a run that is named twice or has no whole report, and as `summarise` does.
    """
    places = [run.resolve() for run in runs]
    if twice := next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise ValueError(f"{twice} is named twice: name each run once")
    summary = summarise([read_report(run) for run in runs])
    make_folder(folder)
    text = format_summary(summary, title)
    replace_text(folder / "summary.md", text)
    replace_text(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return text
