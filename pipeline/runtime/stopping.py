"""Being asked to stop: a signal sets a flag, which the ranks agree on at step boundaries.

A launcher or SLURM may signal the ranks one after another, so that a save begun in a handler would wait for ranks that
know nothing of it. The marker files tell a job script how a run ended: DONE, or REQUEUE to be started again.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

DONE, REQUEUE = "DONE", "REQUEUE"
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """True once a signal came."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def set(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        self.name = signal.Signals(number).name


_watched: StopFlag | None = None


@contextlib.contextmanager
def watching() -> Iterator[StopFlag]:
    """Within this context SIGTERM and SIGUSR2 set the flag and do nothing else. Main thread only.

    Contexts may be nested and share the outermost one's flag: a script watches from its first second, so that a signal
    while models load stops the training after its first step instead of ending the process without a word.
    """
    global _watched
    if _watched is not None:
        yield _watched
        return
    _watched = StopFlag()
    before = {number: signal.signal(number, _watched.set) for number in SIGNALS}
    try:
        yield _watched
    finally:
        _watched = None
        for number, handler in before.items():
            signal.signal(number, handler)


def mark(output_dir: str | Path, name: str | None, text: str = "") -> None:
    """Leaves the marker `name` and no other; None removes both."""
    for marker in (DONE, REQUEUE):
        if marker != name:
            (Path(output_dir) / marker).unlink(missing_ok=True)
    if name:
        (Path(output_dir) / name).write_text(text + "\n", encoding="utf-8")
