"""The one door to MLflow. `metrics.jsonl` in the run's folder is the truth; MLflow gets a copy when it can.

A thread of its own sends to MLflow, so that a slow or dead server costs training nothing: what it cannot send stays in
metrics.jsonl and goes later, at the latest when the run is resumed. What was sent is asked of the server, so that no
step goes twice. Rank 0 only; on other ranks every method does nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.provenance import write_json

METRICS = "metrics.jsonl"
_STATE = "mlflow.json"
_BATCH = 500  # metrics per request; MLflow takes 1000 at most


class Tracker:
    """Metrics, parameters, tags, files and figures of one run.

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
        retry_seconds: float = 30.0,
    ) -> None:
        """run_id: of the MLflow run to go on with, from a checkpoint; the folder's own (mlflow.json) comes first."""
        self.enabled = enabled
        if not enabled:
            return
        self.folder = Path(output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / METRICS
        pending = [] if resume_step is None else _keep_until(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._notify, self._retry = notify, retry_seconds
        state = _read_state(self.folder / _STATE)
        self._sender = _Sender(
            folder=self.folder,
            uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.folder.resolve() / 'mlflow.db'}",
            experiment=experiment,
            run_name=run_name,
            run_id=state.get("run_id") or run_id,
            system_metrics=system_metrics,
            guest=resume_step is None,
        )
        self._queue: queue.SimpleQueue[Callable[[_Sender], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._closed = False
        self.unsent = 0
        for line in pending:
            self._put(_metrics_job(line))
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the server has answered once."""
        return self._sender.run_id if self.enabled else None

    @property
    def uri(self) -> str | None:
        """Where MLflow keeps the run."""
        return self._sender.uri if self.enabled else None

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, on disk when this returns, and the same to MLflow."""
        if not self.enabled:
            return
        line = {"step": step, "time": round(time.time(), 3), "metrics": dict(metrics)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._put(_metrics_job(line))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings. MLflow never changes a parameter: what a resumed run changes becomes a tag `changed.<name>`."""
        if self.enabled:
            texts = {name: str(value)[:500] for name, value in params.items()}
            self._put(lambda sender: sender.params(texts))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Facts that may change."""
        if self.enabled:
            texts = {name: str(value)[:5000] for name, value in tags.items()}
            self._put(lambda sender: sender.tags(texts))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A copy of a file; it must stay where it is until the run is closed."""
        if self.enabled:
            self._put(lambda sender: sender.artifact(Path(path), folder))

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure or PIL picture: saved as artifacts/<name> in the run's folder, and sent."""
        if not self.enabled:
            return
        path = self.folder / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (figure.savefig if hasattr(figure, "savefig") else figure.save)(path)
        self.log_artifact(path, str(Path(name).parent) if "/" in name else None)

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """A table (column name -> values): saved as artifacts/<name> (JSON) in the run's folder, and sent."""
        if self.enabled:
            data = {key: list(values) for key, values in columns.items()}
            write_json(self.folder / "artifacts" / name, data)
            self._put(lambda sender: sender.table(data, name))

    def close(self, status: str = "FINISHED", *, seconds: float | None = None) -> None:
        """Sends what is left; status: FINISHED, KILLED (goes on later) or FAILED. A guest's counts for nothing.

        seconds: to wait at most; None takes 60 for a local database (making one takes a while), 20 for a server.
        """
        if not self.enabled or self._closed:
            return
        self._closed = True
        self._file.close()
        self._put(lambda sender: sender.end(status))
        self._closing.set()
        self._wake.set()
        self._thread.join(seconds or (60.0 if self._sender.uri.startswith("sqlite:") else 20.0))
        if self.unsent:
            self._notify(
                f"MLflow ({self.uri}) did not take everything: {self._path} has all metrics; they are sent when the "
                "run is resumed"
            )

    def _put(self, job: Callable[[_Sender], None]) -> None:
        self.unsent += 1
        self._queue.put(job)

    def _work(self) -> None:
        """Sends job by job; on failure waits longer each time and tries the same job again."""
        wait, warned, last_tries = self._retry, False, 3
        job: Callable[[_Sender], None] | None = None
        while True:
            if job is None:
                try:
                    job = self._queue.get(timeout=0.5)
                except queue.Empty:
                    if self._closing.is_set():
                        return
                    continue
            try:
                self._sender.open()
                job(self._sender)
                job, wait = None, self._retry
                self.unsent -= 1
            except Exception as error:
                # A request may have arrived although its answer did not: the server is asked again what it has.
                self._sender.forget()
                if not warned:
                    warned = True
                    first = (str(error).splitlines() or [""])[0][:200]
                    self._notify(
                        f"MLflow ({self._sender.uri}) cannot be reached ({type(error).__name__}: {first}); training "
                        f"goes on, metrics are kept in {self._path} and sent later"
                    )
                if not self._closing.is_set():
                    self._wake.wait(wait)
                    wait = min(2 * wait, 600.0)
                elif last_tries:
                    last_tries -= 1
                    time.sleep(min(self._retry, 1.0))
                else:
                    return


class _Sender:
    """MLflow's client; every method may raise when the server is away, and may be called again."""

    def __init__(
        self,
        *,
        folder: Path,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None,
        system_metrics: bool,
        guest: bool,
    ) -> None:
        self.folder, self.uri, self.experiment, self.run_name = folder, uri, experiment, run_name
        self.run_id, self.system_metrics, self._sets_status = run_id, system_metrics, not guest
        self._client: Any = None
        self._monitor: Any = None
        self._sent: dict[str, int] = {}
        self._params: dict[str, str] = {}

    def open(self) -> None:
        """Connects, makes or reopens the run, and asks which steps it has."""
        if self._client is not None:
            return
        # MLflow's own defaults block for minutes per call when a server is down.
        for name, value in (("MAX_RETRIES", "2"), ("BACKOFF_FACTOR", "1"), ("TIMEOUT", "5")):
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import mlflow
        from mlflow.exceptions import MlflowException

        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        client = mlflow.MlflowClient(self.uri)
        run = None
        if self.run_id:
            try:
                run = client.get_run(self.run_id)
            except MlflowException as error:
                # The id may be of a store that is gone or another one: the truth, metrics.jsonl, fills a new run.
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if run is None:
            known = client.get_experiment_by_name(self.experiment)
            # Beside a local database; a server has a place of its own.
            place = (self.folder.resolve() / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
            identity = known.experiment_id if known else client.create_experiment(self.experiment, place)
            run = client.create_run(identity, run_name=self.run_name)
            # Nobody else would end it.
            self._sets_status = True
        elif self._sets_status:
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        self._params = dict(run.data.params)
        self._sent = {metric.key: metric.step for metric in run.data._metric_objs}
        write_json(self.folder / _STATE, {"run_id": self.run_id, "uri": self.uri, "experiment": self.experiment})
        self._client = client
        if self.system_metrics and self._monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()

    def forget(self) -> None:
        """Makes `open` ask the server anew."""
        self._client = None

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, less the values that the run has already."""
        from mlflow.entities import Metric

        step, stamp = int(line["step"]), int(line["time"] * 1000)
        new = [
            Metric(name, float(value), stamp, step)
            for name, value in line["metrics"].items()
            if step > self._sent.get(name, -1)
        ]
        for at in range(0, len(new), _BATCH):
            part = new[at : at + _BATCH]
            self._client.log_batch(self.run_id, metrics=part)
            self._sent |= {metric.key: step for metric in part}

    def params(self, texts: Mapping[str, str]) -> None:
        """New parameters; changed ones as tags."""
        from mlflow.entities import Param

        new = [Param(name, text) for name, text in texts.items() if name not in self._params]
        changed = {f"changed.{k}": v for k, v in texts.items() if k in self._params and self._params[k] != v}
        for at in range(0, len(new), 100):
            self._client.log_batch(self.run_id, params=new[at : at + 100])
            self._params |= {param.key: param.value for param in new[at : at + 100]}
        if changed:
            self.tags(changed)

    def tags(self, texts: Mapping[str, str]) -> None:
        """Sets tags."""
        for name, text in texts.items():
            self._client.set_tag(self.run_id, name, text)

    def artifact(self, path: Path, folder: str | None) -> None:
        """Sends a file; one that has gone meanwhile is passed over."""
        if path.exists():
            self._client.log_artifact(self.run_id, str(path), folder)

    def table(self, columns: dict[str, list[Any]], name: str) -> None:
        """Sends a table."""
        self._client.log_table(self.run_id, columns, name)

    def end(self, status: str) -> None:
        """Ends the run on the server, unless a guest found it there; `open` starts it again."""
        if self._sets_status:
            self._client.set_terminated(self.run_id, status)
        if self._monitor is not None:
            # Only the event: its `finish` waits for a whole sampling interval.
            self._monitor._shutdown_event.set()


def _metrics_job(line: Mapping[str, Any]) -> Callable[[_Sender], None]:
    return lambda sender: sender.metrics(line)


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to `step`; later ones, and a line that a kill cut off, leave the file."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and line.get("step", math.inf) <= step:
            lines.append(line)
    part = path.with_name(path.name + ".tmp")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(part, path)
    return lines


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}
