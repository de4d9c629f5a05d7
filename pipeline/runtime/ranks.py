"""Which rank this process is, on which device, and the few things ranks say to each other.

The only definition of rank, local rank and world size. They come from a launcher's environment (deepspeed, torchrun),
from a SLURM step (srun with one task per rank), or there is one process alone.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import socket
import sys
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_LINGER = 3.0
"""Seconds that a failing rank 0 stays for the others, which could not ask it any more who failed first."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers. Collectives need a started process group (engine.start) or a world of one."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    launched: bool = False
    """Whether a launcher started this process (deepspeed, torchrun, srun), or it was typed as it is."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints, logs and writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64; every rank must bring as many values."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's (picklable) value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        self.sum([0.0])

    def agree(self, problem: str) -> None:
        """Raises ValueError on every rank, naming ranks and hosts, unless all bring "": none waits for one
        that has stopped."""
        said: dict[str, list[str]] = {}
        for rank, (node, text) in enumerate(self.gather((host(), problem))):
            if text:
                said.setdefault(text, []).append(f"rank {rank} on {node}")
        if said:
            raise ValueError("; ".join(f"{', '.join(who)}: {text}" for text, who in said.items()))


def join(ranks: Ranks, *, timeout_minutes: float = 120.0) -> None:
    """Starts a process group for what needs no DeepSpeed (scoring); a world of one needs none."""
    if ranks.world_size > 1:
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def part(*, failed: bool = False) -> None:
    """Ends the process group that `join` started, if there is one.

    failed: the other ranks may sit in a collective call, for which NCCL's end would wait: there the process ends here.
    """
    if not dist.is_initialized():
        return
    if failed and dist.get_backend() == "nccl":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def tell_failure(text: str) -> None:
    """Prints why this rank fails, unless another has failed before: those that fail in its wake, or alike, are silent.

    No collective call, since ranks that have not failed would take no part in it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        print(text, file=sys.stderr, flush=True)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        failed = store.add("failed", 1)
    except RuntimeError:
        # Rank 0 holds the store: it has ended, and said why unless it was killed.
        if dist.get_rank() == 1:
            print("rank 0 has ended, and so do the others", file=sys.stderr, flush=True)
        return
    if failed == 1:
        print(text, file=sys.stderr, flush=True)
    deadline = time.monotonic() + _LINGER
    while dist.get_rank() == 0 and store.add("failed", 0) < dist.get_world_size() and time.monotonic() < deadline:
        time.sleep(0.05)


def detect(environment: MutableMapping[str, str] | None = None) -> Ranks:
    """Reads the launcher's environment and completes it (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    DeepSpeed would look for MPI if any of the five were missing. Raises ValueError if a node runs more ranks than it
    has GPUs.
    """
    env = os.environ if environment is None else environment
    launched = True
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", "0"))
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        # Only srun sets the step's variables: a batch script that runs python by itself is one process.
        rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        local = int(env.get("SLURM_LOCALID", "0"))
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
        env.setdefault("MASTER_ADDR", first_host(nodes))
        env.setdefault("MASTER_PORT", str(15000 + int(env.get("SLURM_JOB_ID", "0")) % 10000))
    else:
        rank, local, world, launched = 0, 0, 1, False
    if not 0 <= rank < world:
        raise ValueError(f"RANK {rank} does not lie below WORLD_SIZE {world}")
    env.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(world))
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(free_port() if world == 1 else 29500)
    device = _device(local, env)
    if device.type == "cuda":
        # DeepSpeed takes the GPU of this number, which is not the local rank where a task sees its own GPU alone.
        env["LOCAL_RANK"] = str(device.index)
    return Ranks(rank=rank, local_rank=local, world_size=world, device=device, launched=launched)


def host() -> str:
    """This node's name; SLURM's where it gives one."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: n[3-5,9] gives n3."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    return "".join(part or "" for part in found.groups()) if found else nodelist


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _device(local_rank: int, env: MutableMapping[str, str]) -> torch.device:
    if env.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # srun with --gpus-per-task shows each task one GPU, whatever its local rank.
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_NUM_TASKS" in env and env.get("CUDA_VISIBLE_DEVICES", "").count(",") == 0:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ValueError(f"this node runs rank {local_rank + 1} of its ranks but has {count} GPU(s): start fewer ranks")
    return torch.device("cuda", local_rank)
