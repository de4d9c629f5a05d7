"""The engine and the trainer on real DeepSpeed ranks (gloo on the CPU), with a toy of the real model's call shape.

Each start costs seconds, so the cases of one number of ranks share a launch. Measured: a resume on the
same stage and number of ranks is bit-identical, in fp32 and in bf16; across stages and 1 or 2 ranks losses differ by
2e-7 relative (order of summation). ZeRO offload and nccl are not run here.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from engine_job import Toy, ToyVision, toy_loader
from torch import nn

from pipeline.data.batch import Batch
from pipeline.runtime import checkpoint, ds_config, stopping, throughput
from pipeline.runtime.engine import Engine
from pipeline.runtime.ranks import Ranks, free_port
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.trainer import Trainer

REPO = Path(__file__).resolve().parent.parent
FILES = ("z1", "z2", "z3")
# Measured: 2e-7 at most. Weights move by 1e-2 a step here, so a wrong gradient shows at once.
ACROSS = 2e-6
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def launch() -> Launch:
    """`launch(world, script, *args)`: one process by itself, or ranks through the deepspeed launcher."""
    import os

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MLFLOW_TRACKING_URI")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    folder = Path(sys.executable).parent
    clean |= {"PATH": f"{folder}:{clean.get('PATH', '')}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}

    def start(world: int, script: str, *args: Path, env: dict[str, str] | None = None, ok: bool = True) -> Any:
        command = [sys.executable] if world == 1 else [str(folder / "deepspeed"), "--num_gpus", str(world)]
        if world > 1:
            command += ["--master_port", str(free_port())]
        command += [str(REPO / "tests" / script), *map(str, args)]
        done = subprocess.run(
            command, env=clean | (env or {}), cwd=REPO, capture_output=True, text=True, timeout=550, check=False
        )
        assert not ok or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    return start


@pytest.fixture(scope="module")
def runs(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Facts of all toy runs, by "<case>@<ranks>"."""
    root = tmp_path_factory.mktemp("engine")
    facts: dict[str, dict[str, Any]] = {}

    def straight(world: int) -> list[dict[str, Any]]:
        """Six steps with a save at the third, and the last three again from that save."""
        cases = []
        for file in FILES:
            folder = str(root / f"{file}w{world}")
            cases.append({"name": file, "file": file, "last": 6, "save_at": 3, "save_to": folder, "hidden": 24})
            cases.append({"name": f"{file} resumed", "file": file, "last": 6, "load": f"{folder}/checkpoint-3"})
        return cases

    def moved(source: str, file: str, **more: Any) -> dict[str, Any]:
        # dirty: the engine has trained on other data before, so that everything must be replaced.
        load = str(root / source / "checkpoint-3")
        return {"name": f"{source} to {file}", "file": file, "last": 6, "load": load, "dirty": True, **more}

    bf16 = {"bf16": True, "last": 6}
    half = str(root / "half")
    plans = [
        (
            1,
            [
                *straight(1),
                {"name": "micro 8", "last": 6, "micro": 8},
                {"name": "unclipped", "last": 6, "clip": 0.0},
                {"name": "longer", "last": 8},
            ],
        ),
        (
            2,
            [
                *straight(2),
                moved("z2w1", "z2"),
                moved("z3w1", "z1"),
                moved("z1w1", "z3", hidden=2, resave=str(root / "again")),
                {"name": "half", **bf16, "save_at": 3, "save_to": half},
                {"name": "half resumed", **bf16, "load": f"{half}/checkpoint-3"},
                {"name": "half to z3", **bf16, "file": "z3", "load": f"{half}/checkpoint-3"},
            ],
        ),
        (1, [moved("z2w2", "z3"), moved("z3w2", "z2"), moved("again", "z1")]),
    ]
    for number, (world, plan) in enumerate(plans):
        (root / f"plan{number}.json").write_text(json.dumps(plan))
        launch(world, "engine_job.py", root / f"plan{number}.json", root / f"out{number}.json")
        found = json.loads((root / f"out{number}.json").read_text())
        facts |= {f"{name}@{world}": fact for name, fact in found.items()}
    return facts


def close(a: list[float], b: list[float], relative: float) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=relative) for x, y in zip(a, b))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("file", FILES)
def test_same_losses_on_any_ranks_and_stage(runs: dict[str, dict[str, Any]], file: str, world: int) -> None:
    one, here = runs["z1@1"], runs[f"{file}@{world}"]
    assert one["losses"][0] > one["losses"][-1]
    assert close(one["losses"], here["losses"], ACROSS), (one["losses"], here["losses"])
    assert close(one["norms"], here["norms"], ACROSS), (one["norms"], here["norms"])


def test_micro_batches_do_not_change_the_objective(runs: dict[str, dict[str, Any]]) -> None:
    assert close(runs["z2@1"]["losses"], runs["micro 8@1"]["losses"], ACROSS)
    # The comparisons mean something: clipping, on in all but one run, changes what is computed.
    assert not close(runs["z2@1"]["losses"], runs["unclipped@1"]["losses"], 1e-3)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("file", FILES)
def test_resume_is_bit_identical(runs: dict[str, dict[str, Any]], file: str, world: int) -> None:
    whole, resumed = runs[f"{file}@{world}"], runs[f"{file} resumed@{world}"]
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["norms"] == whole["norms"][3:]
    assert resumed["final_lr"] == whole["final_lr"]
    assert resumed["steps"] == 3


@pytest.mark.parametrize(
    "name", ["z2w1 to z2@2", "z3w1 to z1@2", "z1w1 to z3@2", "z2w2 to z3@1", "z3w2 to z2@1", "again to z1@1"]
)
def test_resume_on_another_stage_and_number_of_ranks(runs: dict[str, dict[str, Any]], name: str) -> None:
    whole, resumed = runs["z2@1"], runs[name]
    assert close(resumed["losses"], whole["losses"][3:], ACROSS), (resumed["losses"], whole["losses"][3:])
    assert close(resumed["norms"], whole["norms"][3:], ACROSS)
    # Each group keeps its own learning rate, and the schedule goes on.
    assert resumed["lr"] == pytest.approx({"fast": 0.0195106, "slow": 0.00487764}, rel=1e-5)


def test_a_chain_of_stages_and_ranks(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """2 ranks ZeRO-2, 1 rank ZeRO-3, 2 ranks ZeRO-3, 1 rank ZeRO-1, two steps each; what each saves of the one before
    without training is the same file, byte by byte."""
    found: list[float] = []
    load = None
    for number, (world, file) in enumerate([(2, "z2"), (1, "z3"), (2, "z3"), (1, "z1")]):
        last = 2 * number + 2
        case = {"name": "chain", "file": file, "last": last, "save_at": last, "save_to": str(tmp_path / str(number))}
        if load:
            case |= {"load": str(load), "dirty": True, "resave": str(tmp_path / f"again{number}")}
        plan, out = tmp_path / f"plan{number}.json", tmp_path / f"out{number}.json"
        plan.write_text(json.dumps([case]))
        job = forked.start(REPO / "tests/engine_job.py", [plan, out], world=world, log=tmp_path / f"{number}.log")
        assert job.end() == 0, job.said
        found += json.loads(out.read_text())["chain"]["losses"]
        for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS) if load else ():
            assert (tmp_path / f"again{number}" / load.name / name).read_bytes() == (load / name).read_bytes()
        load = tmp_path / str(number) / f"checkpoint-{last}"
    assert close(found, runs["longer@1"]["losses"], ACROSS), (found, runs["longer@1"]["losses"])


def test_bf16_keeps_the_fp32_master_over_a_resume(runs: dict[str, dict[str, Any]]) -> None:
    whole = runs["half@2"]
    assert runs["half resumed@2"]["losses"] == whole["losses"][3:]
    assert runs["half resumed@2"]["norms"] == whole["norms"][3:]
    assert close(runs["half to z3@2"]["losses"], whole["losses"][3:], ACROSS)
    assert close(whole["losses"], runs["z2@1"]["losses"], 5e-3)


def test_frozen_weights_stay(runs: dict[str, dict[str, Any]]) -> None:
    assert all(fact["before"] == fact["after"] for fact in runs.values())


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["metrics"]["loss"] for line in read_lines(folder) if "loss" in line["metrics"]}


def test_a_signal_to_one_rank_saves_and_the_run_goes_on(
    launch: Launch, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """2 ranks whose MLflow server is away, rank 0 alone signalled at its 3rd step; then 1 rank goes on."""
    run = tmp_path / "run"
    options = {"output_dir": str(run), "last_step": 6, "file": "z3", "save_steps": 2}
    (tmp_path / "first.json").write_text(json.dumps(options | {"signal_at": 2}))
    (tmp_path / "second.json").write_text(json.dumps(options))

    away = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = launch(2, "trainer_job.py", tmp_path / "first.json", env=away)
    assert (run / stopping.REQUEUE).exists()
    assert not (run / stopping.DONE).exists()
    assert "goes on from there" in done.stdout
    assert "training goes on" in done.stdout
    # The signal came while step 3 was on its way: it is trained, saved, and nothing after it.
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert list(losses(run)) == [1, 2, 3]

    launch(1, "trainer_job.py", tmp_path / "second.json")
    assert (run / stopping.DONE).exists()
    assert not (run / stopping.REQUEUE).exists()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    # The trainer, over a stop and a change of ranks, computes what the bare loop computed in one go.
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert close(list(losses(run).values()), runs["z1@1"]["losses"], ACROSS)
    metrics = next(line["metrics"] for line in read_lines(run) if line["step"] == 6 and "loss" in line["metrics"])
    assert {"loss/ce", "loss/dice", "loss/mse", "lr", "grad_norm", "speed/samples_per_second"} <= set(metrics)
    assert metrics["grad_norm"] == pytest.approx(runs["z1@1"]["norms"][-1], rel=ACROSS)
    assert [line["step"] for line in read_lines(run) if "valid/score" in line["metrics"]] == [3, 6]

    import mlflow

    state = json.loads((run / "mlflow.json").read_text())
    client = mlflow.MlflowClient(state["uri"])
    assert [metric.step for metric in client.get_metric_history(state["run_id"], "loss")] == [1, 2, 3, 4, 5, 6]


class PlainEngine:
    """What the Trainer asks of an engine, in plain PyTorch: one rank, the optimizer stepped by hand."""

    def __init__(self, accumulation: int) -> None:
        self.module, self.ranks, self.learning_rates, self.grad_norm = Toy(), alone(), {"all": 0.1}, 0.0
        self.accumulation, self.calls, self.moved = accumulation, 0, 0

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> bool:
        self.calls += 1
        self.moved += self.calls % self.accumulation == 0
        return self.calls % self.accumulation == 0


def plain_trainer(folder: Path, steps: list[list[Batch]], **more: Any) -> Trainer:
    engine, tracker = PlainEngine(len(steps[0])), Tracker(folder, experiment="", run_name="", enabled=False)
    options = {"output_dir": folder, "last_step": len(steps), "progress": False} | more
    trainer = Trainer(engine, steps, ToyVision(), tracker, **options)  # type: ignore[arg-type]
    trainer._save = lambda step: None  # type: ignore[method-assign]
    return trainer


def test_unreadable_samples_are_named_and_too_many_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = toy_loader(alone(), 2, 0, 6)
    for batches in steps[2:]:
        batches[0].skipped.extend(["sample-bad: the image is cut off", "sample-worse: no mask"])
    assert plain_trainer(tmp_path, steps, max_bad_share=0.5).train() == stopping.DONE
    assert capsys.readouterr().out.count("left out: sample-bad: the image is cut off") == 4
    with pytest.raises(ValueError, match=r"4 of 36 samples could not be read.*the last was sample-worse"):
        plain_trainer(tmp_path, steps, max_bad_share=0.1).train()
    with pytest.raises(AssertionError, match="the loader ended at step 6"):
        plain_trainer(tmp_path, steps, last_step=7).train()


def alone() -> Ranks:
    return Ranks(0, 0, 1, torch.device("cpu"))


def config() -> dict[str, Any]:
    plan = ds_config.plan_batch(4, 1)
    settings = ds_config.OptimizerSettings(lr=1e-3)
    return ds_config.resolve({"zero_optimization": {"stage": 2}}, plan=plan, optimizer=settings, bf16=False)


def test_parameters_without_a_dimension_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"give scale shape \(1,\)"):
        Engine(model, [], config(), alone(), optimizer=ds_config.OptimizerSettings(lr=1e-3))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that is trained"):
        Engine(
            nn.Linear(2, 2).requires_grad_(False),
            [{"params": []}],
            config(),
            alone(),
            optimizer=ds_config.OptimizerSettings(lr=1e-3),
        )


def test_throughput_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = throughput.Meter(torch.device("cpu"), 2, flops_per_token=1e9)
    meter._since -= 2.0
    for _ in range(4):
        meter.add(samples=8, tokens=100, slots=125)
    figures = meter.read()
    assert figures["speed/samples_per_second"] == pytest.approx(16, rel=0.05)
    assert figures["speed/tokens_per_second"] == pytest.approx(200, rel=0.05)
    assert figures["speed/seconds_per_step"] == pytest.approx(0.5, rel=0.05)
    assert figures["padding_share"] == pytest.approx(0.2)
    assert figures["memory_gib"] > 0.01
    assert "speed/mfu" not in figures
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert throughput.peak_flops(torch.device("cuda")) == 312e12
    assert throughput.peak_flops(torch.device("cpu")) is None
