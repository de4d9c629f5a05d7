"""How long a call takes, and what the device could do at best: the clock of the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache: written before each run, so that no run finds its operands there."""
HEAD_START_CYCLES = 4_000_000
"""For so long the GPU waits before each run, 2 to 3 ms: longer than Python takes to queue forward and backward of the
sparse vector, so that kernels are timed and not the gaps between them."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds: the median, and the bounds that 20 % of the runs stay below and above."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured rates of the device: bytes per second of a copy (read and written), FLOP/s of a large product."""

    bandwidth: float
    flops: float


def measure(call: Callable[[], object], device: torch.device, *, runs: int = 50, warm_up: int = 10) -> Timing:
    """Times `runs` calls one by one; on CUDA by events, with a cold L2 cache and a call queued as a whole."""
    for _ in range(warm_up):
        call()
    times = _on_cuda(call, device, runs) if device.type == "cuda" else _on_cpu(call, runs)
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), cuts[1], cuts[7])


def _on_cuda(call: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in pairs:
        scratch.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


def _on_cpu(call: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def limits(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Limits:
    """Measures the two rates; `small` for a run whose figures nobody will use."""
    elements, side = (2**16, 64) if small else (2**29, 8192)
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = {"runs": 3, "warm_up": 1} if small else {"runs": 20, "warm_up": 5}
    copied = measure(lambda: target.copy_(source), device, **runs).median
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: left @ right, device, **runs).median
    return Limits(bandwidth=2e3 * elements / copied, flops=2e3 * side**3 / product)
