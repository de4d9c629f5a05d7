"""What can go wrong in a run, made to happen to real ranks: what is said, how it ends, and that no process is left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from forked import REPO, TESTS, Job, start
from safetensors import SafetensorError

from pipeline.runtime import checkpoint, faults, stopping
from pipeline.runtime.ranks import free_port

# The order of summation alone differs between stages and numbers of ranks; a step moves the weights by 1e-2.
ACROSS = 2e-6


def begin(folder: Path, name: str = "run", *, world: int = 2, **options: Any) -> Job:
    """The toy's training in `folder`/run: 6 steps on 2 ranks under ZeRO-3 unless told otherwise."""
    values = {"output_dir": str(folder / "run"), "last_step": 6, "file": "z3"} | options
    (folder / f"{name}.json").write_text(json.dumps(values))
    away = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return start(TESTS / "trainer_job.py", [folder / f"{name}.json"], world=world, log=folder / f"{name}.log", env=away)


def figures(folder: Path, kind: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"][kind] for line in lines if kind in line["metrics"]}


def whole(folder: Path) -> list[str]:
    """The run's checkpoints, newest first, each read and found whole."""
    found = checkpoint.list_checkpoints(folder / "run")
    assert [problem for _, path in found for problem in checkpoint.verify(path)] == []
    return [path.name for _, path in found]


def ends(job: Job, status: int) -> None:
    assert job.end() == status, job.said[-4000:]


def said_once(job: Job, *texts: str) -> None:
    assert all(job.said.count(text) == 1 for text in texts), job.said[-4000:]
    assert "Traceback" not in job.said, job.said[-4000:]


def test_bad_steps_are_skipped_on_all_ranks_alike(tmp_path: Path) -> None:
    """NaN on one rank in the third and sixth step; stopped after the fourth, gone on, and the same without a stop."""
    stopped, straight, alone = tmp_path / "stopped", tmp_path / "straight", tmp_path / "alone"
    for folder in (stopped, straight, alone):
        folder.mkdir()
    job = begin(stopped, nan_at=[2, 5], signal_at=3, last_step=8)
    ends(job, 0)
    assert (stopped / "run" / stopping.REQUEUE).exists()
    assert "step 2 has no finite loss and is skipped (1 in a row, 1 in all)" in job.said
    assert whole(stopped) == ["checkpoint-4"]
    state = checkpoint.read_state(stopped / "run/checkpoint-4")
    assert state["bad_steps"] == {"total": 1, "in_a_row": 0}
    ends(begin(stopped, "again", nan_at=[2, 5], last_step=8), 0)
    ends(begin(straight, nan_at=[2, 5], last_step=8), 0)
    ends(begin(alone, nan_at=[2, 5], last_step=8, world=1, file="z1"), 0)

    losses = figures(straight)
    # Pixels count only where there are pictures: samples 20 and 44 of the last rank's.
    assert list(losses) == [1, 2, 4, 5, 7, 8]
    assert figures(stopped) == losses
    assert figures(alone) == pytest.approx(losses, rel=ACROSS)
    # The rate goes by the number of the step, skipped or not.
    assert figures(straight, "lr") == figures(stopped, "lr") == figures(alone, "lr")
    assert len(set(figures(straight, "lr").values())) >= 7
    assert figures(straight, "steps_skipped")[8] == 2
    # Nothing moved: what was saved before the step is what is there after it.
    record = [json.loads(line) for line in (straight / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in record] == [2, 5]
    assert {micro["rank"] for line in record for micro in line["micro_batches"]} == {1}
    assert record[0]["micro_batches"] == [
        {"rank": 1, "loss": "nan", "keys": ["sample-20", "sample-21"], "tasks": ["caption"] * 2}
    ]


def test_a_bad_step_moves_nothing(tmp_path: Path) -> None:
    """Two bad steps in a row are saved after each; the second file is the first, byte by byte."""
    ends(begin(tmp_path, nan_at=[2, 3], last_step=4, save_steps=1, world=1, file="z2"), 0)
    assert whole(tmp_path) == ["checkpoint-4", "checkpoint-3"]
    for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        three, four = ((tmp_path / "run" / f"checkpoint-{step}" / name).read_bytes() for step in (3, 4))
        assert three == four


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    job = begin(tmp_path, nan_at=[1, 3, 4, 5], max_bad_steps=3, save_steps=2, last_step=9)
    ends(job, 2)
    said_once(job, "--max_bad_steps 3 in a row", "the weights are those of step 2")
    assert "sample-44, sample-45 (loss nan on rank 1)" in job.said
    assert "bad_steps.jsonl" in job.said
    assert whole(tmp_path) == ["checkpoint-4", "checkpoint-2"]
    assert not (tmp_path / "run" / stopping.DONE).exists()


def test_a_rank_that_hangs_ends_the_run_with_every_ranks_stack(tmp_path: Path) -> None:
    job = begin(tmp_path, hang_at=3, hang_timeout=6, save_steps=2)
    ends(job, 1)
    for rank in (0, 1):
        assert f"rank {rank} (process " in job.said
    assert job.said.count("nothing was done for 6 s (--hang_timeout) after step 3") == 2
    # The one that is the cause, and one that waits for it.
    assert "stuck_in_the_loader" in job.said
    assert "all_reduce" in job.said
    assert whole(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path, victim: int) -> None:
    job = begin(tmp_path, last_step=10_000, slow=0.05, save_steps=2)
    job.until(lambda: (tmp_path / "run/checkpoint-2").exists())
    ranks = (tmp_path / "run.pids").read_text().split()
    os.kill(int(ranks[victim]), signal.SIGKILL)
    assert job.end() not in (0, None)
    said_once(job, "another rank has ended" if victim else "rank 0 has ended, and so do the others")
    assert whole(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda n: n.name)
def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    job = begin(tmp_path, last_step=10_000, slow=0.05)
    job.until(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(figures(tmp_path)) > 2)
    os.kill(int((tmp_path / "run.pids").read_text().split()[1]), number)
    ends(job, 0)
    said_once(job, "Stopped by a signal after step")
    assert (tmp_path / "run" / stopping.REQUEUE).exists()
    assert whole(tmp_path) == [f"checkpoint-{max(figures(tmp_path))}"]


@pytest.mark.parametrize("victim", ["command line", "launcher"])
def test_a_launcher_that_is_killed_leaves_no_ranks(tmp_path: Path, victim: str) -> None:
    """deepspeed's own: without the watch both ranks would train on, nobody knowing of them."""
    options = {"output_dir": str(tmp_path / "run"), "last_step": 10_000, "file": "z2", "slow": 0.05}
    (tmp_path / "run.json").write_text(json.dumps(options))
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    env |= {"PYTHONPATH": str(REPO), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", free_port()]
    command += [TESTS / "trainer_job.py", tmp_path / "run.json"]
    log = tmp_path / "log"
    with log.open("w") as file:
        cli = subprocess.Popen(list(map(str, command)), env=env, cwd=REPO, stdout=file, stderr=file)
        deadline = time.monotonic() + 600
        while not (tmp_path / "run/metrics.jsonl").exists() or not figures(tmp_path):
            assert cli.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        everyone = psutil.Process(cli.pid).children(recursive=True)
        launcher = next(p for p in everyone if "deepspeed.launcher.launch" in p.cmdline())
        os.kill(cli.pid if victim == "command line" else launcher.pid, signal.SIGKILL)
        cli.wait(300)
        _, left = psutil.wait_procs(everyone, timeout=300)
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert not left, log.read_text()[-3000:]
    said = log.read_text()
    assert said.count("The launcher has ended before its ranks") == 1, said[-3000:]
    assert (tmp_path / "run" / stopping.REQUEUE).exists()
    assert whole(tmp_path) == [f"checkpoint-{max(figures(tmp_path))}"]


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    job = begin(tmp_path, save_steps=2, last_step=60, world=2, file="z2")
    ends(job, 0)
    newest = whole(tmp_path)[0]
    job = begin(tmp_path, "full", save_steps=2, last_step=80, limit_at=61, file="z2")
    ends(job, 1)
    said_once(job, "the checkpoint was not written: the disk is full", "give the same command again")
    assert f"still holds {newest}" in job.said
    assert whole(tmp_path)[0] == newest
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_an_output_folder_that_vanishes(tmp_path: Path) -> None:
    job = begin(tmp_path, save_steps=2, vanish_at=3, file="z2")
    ends(job, 0)
    said_once(job, "has vanished, and the checkpoints in it: it is made anew")
    assert whole(tmp_path) == ["checkpoint-6", "checkpoint-4"]


def test_an_output_folder_that_cannot_be_made_again(tmp_path: Path) -> None:
    job = begin(tmp_path, save_steps=2, vanish_at=3, in_its_place=True, file="z2")
    ends(job, 1)
    said_once(job, "the checkpoint was not written", "holds no checkpoint", "can be written to")


def test_errors_are_told_apart() -> None:
    def text(error: Exception) -> tuple[str, int]:
        return faults.explain(error, "train.py")

    assert text(ValueError("mend this")) == ("train.py: error: mend this", 2)
    assert text(faults.Fault("that is gone")) == ("train.py: error: that is gone", 1)
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    words = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (full, words):
        said, status = text(error)
        assert "the disk is full" in said and "--save_total_limit" in said and status == 1
    assert "Traceback" in text(OSError(errno.EACCES, "denied"))[0] or "PermissionError" in text(OSError(13, "no"))[0]
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:549] Connection closed by peer [127.0.0.1]:4711")
    assert "another rank has ended" in text(peer)[0]
    assert "RuntimeError: a bug" in text(RuntimeError("a bug"))[0]


def test_too_little_memory_names_the_settings_to_change() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert faults.is_out_of_memory(caught.value)
    assert faults.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not faults.is_out_of_memory(ValueError("out of memory"))
    plan = {"micro_batch": 6, "accumulation": 2, "checkpointing": "none", "stage": 2, "offload": False}
    said = str(faults.out_of_memory(caught.value, max_length=512, **plan))
    assert "--micro_batch 3" in said and "--gradient_checkpointing full" in said
    assert said.index("z3.json") < said.index("z2_offload.json") < said.index("--max_length")
    tight = {"micro_batch": 1, "accumulation": 2, "checkpointing": "full", "stage": 3, "offload": True}
    said = str(faults.out_of_memory(caught.value, max_length=512, **tight))
    assert said.count("--micro_batch") == 1 and ".json" not in said and "--max_length (now 512)" in said
