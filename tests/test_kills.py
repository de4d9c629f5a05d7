"""train.py on the mini world's models, killed at random and resumed: the end is that of a run nobody disturbed.

Each kill is a SIGKILL to a random process of the job (a rank, the launcher, a loader worker) at a random step, every
second one while a checkpoint is being written. `KILLS=30 pytest tests/test_kills.py -s` does so thirty times; the
suite three times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked import REPO, Job, start

from pipeline.data.writer import pack
from pipeline.mini.source import MiniSource
from pipeline.runtime import checkpoint, stopping

KILLS = int(os.environ.get("KILLS", "3"))
STEPS = 8 + 5 * KILLS
pytestmark = pytest.mark.timeout(600 + 120 * KILLS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini")
    pack(MiniSource({"train": 24}), "train", out, progress=False)
    return out


def begin(folder: Path, shards: Path, attempt: int) -> Job:
    flags: dict[str, Any] = {
        "preset": "mini",
        "data": shards,
        "output_dir": folder / "run",
        "deepspeed": REPO / "ds_configs/z2.json",
        "bf16": "false",
        "global_batch": 4,
        "task_mix": "1,1,1,1",  # one of each in every step, so that losses of two steps compare
        "micro_batch": 1,
        "max_steps": STEPS,
        "lr": 1e-3,
        "save_steps": 2,
        "save_total_limit": 3,
        "logging_steps": 1,
        "num_workers": 1,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{shards / 'mlflow.db'}", "OMP_NUM_THREADS": "1"}
    return start(REPO / "pipeline" / "train.py", words, log=folder / f"{attempt}.log", env=env)


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """What each step computed, by step; a line that is just being written is left out."""
    path = folder / "run" / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n") and "loss" in (record := json.loads(line))["metrics"]:
            own = {name: value for name, value in record["metrics"].items() if name.startswith(("loss", "grad", "lr"))}
            assert record["step"] not in found, f"step {record['step']} stands there twice"
            found[record["step"]] = own
    return found


def test_a_run_that_is_killed_ends_as_one_that_was_not(tmp_path: Path, shards: Path) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    killed.mkdir()
    job = begin(quiet, shards, 0)
    assert job.end(600) == 0, job.said[-3000:]
    expected = figures(quiet)
    assert list(expected) == list(range(1, STEPS + 1))
    assert expected[STEPS]["loss"] < expected[1]["loss"]

    chance = random.Random(KILLS)
    stops = sorted(chance.sample(range(2, STEPS - 2), KILLS))
    for attempt, stop in enumerate(stops):
        # A step of this job at least: what is killed before its ranks are there leaves them to run to their end.
        wanted = max(stop, max(figures(killed), default=0) + 1)
        job = begin(killed, shards, attempt)
        job.until(lambda wanted=wanted: max(figures(killed), default=0) >= wanted, pause=0.05)
        writing = attempt % 2 == 1
        if writing:
            job.until(lambda: list((killed / "run").glob("checkpoint-*.tmp")), pause=0.0005)
        else:
            time.sleep(chance.random() * 0.3)
        kinds = {kind: members for kind, members in job.members().items() if members}
        kind = chance.choice(sorted(kinds))
        victim = chance.choice(sorted(kinds[kind], key=lambda process: process.pid))
        os.kill(victim.pid, signal.SIGKILL)
        status = job.end()
        assert not (killed / "run" / stopping.DONE).exists()
        found = checkpoint.list_checkpoints(killed / "run")
        problems = [problem for _, path in found for problem in checkpoint.verify(path)]
        torn = [path.name for path in (killed / "run").glob("*.tmp")]
        print(
            f"kill {attempt + 1}: {kind} {'while saving' if writing else 'between'} at step {max(figures(killed))}, "
            f"exit status {status}; whole: {[step for step, _ in found]}, torn: {torn}, problems: {problems}"
        )
        assert not problems
    job = begin(killed, shards, KILLS)
    assert job.end(600) == 0, job.said[-3000:]
    assert (killed / "run" / stopping.DONE).exists()
    assert figures(killed) == expected
    for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        first, second = (folder / "run" / f"checkpoint-{STEPS}" / name for folder in (quiet, killed))
        assert first.read_bytes() == second.read_bytes()
    print(f"{KILLS} kills in {STEPS} steps: losses, gradient norms, weights and moments are those of the quiet run")
