"""report.json and other JSON records of runs, read back: what is wrong in one is a message with file and remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from pipeline.scoring.scores import CONDITIONS

_RUN_FIELDS: dict[str, tuple[type, ...]] = {
    "samples": (dict, int),
    "seconds": (dict,),
    "versions": (dict,),
    "split": (str,),
    "protocol": (str,),
    "checkpoint": (str,),
    # Reports of before these existed lack them.
    "data": (str, NoneType),
    "phrases": (str, NoneType),
    "settings": (dict, NoneType),
}


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. ValueError naming file and remedy if it cannot be read or holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return found


def read_report(run: Path, remedy: str = "") -> dict[str, Any]:
    """The report.json of a run's folder, with every field that the tables read.

    Raises ValueError naming the file, the field and the remedy ("" for: evaluate that run again) if it is missing,
    damaged, or no report.
    """
    path, command = run / "report.json", f"pipeline/evaluate_mmud.py --checkpoint {run}"
    if not path.is_file():
        raise ValueError(f"{path} is missing: evaluate that run first ({command})")
    remedy = remedy or f"evaluate that run again ({command})"
    report = read_object(path, remedy)
    if wrong := _fault(report):
        raise ValueError(f"{path} is no whole report ({wrong}): {remedy}")
    return report


def make_folder(folder: Path) -> None:
    """Makes the folder of what is written. ValueError if that cannot be, as where a file has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder ({error.strerror}): name another") from error


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fault(report: Mapping[str, Any]) -> str:
    """Which field of a report the tables cannot use; "" if none."""
    for name in ("run", "tuned"):
        if not isinstance(report.get(name), dict):
            return f"{name} is no object"
    run = report["run"]
    for name, kinds in _RUN_FIELDS.items():
        if not isinstance(run.get(name), kinds):
            return f"run.{name} is {'of another kind' if name in run else 'missing'}"
    if not all(_number(value) for value in run["seconds"].values()):
        return "run.seconds holds something other than numbers"
    intervals = report.get("intervals", {})
    if not isinstance(intervals, dict):
        return "intervals is no object"
    for condition in CONDITIONS:
        scores, ends = report.get(condition, {}), intervals.get(condition, {})
        if not isinstance(scores, dict) or not isinstance(ends, dict):
            return f"{condition} is no object"
        for name, value in scores.items():
            if value is not None and not _number(value):
                return f"{condition}.{name} is no number"
        for name, pair in ends.items():
            if not (isinstance(pair, list) and len(pair) == 2 and all(map(_number, pair))):
                return f"intervals.{condition}.{name} is no pair of numbers"
    return ""
