"""How fast training runs: samples and tokens per second, share of the GPU's peak, memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from pipeline.planning.gpus import of_device


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, or None if it is no GPU or not in the table."""
    if device.type != "cuda":
        return None
    gpu = of_device(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None


def memory_gib(device: torch.device) -> float:
    """Most memory used so far in GiB: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """Counts samples and tokens between readings. flops_per_token: of a training step, forward and backward."""

    def __init__(self, device: torch.device, world_size: int, *, flops_per_token: float | None = None) -> None:
        self._device, self._world, self._flops = device, world_size, flops_per_token
        self._peak = peak_flops(device)
        self.restart()

    def restart(self) -> None:
        """Starts a new interval, so that a save or a validation does not count as training time."""
        self._since = time.perf_counter()
        self._steps = self._samples = self._tokens = self._slots = 0.0

    def add(self, *, samples: float, tokens: float, slots: float) -> None:
        """Counts one step of all ranks: tokens of samples, and slots, the tokens with padding."""
        self._steps += 1
        self._samples += samples
        self._tokens += tokens
        self._slots += slots

    def read(self) -> dict[str, float]:
        """Figures since the last reading."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        figures = {
            "speed/samples_per_second": self._samples / seconds,
            "speed/tokens_per_second": self._tokens / seconds,
            "speed/seconds_per_step": seconds / max(self._steps, 1.0),
            "padding_share": 1.0 - self._tokens / self._slots if self._slots else 0.0,
            "memory_gib": memory_gib(self._device),
        }
        if self._peak and self._flops:
            figures["speed/mfu"] = self._tokens * self._flops / (seconds * self._peak * self._world)
        self.restart()
        return figures
