"""The job scripts of slurm/ on a real SLURM of two nodes, which tests/slurm_cluster.py brings up on this machine.

A start of two ranks costs many seconds of imports, so the jobs go in together and each test reads what became of its
own. Where SLURM cannot start, all are skipped with the reason. On failure the ends of all logs are printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from slurm_cluster import CannotStart, Cluster
from tiny_run import CLIP, REPO, clip_file, llama_tokenizer, texts
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.data.manifest import read_manifest
from pipeline.data.writer import pack
from pipeline.mini.source import MiniSource

STEPS = 24
SCENES = {"train": 48, "valid": 8, "test": 8}
MINI = {"mini_train": 48, "mini_valid": 8, "mini_test": 8, "samples_per_shard": 8}


class World:
    """The cluster, and the files that the jobs are given."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.root, self.cluster = root, cluster
        self.runs, self.shards = root / "runs", root / "shards"
        for split in SCENES:
            pack(MiniSource(SCENES), split, self.shards, samples_per_shard=8, workers=1, progress=False)
        self.mlflow = f"sqlite:///{root / 'mlflow.db'}"
        # Two jobs that make one database at a time would be in each other's way.
        mlflow.MlflowClient(self.mlflow).create_experiment("neural-tuning", (root / "mlartifacts").as_uri())
        self.jobs: dict[str, int] = {}

    def submit(self, name: str, script: str, *flags: Any, options: tuple[str, ...] = (), **env: str) -> int:
        """`sbatch` as it is typed in the checkout; the job's output is in jobs/NAME.out."""
        out = self.root / "slurm" / "jobs" / f"{name}.out"
        out.parent.mkdir(exist_ok=True)
        words = [*options, f"--job-name={name}", f"--output={out}", f"slurm/{script}", *map(str, flags)]
        self.jobs[name] = self.cluster.sbatch(*words, cwd=REPO, env=env)
        return self.jobs[name]

    def said(self, name: str) -> str:
        out = self.root / "slurm" / "jobs" / f"{name}.out"
        return out.read_text(errors="replace") if out.exists() else ""

    def run_dir(self, name: str) -> Path:
        return self.runs / f"{name}-{self.jobs[name]}"

    def ended(self, name: str, state: str, seconds: float = 420) -> dict[str, str]:
        """The facts of a job, once it has ended; it must be in `state`."""
        states = self.cluster.wait(self.jobs[name], seconds=seconds)
        assert states == {state}, f"{name}: {states}\n{self.cluster.logs()}"
        return self.cluster.facts(self.jobs[name])

    def mini_flags(self) -> list[Any]:
        values = {"data": self.shards, "max_steps": STEPS, "global_batch": 4, "micro_batch": 2, "logging_steps": 1}
        values |= {"save_steps": 0, "num_workers": 0, "tasks": "caption,referring,generation"}
        return [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A cluster with all the jobs of this module submitted, but for those whose test has to watch them."""
    root = tmp_path_factory.mktemp("slurm")
    env = {
        "NT_VENV": str(Path(sys.executable).parent.parent),
        "NT_RUNS": str(root / "runs"),
        "NT_LLAMA_13B": str(root / "no-llama"),
        "NT_CLIP": str(root / "no-clip.safetensors"),
        "NT_SHARDS": str(root / "no-shards"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
        "OMP_NUM_THREADS": "1",
        # As left in the shell by another launcher.
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster(root / "slurm", env))
        except CannotStart as reason:
            pytest.skip(f"no SLURM here: {reason}")
        world = World(root, cluster)
        on_cpu = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")
        thirteen = shaped_like_13b(root)
        world.submit("interrupted", "mini.sh", *world.mini_flags(), options=("--time=30", "--signal=B:USR2@240"))
        world.submit("whole", "mini.sh", *world.mini_flags())
        world.submit("bare", "train_13b.sh", options=("--ntasks-per-node=1",))
        world.submit("tiny13b", "train_13b.sh", *thirteen, "--data", world.shards, options=on_cpu)
        flags = [word for name, value in MINI.items() for word in (f"--{name}", value)]
        world.submit("array", "shard_mmud.sh", *flags, "--out", root / "array", options=("--array=1-3",))
        yield world


def shaped_like_13b(root: Path) -> list[Any]:
    """Flags of a LLaMA-2-13B with each width divided by 32: 40 layers, 40 heads; random weights in several files."""
    tokenizer = llama_tokenizer(texts())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=5120 // 32,
        intermediate_size=13824 // 32,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "llama13b", max_shard_size="10MB")
    tokenizer.save_pretrained(root / "llama13b")
    assert len(list((root / "llama13b").glob("*.safetensors"))) > 1
    flags = {"base": root / "llama13b", "clip": CLIP, "clip_weights": clip_file(root / "clip.safetensors")}
    flags |= {"max_steps": 1, "global_batch": 2, "max_length": 320, "num_workers": 0}
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def losses(run: Path) -> list[dict[str, float]]:
    """The figures of each step that depend on computation alone."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in line["metrics"].items() if name.startswith("loss") or name in ("grad_norm", "lr")}
        for line in lines
        if "loss" in line["metrics"]
    ]


def test_a_job_that_meets_its_time_limit_saves_and_comes_back(world: World) -> None:
    cluster, job = world.cluster, world.jobs["interrupted"]
    run = world.run_dir("interrupted")

    # Rank 1 is frozen before the models are loaded and the other waits for it: however fast or busy this machine is,
    # the limit comes before the last step. Both watch for signals by now, and train a step before they heed them.
    def going() -> bool:
        return "Tuning" in world.said("interrupted") or bool(cluster.states(job) & {"FAILED", "COMPLETED", "TIMEOUT"})

    cluster.poll(going, "the ranks to be past the preflight", 300, every=0.05)
    ranks = cluster.processes(job, rank=1, word="pipeline/train.py")
    assert len(ranks) == 1, cluster.logs()
    os.kill(ranks[0], signal.SIGSTOP)
    started = time.mktime(time.strptime(cluster.facts(job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    # Two to three minutes from now, and the signal is due four minutes before.
    minutes = (time.time() - started) // 60 + 3
    cluster.scontrol("update", f"JobId={job}", f"TimeLimit={minutes:.0f}")
    cluster.poll(lambda: "SLURM asks for the end" in world.said("interrupted"), "the signal before the limit", 180)
    os.kill(ranks[0], signal.SIGCONT)
    cluster.poll(lambda: cluster.facts(job)["Restarts"] == "1", "the job to be requeued", 240)
    cluster.scontrol("update", f"JobId={job}", "TimeLimit=30")

    facts = world.ended("interrupted", "COMPLETED")
    world.ended("whole", "COMPLETED")
    assert facts["Restarts"] == "1"
    said = world.said("interrupted")
    assert "back to the queue: restart 1 of at most" in said
    assert f"Going on from {run}/checkpoint-" in said
    assert (run / "DONE").exists() and not (run / "REQUEUE").exists()
    assert losses(run) == losses(world.run_dir("whole"))
    assert len(losses(run)) == STEPS
    assert losses(run)[-1]["loss"] < losses(run)[0]["loss"]


def test_mlflow_has_one_run_for_both_starts(world: World) -> None:
    world.ended("interrupted", "COMPLETED")
    client = mlflow.MlflowClient(world.mlflow)
    (experiment,) = [found for found in client.search_experiments() if found.name == "neural-tuning"]
    runs = client.search_runs([experiment.experiment_id])
    own = [run for run in runs if run.info.run_name == world.run_dir("interrupted").name]
    assert [run.info.status for run in own] == ["FINISHED"]
    history = client.get_metric_history(own[0].info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, STEPS + 1))


def test_mini_trains_on_two_nodes(world: World) -> None:
    world.ended("whole", "COMPLETED")
    run = world.run_dir("whole")
    assert (run / "DONE").exists()
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert "on n[1-2]" in world.said("whole")
    assert "2 per pass x 1 pass x 2 ranks" in world.said("whole")


def test_an_array_packs_the_same_bytes(world: World) -> None:
    world.ended("array", "COMPLETED")
    made, wanted = read_manifest(world.root / "array"), read_manifest(world.shards)
    assert len(wanted["splits"]["train"]["shards"]) == 6
    for split in SCENES:
        assert made["splits"][split]["shards"] == wanted["splits"][split]["shards"]


def test_a_model_shaped_like_13b_is_loaded_and_tuned(world: World) -> None:
    world.ended("tiny13b", "COMPLETED")
    assert "Tuning llama13b on 48 samples" in world.said("tiny13b")
    config = json.loads((world.run_dir("tiny13b") / "run.json").read_text())
    assert config["world_size"] == 2 and config["deepspeed"]["bf16"]["enabled"]
    assert (world.run_dir("tiny13b") / "checkpoint-1" / "trained.safetensors").stat().st_size > 0


def test_a_fresh_clone_is_told_all_that_it_lacks(world: World) -> None:
    facts = world.ended("bare", "FAILED")
    assert facts["ExitCode"] == "2:0" and facts["Restarts"] == "0"
    said = world.said("bare")
    assert "train.py: error: 4 things to mend before this run can start" in said
    for words in ("SLURM gave this job 8 GPU(s)", "no-llama", "no-clip.safetensors", "no-shards"):
        assert said.count(words) >= 1, said
    assert "tuning" not in said and "Traceback" not in said


def fake_python(folder: Path, body: str) -> str:
    """A virtual environment whose python is a shell script: what a job does to its script, without the imports."""
    (folder / "bin").mkdir(parents=True)
    path = folder / "bin" / "python"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(folder)


def test_what_the_script_makes_of_the_ends_of_a_run(world: World) -> None:
    """The cap on restarts, scancel, a signal before python watches, a failing rank, an end without a marker."""
    cluster = world.cluster
    out = 'out="$NT_RUNS/$SLURM_JOB_NAME-$SLURM_JOB_ID"; touch "$out/started"; '
    bodies = {
        "capped": 'touch "$out/REQUEUE"',
        "cancelled": 'trap "touch $out/REQUEUE; exit 0" TERM; while :; do sleep 0.2; done',
        "early": '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && { touch "$out/DONE"; exit 0; }; exec sleep 600',
        "broken": "exit 3",
        "stale": "exit 5",
    }
    options = ("--ntasks-per-node=1", "--gpus-per-node=0")
    for name, body in bodies.items():
        env = {"NT_VENV": fake_python(world.root / "fake" / name, out + body)}
        flags = []
        if name == "capped":
            env["NT_MAX_RESTARTS"] = "0"
        if name == "stale":
            # The marker of an earlier job.
            flags = [f"--output-dir={world.runs / 'stale'}"]
            (world.runs / "stale").mkdir(parents=True)
            (world.runs / "stale" / "REQUEUE").touch()
            env["NT_VENV"] = fake_python(world.root / "fake" / "stale2", bodies[name])
        world.submit(name, "train_7b.sh", *flags, options=options, **env)
    for name in ("cancelled", "early"):
        cluster.poll(lambda name=name: (world.run_dir(name) / "started").exists(), f"{name} to start", 120)
    cluster.scancel(str(world.jobs["cancelled"]))
    cluster.scancel("--batch", "--signal=USR2", str(world.jobs["early"]))

    assert world.ended("capped", "FAILED")["ExitCode"] == "1:0"
    assert "is not done after 0 restarts" in world.said("capped")
    assert f"--output_dir {world.run_dir('capped')}" in world.said("capped")
    assert world.ended("cancelled", "CANCELLED")["Restarts"] == "0"
    assert world.ended("broken", "FAILED")["ExitCode"] == "3:0"
    assert world.ended("stale", "FAILED")["ExitCode"] == "5:0"
    assert world.ended("early", "COMPLETED")["Restarts"] == "1"


def test_slurm_takes_every_script(world: World) -> None:
    record = fake_python(world.root / "fake" / "evaluate", 'printf "%s\\n" "$@"')
    world.submit("evaluate", "evaluate.sh", "--checkpoint", "runs/a b", NT_VENV=record)
    world.ended("evaluate", "COMPLETED")
    words = ["pipeline/evaluate_mmud.py", "--split", "test", "--condition", "all", "--checkpoint", "runs/a b"]
    assert world.said("evaluate").splitlines()[-len(words) :] == words
