"""Tracking over HTTP against a real `mlflow server` that is away, freezes, dies and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import MlflowServer

from pipeline.runtime.ranks import free_port
from pipeline.runtime.tracking import Tracker

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    found = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield found
    found.kill()


@pytest.fixture(autouse=True)
def _address(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")


def tracker(folder: Path, **more: Any) -> Tracker:
    options = {"experiment": "http", "run_name": "toy", "system_metrics": False, "retry_seconds": 0.3} | more
    return Tracker(folder, **options)


def client(server: MlflowServer) -> Any:
    import mlflow

    return mlflow.MlflowClient(server.uri)


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.1)


def test_a_run_over_a_server_that_comes_and_goes(tmp_path: Path, server: MlflowServer) -> None:
    run = tracker(tmp_path, system_metrics=True)
    run.log_params({"lr": 1e-3})
    run.set_tags({"commit": "abc"})
    (tmp_path / "run.json").write_text("{}")
    run.log_artifact(tmp_path / "run.json")
    steps = iter(range(1, 10_000))

    def train(count: int) -> None:
        for _, step in zip(range(count), steps, strict=False):
            run.log_metrics(step, {"loss": 1 / step, "lr": 0.1})

    train(100)  # there is no server yet
    (tmp_path / "run.json").write_text("changed after it was logged")
    server.start()
    wait_for(lambda: run.unsent == 0)
    train(100)
    server.freeze()  # it takes connections and does not answer
    began = time.perf_counter()
    train(100)
    # What a step would wait for one answer: the request's timeout of 5 s.
    assert time.perf_counter() - began < 4
    server.thaw()
    wait_for(lambda: run.unsent == 0)
    server.kill()
    train(100)
    run.log_table({"task": ["caption"], "score": [0.5]}, "evaluation/scores.json")
    server.start()
    wait_for(lambda: run.unsent == 0)
    train(100)
    run.close(seconds=240)
    assert run.unsent == 0
    assert not (tmp_path / "outbox.jsonl").exists()

    there = client(server)
    for name in ("loss", "lr"):
        assert [m.step for m in there.get_metric_history(run.run_id, name)] == list(range(1, 501))
    found = there.get_run(run.run_id)
    assert found.data.params == {"lr": "0.001"}
    assert (found.data.tags["commit"], found.info.status) == ("abc", "FINISHED")
    assert {file.path for file in there.list_artifacts(run.run_id)} == {"run.json", "evaluation"}
    assert Path(there.download_artifacts(run.run_id, "run.json", str(tmp_path))).read_text() == "{}"
    assert there.load_table(found.info.experiment_id, "evaluation/scores.json")["score"].tolist() == [0.5]
    assert len(there.search_runs([found.info.experiment_id])) == 1
    # CPU, memory, disk and network went on being written while the server was away, and arrived once each.
    written = [json.loads(line) for line in (tmp_path / "system_metrics.jsonl").read_text().splitlines()]
    seen = there.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    assert [m.step for m in seen] == [line["step"] for line in written] == list(range(len(written)))
    assert len(written) > 1


def test_what_a_dead_process_left_is_sent_by_the_command(tmp_path: Path, server: MlflowServer, monkeypatch) -> None:
    """Killed without a word, MLflow never reached: metrics, settings, files and the model come from disk alone."""
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    code = f"""
import os, sys
from pathlib import Path
from pipeline.runtime.tracking import Tracker
folder = Path({str(tmp_path / "run")!r})
run = Tracker(folder, experiment="left", run_name="toy", system_metrics=False)
run.log_params({{"lr": 1e-3}})
for step in range(1, 51):
    run.log_metrics(step, {{"loss": 1 / step}})
(folder / "registered" / "checkpoint-50").mkdir(parents=True)
(folder / "registered" / "checkpoint-50" / "trained.safetensors").write_bytes(b"weights")
run.register_model("tuned", folder / "registered" / "checkpoint-50", step=50, facts={{"base": "llama"}})
run.log_table({{"task": ["caption"]}}, "evaluation/scores.json")
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == -9, done.stderr

    def sync(folder: Path = tmp_path / "run", uri: str = server.uri) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(REPO / "pipeline/sync_mlflow.py"), str(folder)]
        env = {**os.environ, "MLFLOW_TRACKING_URI": uri}
        return subprocess.run(words, capture_output=True, text=True, timeout=240, env=env)

    away = sync(uri=os.environ["MLFLOW_TRACKING_URI"])
    assert away.returncode == 2
    assert "cannot be reached" in away.stderr
    assert "is no folder of a tracked run" in sync(folder=tmp_path).stderr
    for _ in range(2):
        told = sync()
        assert told.returncode == 0, told.stderr
        assert "has everything" in told.stdout

    there = client(server)
    run_id = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    run = there.get_run(run_id)
    assert [m.step for m in there.get_metric_history(run_id, "loss")] == list(range(1, 51))
    assert (run.data.params, run.info.status) == ({"lr": "0.001"}, "KILLED")
    (version,) = there.search_model_versions("name = 'tuned'")
    assert (version.run_id, version.tags) == (run_id, {"step": "50"})
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    model = Path(mlflow.artifacts.download_artifacts("models:/tuned/1", dst_path=str(tmp_path / "model")))
    assert (model / "trained.safetensors").read_bytes() == b"weights"
    assert mlflow.models.Model.load(str(model)).flavors["neural_tuning"]["base"] == "llama"
    assert there.load_table(run.info.experiment_id, "evaluation/scores.json")["task"].tolist() == ["caption"]

    # It goes on as the same run, and while it does the command keeps its hands off.
    alive = tracker(tmp_path / "run", experiment="left", resume_step=40)
    alive.log_metrics(41, {"loss": 1 / 41})
    wait_for(lambda: alive.unsent == 0)
    assert "sends by itself" in sync().stderr
    alive.close(seconds=240)
    assert alive.run_id == run_id
    assert there.get_run(run_id).info.status == "FINISHED"
    assert [m.step for m in there.get_metric_history(run_id, "loss")] == list(range(1, 51))
