"""metrics.jsonl is complete whatever MLflow does; MLflow gets each step once, also over a resume and a dead server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime import provenance
from pipeline.runtime.ranks import free_port
from pipeline.runtime.tracking import Tracker, send_left


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def tracker(folder: Path, **more: Any) -> Tracker:
    options = {"experiment": "test", "run_name": "toy", "system_metrics": False, "retry_seconds": 0.2} | more
    return Tracker(folder, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def history(folder: Path, name: str) -> list[int]:
    import mlflow

    state = json.loads((folder / "mlflow.json").read_text())
    client = mlflow.MlflowClient(state["uri"])
    return [metric.step for metric in client.get_metric_history(state["run_id"], name)]


def test_a_dead_server_then_a_resume_into_a_live_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    dead = tracker(tmp_path, notify=said.append)
    start = time.perf_counter()
    dead.log_params({"lr": 1e-3})
    for step in range(1, 201):
        dead.log_metrics(step, {"loss": 1 / step})
    # 200 lines to a server that is away: training does not notice.
    assert time.perf_counter() - start < 2.0
    time.sleep(1.0)
    assert dead.run_id is None
    dead.close("KILLED", seconds=30)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 201))
    assert len(said) == 2, said
    assert "training goes on" in said[0]
    assert "is sent when the run is resumed" in said[1]

    # Steps 151..200 were trained after the last checkpoint: they are trained, and written, again.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "metr')
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    live = tracker(tmp_path, resume_step=150, notify=said.append)
    for step in range(151, 156):
        live.log_metrics(step, {"loss": 1 / step, "late": 0.0})
    live.log_params({"lr": 1e-3, "batch": 8})
    live.set_tags({"commit": "abc"})
    live.log_table({"key": ["a", "b"], "text": ["x", "y"]}, "tables/predictions.json")
    (tmp_path / "run.json").write_text("{}")
    live.log_artifact(tmp_path / "run.json")
    live.close(seconds=240)
    assert live.unsent == 0
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 156))
    assert history(tmp_path, "loss") == list(range(1, 156))
    first_id = live.run_id

    # Sent up to 155, resumed at 153: 154 and 155 go into metrics.jsonl again, but not to MLflow again.
    again = tracker(tmp_path, resume_step=153, run_id="not used: the folder knows")
    for step in range(154, 158):
        again.log_metrics(step, {"loss": 1 / step})
    again.log_params({"lr": 2e-3})
    again.close(seconds=240)
    assert again.run_id == first_id
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 158))
    assert history(tmp_path, "loss") == list(range(1, 158))

    import mlflow

    client = mlflow.MlflowClient(again.uri)
    run = client.get_run(first_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.001", "batch": "8"}
    assert run.data.tags["changed.lr"] == "0.002"
    assert run.data.tags["commit"] == "abc"
    assert {file.path for file in client.list_artifacts(first_id)} == {"run.json", "tables"}
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_server_that_fails_in_between_gets_the_rest_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a request is lost although it arrived: the step must not go twice."""
    import mlflow

    real = mlflow.MlflowClient.log_batch
    failures = iter([True, True])

    def flaky(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        if next(failures, False):
            raise ConnectionError("answer lost")
        return result

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", flaky)
    said: list[str] = []
    run = tracker(tmp_path, notify=said.append)
    for step in range(1, 6):
        run.log_metrics(step, {"loss": 0.5, "lr": 0.1})
    run.close(seconds=240)
    assert history(tmp_path, "loss") == history(tmp_path, "lr") == [1, 2, 3, 4, 5]
    assert len(said) == 1
    assert "answer lost" in said[0]


def test_one_run_although_the_answer_to_its_making_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    real = mlflow.MlflowClient.create_run
    failures = iter([True])

    def flaky(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        if next(failures, False):
            raise ConnectionError("answer lost")
        return result

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", flaky)
    run = tracker(tmp_path, notify=lambda _: None)
    run.log_metrics(1, {"loss": 0.5})
    run.close(seconds=240)
    client = mlflow.MlflowClient(run.uri)
    assert len(client.search_runs([client.get_run(run.run_id).info.experiment_id])) == 1
    assert history(tmp_path, "loss") == [1]


def test_what_the_server_refuses_does_not_stop_the_rest(tmp_path: Path) -> None:
    said: list[str] = []
    run = tracker(tmp_path, notify=said.append)
    run.log_metrics(1, {"loss": 0.5, "loss/ce/where?": 0.25})
    run.log_metrics(2, {"n" * 251: 0.5})
    run.log_metrics(3, {"loss": 0.4})
    run.close(seconds=240)
    assert run.unsent == 0
    assert len(said) == 1
    assert "refused metrics" in said[0]
    assert history(tmp_path, "loss") == [1, 3]
    assert history(tmp_path, "loss/ce/where_") == [1]


def test_files_that_do_not_arrive_hold_up_no_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("the artifact store is away")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", broken)
    run = tracker(tmp_path, notify=lambda _: None)
    (tmp_path / "run.json").write_text("{}")
    run.log_artifact(tmp_path / "run.json")
    run.log_metrics(1, {"loss": 0.5})
    ends = time.monotonic() + 240
    while run.unsent > 1 and time.monotonic() < ends:
        time.sleep(0.1)
    assert history(tmp_path, "loss") == [1]
    run.close(seconds=240)
    assert run.unsent == 1
    monkeypatch.undo()
    assert "has everything" in send_left(tmp_path)
    assert [f.path for f in mlflow.MlflowClient(run.uri).list_artifacts(run.run_id)] == ["run.json"]
    assert mlflow.MlflowClient(run.uri).get_run(run.run_id).info.status == "FINISHED"


def test_an_evaluation_leaves_the_runs_status_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    def evaluate(value: float, step: int = 4) -> Any:
        guest = tracker(tmp_path, resume_step=None)
        guest.log_metrics(step, {"test/score": value}, evaluation=True)
        guest.close(seconds=240)
        assert guest.unsent == 0
        return mlflow.MlflowClient(guest.uri).get_run(guest.run_id)

    preempted = tracker(tmp_path)
    preempted.log_metrics(4, {"loss": 0.5})
    preempted.close("KILLED", seconds=240)
    before = mlflow.MlflowClient(preempted.uri).get_run(preempted.run_id).info
    found = evaluate(0.25)
    assert found.data.metrics == {"loss": 0.5, "test/score": 0.25}
    assert (found.info.status, found.info.end_time) == ("KILLED", before.end_time)

    # A run that trains at this moment goes on training.
    mlflow.MlflowClient(preempted.uri).update_run(preempted.run_id, status="RUNNING")
    assert evaluate(0.5).info.status == "RUNNING"

    # The same checkpoint again, and an older one later: each evaluation counts, MLflow's value is the newest step's.
    assert evaluate(0.75).data.metrics["test/score"] == 0.75
    evaluate(0.125, step=2)
    assert history(tmp_path, "test/score") == [4, 4, 4, 2]
    # The resumed run has them in its metrics.jsonl, and sends none of them again.
    resumed = tracker(tmp_path, resume_step=4)
    resumed.log_metrics(5, {"loss": 0.4})
    resumed.close("KILLED", seconds=240)
    assert history(tmp_path, "test/score") == [4, 4, 4, 2]

    # Another store, without the run: the one that the evaluation makes there is its own to end.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert evaluate(0.75).info.status == "FINISHED"


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    quiet = Tracker(tmp_path / "none", experiment="test", run_name="toy", enabled=False)
    quiet.log_metrics(1, {"loss": 1.0})
    quiet.log_params({"a": 1})
    quiet.set_tags({"a": 1})
    quiet.log_table({"a": [1]}, "t.json")
    quiet.log_artifact("x")
    quiet.close()
    assert quiet.run_id is None
    assert not (tmp_path / "none").exists()


def test_run_record(tmp_path: Path) -> None:
    record = provenance.run_record(
        {"TrainArguments": {"lr": 1e-3}}, deepspeed={"bf16": {"enabled": False}}, world_size=2
    )
    path = provenance.write_json(tmp_path / "run.json", record)
    found = json.loads(path.read_text())
    assert found["versions"]["deepspeed"]
    assert found["command"]
    assert set(found["git"]) == {"commit", "dirty"}
    assert provenance.flatten(found["config"]) == {"TrainArguments.lr": 1e-3}
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}
