"""What can stop a run from outside, told in one message: a full disk, too little memory, a rank that is gone.

`explain` is what an entry script prints at its end. Exit status: 2 for what the user can mend in the command or the
data, 1 for every other fault; SLURM and the launchers see both.
"""

from __future__ import annotations

import errno
import traceback

import torch

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("no space left on device", "disk quota exceeded", "file too large")
_MEMORY_TEXTS = ("can't allocate memory", "not enough memory: you tried to allocate", "out of memory")
# What gloo, nccl and the rendezvous store say of a peer that is no longer there.
_PEER_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "socket timeout",
    "broken pipe",
    "remote process exited",
    "timed out waiting",
)


_WORKER_TEXT = "DataLoader worker"
"""What torch says of a process that it loads with and that is no longer there begins with it."""


class Fault(RuntimeError):
    """Stops a run and needs no traceback: the message says what happened and what to do."""


def explain(error: Exception, script: str) -> tuple[str, int]:
    """What to print of an error that ended `script`, and the exit status."""
    if isinstance(error, ValueError | FloatingPointError):
        return f"{script}: error: {error}", 2
    if isinstance(error, Fault):
        return f"{script}: error: {error}", 1
    if is_full_disk(error):
        return f"{script}: error: {full_disk(error)}; the checkpoints so far are whole", 1
    if lost_peer(error):
        return (
            f"{script}: error: another rank has ended, so that this one cannot go on. If nothing above says why, it "
            "was killed: by hand, or by the kernel for want of CPU memory (dmesg, or sacct's State). The same command "
            f"goes on from the newest checkpoint. ({_first_line(error)})",
            1,
        )
    if isinstance(error, RuntimeError) and _WORKER_TEXT in str(error):
        return (
            f"{script}: error: a loader process has ended. If nothing above says why, it was killed, mostly by the "
            "kernel for want of CPU memory or of /dev/shm: lower --num_workers, or ask for more memory (SLURM: --mem). "
            f"The same command goes on from the newest checkpoint. ({_first_line(error)})",
            1,
        )
    return "".join(traceback.format_exception(error)), 1


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space, quota or file size; safetensors says so in words alone."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return type(error).__name__ == "SafetensorError" and any(text in str(error).lower() for text in _FULL_TEXTS)


def full_disk(error: BaseException) -> str:
    """The message, with the remedy."""
    return (
        f"the disk is full, or a quota or limit is reached ({_first_line(error)}): make room (--save_total_limit keeps "
        "fewer checkpoints) and give the same command again; it goes on from the newest checkpoint"
    )


def lost_peer(error: BaseException) -> bool:
    """Whether a collective call failed because another rank is gone."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(part in text for part in _PEER_TEXTS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_TEXTS)


def out_of_memory(
    error: BaseException,
    *,
    micro_batch: int,
    accumulation: int,
    checkpointing: str,
    stage: int,
    offload: bool,
    max_length: int,
) -> Fault:
    """The fault that says which settings take the memory, and what to change first; `error` is torch's own."""
    remedies = []
    if micro_batch > 1:
        half = next(n for n in range(micro_batch // 2, 0, -1) if micro_batch % n == 0)
        remedies.append(f"--micro_batch {half} (the global batch stays: more passes make up for it)")
    if checkpointing != "full":
        remedies.append("--gradient_checkpointing full")
    if stage < 3:
        remedies.append("--deepspeed ds_configs/z3.json (the base model is spread over the ranks)")
    if not offload:
        remedies.append(f"--deepspeed ds_configs/z{max(stage, 2)}_offload.json")
    remedies.append(f"a smaller --max_length (now {max_length})")
    return Fault(
        f"out of memory with --micro_batch {micro_batch} (x {accumulation} passes), --gradient_checkpointing "
        f"{checkpointing}, ZeRO-{stage}{' with offload' if offload else ''}. Change, in this order: "
        f"{'; '.join(remedies)}. The checkpoints so far are whole. ({_first_line(error)})"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
