"""Rank, local rank and world size from each launcher's environment; no process group is started."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime.ranks import Ranks, detect, first_host, host, tell_failure


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_alone_gets_everything_deepspeed_asks_for() -> None:
    env: dict[str, str] = {}
    ranks = detect(env)
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (0, 0, 1)
    assert ranks.is_main
    assert set(env) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert detect({})


def test_launcher() -> None:
    env = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "4000"}
    ranks = detect(env)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.is_main) == (5, 1, 8, False)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("n1", "4000")


def test_slurm_step_and_batch_script() -> None:
    job = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    step = job | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-09,12],login"}
    ranks = detect(step)
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (3, 1, 4)
    assert (step["MASTER_ADDR"], step["MASTER_PORT"]) == ("gpu07", str(15000 + 123456 % 10000))
    # A python started by the batch script itself, without srun, must not wait for three others.
    assert detect(job | {"SLURM_PROCID": "0"}).world_size == 1


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("a,b", "a"), ("n[3-5,9]", "n3"), ("r1n[02]x,q", "r1n02x"), ("a-b[1,2]", "a-b1")]
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="RANK 2"):
        detect({"RANK": "2", "WORLD_SIZE": "2"})


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="start fewer ranks"):
        detect(dict(env))
    assert detect(env | {"DS_ACCELERATOR": "cpu"}).device.type == "cpu"
    # One GPU shown to each SLURM task.
    step = env | {"SLURM_STEP_NUM_TASKS": "2", "CUDA_VISIBLE_DEVICES": "1"}
    found = detect(step)
    assert (found.device, found.local_rank) == (torch.device("cuda", 0), 1)
    assert step["LOCAL_RANK"] == "0", "DeepSpeed's own number of the GPU"


def test_a_world_of_one_needs_no_process_group() -> None:
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    assert ranks.sum([1.5, 2.0]) == [1.5, 2.0]
    assert ranks.gather("a") == ["a"]
    assert ranks.from_main({"a": 1}) == {"a": 1}
    ranks.barrier()
    ranks.agree("")
    with pytest.raises(ValueError, match=f"^rank 0 on {re.escape(host())}: no such folder$"):
        ranks.agree("no such folder")


def test_the_first_rank_to_fail_tells_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Gone:
        def add(self, *_: object) -> int:
            raise dist.DistNetworkError("reset by peer")

    store: Any = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def said_by(rank: int) -> str:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        tell_failure(f"rank {rank}: no such folder")
        return capsys.readouterr().err

    assert said_by(2) == "rank 2: no such folder\n"
    assert said_by(1) == ""
    assert said_by(0) == ""
    # Rank 0 has ended, and the store with it.
    store = Gone()
    assert said_by(1) == "rank 0 has ended, and so do the others\n"
    assert said_by(2) == ""


def test_a_rank_alone_tells_every_failure(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        tell_failure("no such folder")
        assert capsys.readouterr().err == "no such folder\n"


def test_leaving_runs_exit_handlers_but_no_teardown(run_python: Callable[..., Any], tmp_path: Path) -> None:
    # gloo's threads still hold tensors here: sys.exit would now and then end in abort (-6).
    script = f"""
import atexit, sys
import torch, torch.distributed as dist
from pipeline.runtime import engine
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore({str(tmp_path / "store")!r}, 1))
sys.kept = dist.group.WORLD
atexit.register(print, "handler ran", end="")
for _ in range(200):
    dist.all_reduce(torch.ones(200_000), async_op=True)
engine.close()
engine.leave(3)
"""
    done = run_python("-c", script)
    assert (done.returncode, done.stdout) == (3, "handler ran"), done.stderr
