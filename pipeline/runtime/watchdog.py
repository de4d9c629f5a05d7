"""Two threads that end a rank which nobody else would: one that hangs, and one whose launcher is gone.

A hang: the ranks wait for each other in every step, so when one hangs all stop, and each prints where it stands. A
launcher that is killed takes nobody with it (deepspeed's command line even reports success): its ranks see that
their parent has changed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from types import TracebackType

import psutil

from pipeline.runtime.ranks import Ranks

_OTHERS = 5.0
"""Seconds that a rank which found a hang stays, so that the others speak before the launcher ends them."""
_MINUTE = 60.0


class Watchdog:
    """Ends this process, its stack printed under its rank's name, unless `beat` is called every `seconds` (0: never).

        with Watchdog(1800, ranks) as watchdog:
            ...
            watchdog.beat("step 12")     # what is done now

    The exit status is 1.
    """

    def __init__(self, seconds: float, ranks: Ranks) -> None:
        self.seconds, self.ranks = seconds, ranks
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat("the start")

    def beat(self, done: str) -> None:
        """Says what has been done; the time counts anew."""
        self._done, self._since = done, time.monotonic()
        if self.seconds and sys.__stderr__ is not None:
            # A thread of C: it also ends a process whose main thread hangs without giving Python's lock back.
            faulthandler.dump_traceback_later(self.seconds + _MINUTE, exit=True, file=sys.__stderr__)

    def __enter__(self) -> Watchdog:
        self.beat("the start")
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._since > self.seconds:
                self._end()

    def _end(self) -> None:
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
        # One write, so that the ranks' stacks do not mix.
        _say(
            f"rank {self.ranks.rank} (process {os.getpid()} on {socket.gethostname()}) hangs: nothing was done for "
            f"{self.seconds:g} s (--hang_timeout) after {self._done}. It stands here:\n{stack}"
        )
        time.sleep(_OTHERS)
        os._exit(1)


def watch_launcher(ranks: Ranks, *, grace: float = 300.0) -> None:
    """Ends this rank when the process that launched it has ended: SIGTERM to itself, and after `grace` seconds an end.

    A training run thus saves at its next step. Does nothing for a process that no launcher started: it may outlive
    the shell it was typed in.
    """
    if not ranks.launched:
        return
    parent = os.getppid()
    above = _command_above(parent)

    def watch() -> None:
        while os.getppid() == parent and (above is None or _lives(above)):
            time.sleep(1.0)
        if ranks.local_rank == 0:
            _say("The launcher has ended before its ranks: they stop at the next step.\n")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _command_above(parent: int) -> psutil.Process | None:
    """deepspeed's command line, which starts the process that starts the ranks and does not tell it to stop."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(parent)
        if any("deepspeed.launcher.launch" in word for word in process.cmdline()):
            return process.parent()
    return None


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _say(text: str) -> None:
    # Where the launcher held the other end of a pipe, there may be nobody to tell.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
