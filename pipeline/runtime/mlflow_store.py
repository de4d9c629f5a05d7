"""The one door to MLflow: opens the run of a folder in its store and sends it events; `tracking.py` says when.

Every method may raise when the server is away and may be called again with the same event: whatever arrived although
its answer was lost does not arrive twice. Metrics: the store is asked which steps it has. The run: it is found again by
the tag `run_uid`. All else overwrites itself.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.journal import STATE, Event, read_state
from pipeline.runtime.provenance import write_json

_BATCH = 1000  # metrics per request, MLflow's limit
_UID = "run_uid"
# A server that answers so has understood the request and will not take it the next time either.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


class Refused(Exception):
    """The server will not take this event, now or later."""


class Store:
    """The MLflow run that belongs to a run's folder.

    Args:
        uri: of the store; None takes MLFLOW_TRACKING_URI, or mlflow.db in the folder.
        run_id: the run as a checkpoint knows it; the folder's own mlflow.json comes first.
        reopens: whether a run that is there is set RUNNING again; not for a guest, who leaves its status alone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        experiment: str,
        run_name: str,
        uri: str | None = None,
        run_id: str | None = None,
        reopens: bool = True,
    ) -> None:
        self.folder, self.experiment, self.run_name = folder, experiment, run_name
        local = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        state = read_state(folder, experiment=experiment, run_name=run_name)
        self.run_id: str | None = state.get("run_id") or run_id
        self._reopens, self._made = reopens, False
        self._client: Any = None
        self._sent: dict[str, int] = {}
        self._evaluated: dict[str, set[tuple[int, int]]] = {}
        self._params: dict[str, str] = {}

    @property
    def is_local(self) -> bool:
        """Whether the store is a database file and not a server."""
        return self.uri.startswith("sqlite:")

    def open(self) -> None:
        """Connects, makes or reopens the run, and asks which steps it has; nothing if that is done already."""
        if self._client is not None:
            return
        # MLflow's own defaults block for minutes per call when a server is down, and its retries would send again what
        # has arrived although the answer was lost.
        for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", "15")):
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import mlflow

        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        client = mlflow.MlflowClient(self.uri)
        run = self._find(client)
        if run is None:
            run = client.create_run(
                self._experiment(client), run_name=self.run_name, tags={_UID: read_state(self.folder)["uid"]}
            )
            self._made = True
        elif self._reopens:
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        self._params = dict(run.data.params)
        self._sent = {metric.key: metric.step for metric in run.data._metric_objs}
        self._evaluated = {}
        known = {"run_id": self.run_id, "uri": self.uri, "experiment": self.experiment, "run_name": self.run_name}
        write_json(self.folder / STATE, {**read_state(self.folder), **known})
        self._client = client

    def forget(self) -> None:
        """Makes `open` ask the server anew."""
        self._client = None

    def _find(self, client: Any) -> Any:
        """The run in this store, by its id, else by its uid; None if it has not been made yet."""
        from mlflow.exceptions import MlflowException

        state = read_state(self.folder)
        # Another process may have made the run since this one began.
        if run_id := state.get("run_id") or self.run_id:
            try:
                return client.get_run(run_id)
            except MlflowException as error:
                # The id may be of a store that is gone or another one: the files of the folder fill a new run.
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        known = client.get_experiment_by_name(self.experiment)
        found = client.search_runs([known.experiment_id], f"tags.{_UID} = '{state['uid']}'") if known else []
        return found[0] if found else None

    def _experiment(self, client: Any) -> str:
        """The experiment's id; it is made where it is missing."""
        known = client.get_experiment_by_name(self.experiment)
        if known:
            return known.experiment_id
        # Beside a local database; a server has a place of its own.
        place = (self.folder.resolve() / "mlartifacts").as_uri() if self.is_local else None
        return client.create_experiment(self.experiment, place)

    def send(self, events: Sequence[Event]) -> None:
        """Sends several metrics in one request, or one event of another kind. Raises Refused if that is hopeless."""
        from mlflow.exceptions import MlflowException

        try:
            if "kind" in events[0]:
                (event,) = events
                {
                    "params": self._send_params,
                    "tags": self._send_tags,
                    "artifact": self._send_artifact,
                    "table": self._send_table,
                    "model": self._send_model,
                    "status": self._send_status,
                }[event["kind"]](event)
            else:
                self._send_metrics(events)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if len(events) == 1:
                raise Refused(str(error).splitlines()[0]) from error
            self._send_singly(events)

    def _send_singly(self, lines: Sequence[Event]) -> None:
        """Each line in a request of its own, so that one that is refused takes no other with it."""
        refused = None
        for line in lines:
            try:
                self.send([line])
            except Refused as error:
                refused = error
        if refused:
            raise refused

    def _send_metrics(self, lines: Sequence[Event]) -> None:
        """The values that the run has not got yet."""
        from mlflow.entities import Metric

        new = []
        for line in lines:
            step, stamp = int(line["step"]), int(line["time"] * 1000)
            for given, value in line["metrics"].items():
                name = _NOT_IN_NAMES.sub("_", given)
                if self._is_new(name, step, stamp, bool(line.get("evaluation"))):
                    new.append(Metric(name, float(value), stamp, step))
        for at in range(0, len(new), _BATCH):
            part = new[at : at + _BATCH]
            self._client.log_batch(self.run_id, metrics=part)
            for metric in part:
                self._sent[metric.key] = max(metric.step, self._sent.get(metric.key, -1))
                if metric.key in self._evaluated:
                    self._evaluated[metric.key].add((metric.step, metric.timestamp))

    def _is_new(self, name: str, step: int, stamp: int, evaluation: bool) -> bool:
        """Training passes a step once, or again with the same figures; a checkpoint may be evaluated again, any time
        and in any order, and each evaluation counts."""
        if not evaluation:
            return step > self._sent.get(name, -1)
        if name not in self._evaluated:
            known = self._client.get_metric_history(self.run_id, name) if name in self._sent else []
            self._evaluated[name] = {(metric.step, metric.timestamp) for metric in known}
        return (step, stamp) not in self._evaluated[name]

    def _send_params(self, event: Event) -> None:
        """New parameters; MLflow never changes one, so a changed value becomes the tag `changed.<name>`."""
        from mlflow.entities import Param

        texts: Mapping[str, str] = event["params"]
        new = [Param(name, text) for name, text in texts.items() if name not in self._params]
        for at in range(0, len(new), 100):
            self._client.log_batch(self.run_id, params=new[at : at + 100])
            self._params |= {param.key: param.value for param in new[at : at + 100]}
        self._set_tags({f"changed.{k}": v for k, v in texts.items() if self._params[k] != v})

    def _send_tags(self, event: Event) -> None:
        self._set_tags(event["tags"])

    def _set_tags(self, texts: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, text) for name, text in texts.items()]
        for at in range(0, len(tags), 100):
            self._client.log_batch(self.run_id, tags=tags[at : at + 100])

    def _send_artifact(self, event: Event) -> None:
        """A file; one that has gone meanwhile is passed over."""
        path = self.folder / event["path"]
        if path.exists():
            self._client.log_artifact(self.run_id, str(path), event["folder"])

    def _send_table(self, event: Event) -> None:
        """A table in MLflow's form. Its `log_table` adds rows to a table that is there: then there are none to add."""
        name, columns = event["name"], event["columns"]
        folder = str(Path(name).parent) if "/" in name else None
        if name in {found.path for found in self._client.list_artifacts(self.run_id, folder)}:
            columns = {column: [] for column in columns}
        self._client.log_table(self.run_id, columns, name)

    def _send_model(self, event: Event) -> None:
        """The tuned weights of a checkpoint as an MLflow model of the run, and as a version of a registered model."""
        from mlflow.exceptions import MlflowException
        from mlflow.models import Model

        name, checkpoint = event["name"], self.folder / event["checkpoint"]
        step = str(event["step"])
        known = self._client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        if any(version.tags.get("step") == step for version in known):
            return
        if not checkpoint.is_dir():
            raise Refused(f"{checkpoint} is gone")
        place = f"model/{checkpoint.name}"
        with tempfile.TemporaryDirectory() as made:
            described = Model(artifact_path=place, run_id=self.run_id, metadata=event["facts"])
            described.add_flavor("neural_tuning", checkpoint=".", **event["facts"])
            described.save(str(Path(made) / "MLmodel"))
            self._client.log_artifact(self.run_id, str(Path(made) / "MLmodel"), place)
        for path in sorted(checkpoint.iterdir()):
            self._client.log_artifact(self.run_id, str(path), place)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{place}"
        self._client.create_model_version(name, source, self.run_id, tags={"step": step}, await_creation_for=0)

    def _send_status(self, event: Event) -> None:
        """Ends the run (`open` starts it again); a guest's word counts only for a run that it had to make itself."""
        if self._made or not event["guest"]:
            self._client.set_terminated(self.run_id, event["status"])

    def end_if_running(self) -> None:
        """Ends as KILLED a run that nobody has ended; for when no process trains it."""
        if self._client.get_run(self.run_id).info.status == "RUNNING":
            self._client.set_terminated(self.run_id, "KILLED")


def system_samples(closing: Any) -> Iterator[dict[str, float]]:
    """CPU, memory, disk, network and, with nvidia-ml-py, GPU figures as MLflow's own monitors name them.

    One dictionary per MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL (10 s) until the event `closing` is set. MLflow's own
    loop around the same monitors ends for good at the first request that fails.
    """
    from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    kinds: list[Callable[[], Any]] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    monitors = [kind() for kind in kinds]
    try:
        monitors.append(GPUMonitor())
    except Exception as error:
        logging.getLogger(__name__).debug("no GPU figures: %s", error)
    while not closing.wait(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10):
        sample: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            sample |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        yield sample
