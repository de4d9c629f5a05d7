"""What a run keeps on disk of its tracking, so that nothing is lost whatever happens to MLflow or to the process.

    metrics.jsonl          one line per logging step or evaluation: {"step", "time", "metrics"}; the truth of the run
    system_metrics.jsonl   the same for CPU, memory, disk, network and GPU; its steps count samples
    outbox.jsonl           settings, tags, files and the status that MLflow has not been seen to take; gone when
                           everything has arrived
    mlflow.json            which run of which MLflow store this is
    mlflow.lock            held, shared, by every process that sends; alone by one that sends what others left

Lines are flushed when written. A line that a kill has cut off is passed over.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.runtime.provenance import write_json

METRICS = "metrics.jsonl"
SYSTEM_METRICS = "system_metrics.jsonl"
OUTBOX = "outbox.jsonl"
STATE = "mlflow.json"
_LOCK = "mlflow.lock"
Event = dict[str, Any]
"""One thing to send: a line of a file above; "kind" says what it is (none: metrics)."""


def read_lines(path: Path) -> list[Event]:
    """The whole lines of a JSONL file; [] if there is none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def append(file: TextIO, line: Mapping[str, Any]) -> None:
    """One line, with the operating system when this returns."""
    file.write(json.dumps(line, default=str) + "\n")
    file.flush()


def open_to_append(path: Path) -> TextIO:
    """A file that lines are added to; what a kill cut off is ended first, so that it spoils no line but its own."""
    cut = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as found:
            found.seek(-1, os.SEEK_END)
            cut = found.read() != b"\n"
    file = path.open("a", encoding="utf-8")
    if cut:
        file.write("\n")
    return file


def rewrite(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Puts `lines` in the file's place in one stroke; without lines the file goes."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not text:
        path.unlink(missing_ok=True)
        return
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def keep_until(path: Path, step: int) -> list[Event]:
    """The lines of metrics.jsonl up to `step`; later ones leave the file, since those steps are trained again."""
    lines = [line for line in read_lines(path) if line.get("step", math.inf) <= step]
    if path.exists():
        rewrite(path, lines)
    return lines


def read_state(folder: Path, **first: str) -> dict[str, Any]:
    """mlflow.json, with a "uid" that names this run in every store; made here, with `first`, if there is none."""
    path = folder / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        found = None
    state: dict[str, Any] = found if isinstance(found, dict) else {}
    if "uid" not in state:
        state = {"uid": uuid.uuid4().hex, **first, **state}
        write_json(path, state)
    return state


class SendingLock:
    """mlflow.lock of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / _LOCK).open("a")

    def alone(self) -> bool:
        """Takes it for this process alone if nobody else holds it; says whether it does."""
        return self._take(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def share(self) -> None:
        """Takes it, or keeps it, beside other senders; waits for one that has it alone."""
        self._take(fcntl.LOCK_SH)

    def release(self) -> None:
        """Lets it go."""
        self._file.close()

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind)
        except BlockingIOError:
            return False
        except OSError:
            # A file system without locks: two senders at once would be a rare pity, sending nothing a certain one.
            pass
        return True
