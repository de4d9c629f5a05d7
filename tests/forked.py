"""Jobs of several ranks, forked from a process that has imported everything: a start costs a second instead of ten.

`start(script, args, world=2, log=...)` does what a launcher does: one process, in a session of its own, that starts a
process per rank with its environment, waits, and when a rank fails ends the others (SIGTERM, after a while SIGKILL).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from pipeline.runtime.ranks import free_port

REPO = Path(__file__).resolve().parent.parent
TESTS = REPO / "tests"
_PRELOAD = [
    "pipeline.assembly.training",
    "pipeline.runtime.tracking",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
]
_PATIENCE = 20.0


class Job:
    """A running job; `said` is what its processes have written so far."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.log = process, log

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def members(self) -> dict[str, list[psutil.Process]]:
        """The living processes by part: launcher, rank, worker."""
        found: dict[str, list[psutil.Process]] = {"launcher": [], "rank": [], "worker": []}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) != self.process.pid or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.pid == self.process.pid:
                    found["launcher"].append(process)
                else:
                    ours = str(process.pid) in (self.log.with_suffix(".pids").read_text().split())
                    found["rank" if ours else "worker"].append(process)
        return found

    def until(self, condition: Callable[[], Any], seconds: float = 600.0, pause: float = 0.02) -> None:
        """Waits for a condition while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain:\n{self.said[-3000:]}"
            assert self.process.is_alive() or condition(), f"ended early:\n{self.said[-3000:]}"
            time.sleep(pause)

    def end(self, seconds: float = 600.0) -> int:
        """Waits for the launcher and then for whatever it left; returns the launcher's exit status.

        Fails if a process lives on.
        """
        self.process.join(seconds)
        deadline = time.monotonic() + 300
        while (left := [p for kind in self.members().values() for p in kind]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in left:
            process.kill()
        assert not left, f"orphans: {left}\n{self.said[-3000:]}"
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(script: Path, args: Sequence[Any], *, log: Path, world: int = 2, env: Mapping[str, str] | None = None) -> Job:
    """Starts `script args` on `world` ranks."""
    context = multiprocessing.get_context("forkserver")
    if str(TESTS) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(TESTS), os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload(_PRELOAD)
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), **(env or {})}
    words = [str(word) for word in args]
    process = context.Process(target=_launch, args=(str(script), words, world, str(log), given))
    # What the fork server imports asks for CUDA, which would be lost to its children: it sees none, as they need none.
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        process.start()
    return Job(process, log)


def _launch(script: str, args: list[str], world: int, log: str, env: dict[str, str]) -> None:
    os.setsid()
    # This process was told to start others by a fork server of its own; scripts have Python's default on Linux.
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _run(script, args, rank)
        pids.append(pid)
    Path(log).with_suffix(".pids").write_text(" ".join(map(str, pids)))
    first = 0
    while pids:
        pid, status = os.wait()
        pids = [other for other in pids if other != pid]
        if status and not first:
            first = os.waitstatus_to_exitcode(status) or 1
            _end(pids)
    os._exit(first % 256)


def _end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        time.sleep(0.05)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _run(script: str, args: list[str], rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).parent)
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
