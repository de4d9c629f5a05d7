"""What a run says of itself: first to files in its folder, which are the truth, then to MLflow, which gets a copy.

A thread of its own sends to MLflow, so that a slow or dead server costs training nothing. What it does not take stays
on disk (`journal.py` names the files) and goes later: when the server is back, when the run is resumed, or by
`python pipeline/sync_mlflow.py RUN`. Nothing goes twice (`mlflow_store.py`). Rank 0 only; on other ranks every method
does nothing.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime import journal
from pipeline.runtime.journal import METRICS, OUTBOX, STATE, SYSTEM_METRICS, Event
from pipeline.runtime.mlflow_store import Refused, Store, system_samples

_VALUES = 1000  # metrics that are sent together
_FILES = ("artifact", "table", "model")
_LONGEST_WAIT = 300.0  # seconds between two attempts at a server that stays away


class Tracker:
    """Metrics, settings, tags, files, figures and tables of one run.

    `resume_step`: the step that a resumed run goes on from; lines of metrics.jsonl beyond it are dropped, since those
    steps are trained again. A new run passes 0. None leaves the lines that are there alone and only adds to them, and
    leaves the MLflow run's status as it is: for a guest, such as an evaluation, beside a run that may be training at
    this moment or be resumed later.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        experiment: str,
        run_name: str,
        resume_step: int | None = 0,
        run_id: str | None = None,
        enabled: bool = True,
        system_metrics: bool = True,
        notify: Callable[[str], None] = print,
        retry_seconds: float = 15.0,
    ) -> None:
        """run_id: of the MLflow run to go on with, from a checkpoint; the folder's own (mlflow.json) comes first.

        retry_seconds: until a server that failed is tried again; twice as long each time it fails again.
        """
        self.enabled = enabled
        if not enabled:
            return
        self.folder = Path(output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._guest = resume_step is None
        left = [] if resume_step is None else journal.keep_until(self.folder / METRICS, resume_step)
        system_left = [] if self._guest else journal.read_lines(self.folder / SYSTEM_METRICS)
        self._store = Store(
            self.folder, experiment=experiment, run_name=run_name, run_id=run_id, reopens=not self._guest
        )
        self._notify, self._retry = notify, retry_seconds
        # Marks this process's lines of the outbox.
        self._own = uuid.uuid4().hex
        self._files = {name: journal.open_to_append(self.folder / name) for name in (METRICS, OUTBOX)}
        self._writing = threading.Lock()
        self._queue: deque[Event] = deque()
        self._news, self._closing = threading.Event(), threading.Event()
        self._closed = False
        self._counting = threading.Lock()
        self.unsent = 0
        self._put(*left, *system_left)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        if system_metrics and not self._guest:
            first = 1 + max((int(line["step"]) for line in system_left), default=-1)
            threading.Thread(target=self._watch_system, args=(first,), name="system metrics", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the server has answered once."""
        return self._store.run_id if self.enabled else None

    @property
    def uri(self) -> str | None:
        """Where MLflow keeps the run."""
        return self._store.uri if self.enabled else None

    def log_metrics(self, step: int, metrics: Mapping[str, float], *, evaluation: bool = False) -> None:
        """One line of metrics.jsonl, with the operating system when this returns, and the same to MLflow.

        evaluation: figures of the checkpoint of this step, which may be evaluated again: each time counts, and MLflow
        shows the newest.
        """
        line: Event = {"step": step, "time": round(time.time(), 3), "metrics": dict(metrics)}
        self._keep(METRICS, line | ({"evaluation": True} if evaluation else {}))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings. MLflow never changes a parameter: what a resumed run changes becomes a tag `changed.<name>`."""
        self._keep(OUTBOX, {"kind": "params", "params": {name: str(value)[:500] for name, value in params.items()}})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Facts that may change."""
        self._keep(OUTBOX, {"kind": "tags", "tags": {name: str(value)[:5000] for name, value in tags.items()}})

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A small file as it is now: a copy in artifacts/<folder> of the run's folder is what is sent."""
        if self.enabled:
            kept = self.folder / "artifacts" / (folder or "") / Path(path).name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
            self._keep(OUTBOX, {"kind": "artifact", "path": str(kept.relative_to(self.folder)), "folder": folder})

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure or PIL picture: saved as artifacts/<name> in the run's folder, and sent."""
        if self.enabled:
            path = self.folder / "artifacts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (figure.savefig if hasattr(figure, "savefig") else figure.save)(path)
            folder = str(Path(name).parent) if "/" in name else None
            self._keep(OUTBOX, {"kind": "artifact", "path": str(path.relative_to(self.folder)), "folder": folder})

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """A table (column name -> values) under a name ending in .json that no other table of the run has."""
        assert name.endswith(".json"), name
        table = {column: list(values) for column, values in columns.items()}
        self._keep(OUTBOX, {"kind": "table", "name": name, "columns": table})

    def register_model(self, name: str, checkpoint: Path, *, step: int, facts: Mapping[str, Any]) -> None:
        """The files of `checkpoint`, a folder below the run's, as a version of MLflow's registered model `name`.

        facts: JSON-able, for the MLmodel file.
        """
        if self.enabled:
            path = str(checkpoint.relative_to(self.folder))
            self._keep(OUTBOX, {"kind": "model", "name": name, "checkpoint": path, "step": step, "facts": dict(facts)})

    def close(self, status: str = "FINISHED", *, seconds: float | None = None) -> None:
        """Sends what is left; status: FINISHED, KILLED (goes on later) or FAILED. A guest's counts for nothing.

        seconds: to wait at most; None takes 60 for a local database (making one takes a while), 20 for a server, and
        5 when the run has failed: its launcher kills the ranks soon, and they have yet to say why it failed.
        """
        if not self.enabled or self._closed:
            return
        self._keep(OUTBOX, {"kind": "status", "status": status, "guest": self._guest})
        with self._writing:
            self._closed = True
            for file in self._files.values():
                file.close()
        self._closing.set()
        self._news.set()
        patience = 5.0 if status == "FAILED" else 60.0 if self._store.is_local else 20.0
        self._thread.join(seconds or patience)
        if self.unsent:
            self._notify(
                f"MLflow ({self._store.uri}) did not take everything: it is all in {self.folder} and is sent when the "
                f"run is resumed, or by: python pipeline/sync_mlflow.py {self.folder}"
            )

    def _keep(self, file: str, event: Event) -> None:
        """On disk first, then into the queue."""
        if not self.enabled:
            return
        with self._writing:
            # The system's sample of the last moment may come late.
            if not self._closed:
                journal.append(self._files[file], event | ({"by": self._own} if file == OUTBOX else {}))
                self._put(event)

    def _put(self, *events: Event) -> None:
        self._count(len(events))
        self._queue.extend(events)
        self._news.set()

    def _count(self, change: int) -> None:
        with self._counting:
            self.unsent += change

    def _watch_system(self, step: int) -> None:
        with self._writing:
            if self._closed:
                return
            self._files[SYSTEM_METRICS] = journal.open_to_append(self.folder / SYSTEM_METRICS)
        try:
            for sample in system_samples(self._closing):
                self._keep(SYSTEM_METRICS, {"step": step, "time": round(time.time(), 3), "metrics": sample})
                step += 1
        except Exception as error:
            self._notify(f"no more figures of the system ({type(error).__name__}: {error}); training goes on")

    def _work(self) -> None:
        """Takes the lock, then what an earlier process left, and sends until all is sent and the run is closed."""
        lock = journal.SendingLock(self.folder)
        if alone := not self._guest and lock.alone():
            # The status that ended an earlier start is no longer true.
            self._put(*(event for event in self._others_events() if event["kind"] != "status"))
        lock.share()
        self._send_all()
        if not self.unsent and lock.alone():
            # What came from others while they held the lock as well is theirs, or the next start's, to send.
            journal.rewrite(self.folder / OUTBOX, [] if alone else self._others_events())
        lock.release()

    def _others_events(self) -> list[Event]:
        return [event for event in journal.read_lines(self.folder / OUTBOX) if event.get("by") != self._own]

    def _send_all(self) -> None:
        """Sends until the run is closed and nothing is left, or what is left cannot be sent."""
        wait, last_tries, warned = self._retry, 3, False
        events: list[Event] = []
        held: list[Event] = []  # files that the artifact store did not take: metrics need not wait for them
        file_due = 0.0
        while True:
            closing, reached = self._closing.is_set(), False
            if not events and not self._queue and held and (closing or time.monotonic() >= file_due):
                events = [held.pop(0)]
            events = events or self._take()
            if not events:
                if closing and not held:
                    return
                continue
            try:
                self._store.open()
                reached = True
                self._store.send(events)
                self._count(-len(events))
                events, wait = [], self._retry
            except Refused as error:
                self._notify(f"MLflow ({self._store.uri}) refused {events[0].get('kind', 'metrics')}: {error}")
                self._count(-len(events))
                events = []
            except Exception as error:
                # A request may have arrived although its answer did not: the server is asked again what it has.
                self._store.forget()
                if not warned:
                    warned = True
                    self._warn(error)
                if closing:
                    if not last_tries:
                        return
                    last_tries -= 1
                    time.sleep(min(self._retry, 1.0))
                elif reached and events[0].get("kind") in _FILES:
                    held += events
                    events, file_due = [], time.monotonic() + wait
                else:
                    self._closing.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)

    def _take(self) -> list[Event]:
        """The next event; of metrics, all that wait and fit into one request. [] after a moment without any."""
        self._news.wait(0.5)
        self._news.clear()
        return take(self._queue)

    def _warn(self, error: Exception) -> None:
        first = (str(error).splitlines() or [""])[0][:200]
        self._notify(
            f"MLflow ({self._store.uri}) cannot be reached ({type(error).__name__}: {first}); training goes on, "
            f"everything is kept in {self.folder} and sent later"
        )


def take(queue: deque[Event]) -> list[Event]:
    """Removes the first event and, if it is of metrics, those behind it that go into one request with it."""
    events: list[Event] = []
    values = 0
    while queue:
        kind, size = queue[0].get("kind"), len(queue[0].get("metrics", ()))
        if events and (kind is not None or "kind" in events[0] or values + size > _VALUES):
            break
        events.append(queue.popleft())
        values += size
    return events


def send_left(folder: Path) -> str:
    """Sends what the processes of a run, all ended, could not; the line to tell.

    Raises:
        ValueError: the folder holds no run, a process is sending at this moment, or MLflow cannot be reached.
    """
    if not (folder / STATE).is_file():
        raise ValueError(f"{folder} is no folder of a tracked run: it has no {STATE}")
    state = journal.read_state(folder)
    # A local database stands in the folder, wherever that has been moved since.
    known = state.get("uri", "")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (None if known.startswith("sqlite:") else known or None)
    store = Store(folder, experiment=state["experiment"], run_name=state["run_name"], uri=uri, reopens=False)
    lock = journal.SendingLock(folder)
    try:
        if not lock.alone():
            raise ValueError(f"{folder} is being trained or evaluated at this moment; that process sends by itself")
        files = (METRICS, SYSTEM_METRICS, OUTBOX)
        queue = deque(line for name in files for line in journal.read_lines(folder / name))
        refused = []
        store.open()
        while events := take(queue):
            try:
                store.send(events)
            except Refused as error:
                refused.append(f"{events[0].get('kind', 'metrics')}: {error}")
        store.end_if_running()
        journal.rewrite(folder / OUTBOX, [])
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"MLflow ({store.uri}) cannot be reached: {type(error).__name__}: {error}") from error
    finally:
        lock.release()
    told = f"{folder}: MLflow ({store.uri}) has everything, in run {store.run_id}"
    return "\n".join([told, *(f"refused: {text}" for text in refused)])
