"""Bytes that one rank sends in a step under ZeRO, and the seconds they take over the machine's links.

Ring collectives: of N bytes each of W ranks passes on N (W-1)/W in a reduce-scatter or an all-gather. What DeepSpeed
0.19 does: ZeRO-1 reduces the trained gradients once a step, ZeRO-2 in every pass; both gather the trained weights after
the step. ZeRO-3 gathers all weights before forward and backward of every pass, small ones excepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.planning.counting import Parameters
from pipeline.planning.gpus import ASSUMED, Efficiency, Gpu
from pipeline.planning.memory import Zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes per rank and step: `hidden` between ranks during passes, `serial` after them, `host` to the CPU and back.

    calls: collectives per step.
    """

    hidden: float
    serial: float
    host: float
    calls: int

    @property
    def total(self) -> float:
        """All bytes that leave or reach a rank."""
        return self.hidden + self.serial + self.host


def traffic(count: Parameters, zero: Zero) -> Traffic:
    """What one optimizer step of `zero.accumulation` passes moves."""
    ring = (zero.ranks - 1) / zero.ranks
    trained = zero.itemsize * count.all_trained
    passes = zero.accumulation
    host = 2 * trained / zero.ranks if zero.offload_optimizer else 0.0
    if zero.stage < 3:
        reductions = passes if zero.stage == 2 else 1
        hidden = trained * ring * reductions if zero.stage == 2 else 0.0
        serial = trained * ring * (2 if zero.stage == 1 else 1)
        buckets = math.ceil(count.all_trained / zero.bucket)
        calls = buckets * reductions + len(count.groups)
        return Traffic(hidden=hidden, serial=serial, host=host, calls=calls if zero.ranks > 1 else 0)
    large = [number for number, _ in count.shapes if number > zero.persistence]
    gathered = 2.0 * passes * zero.itemsize * sum(large)
    if zero.offload_params:
        host += gathered / zero.ranks
    hidden = gathered * ring + trained * ring * passes
    # Weights are gathered in runs of up to the prefetch bucket, and alone where they are larger.
    runs = max(1, sum(large) // max(zero.prefetch, max(large, default=1)))
    calls = passes * (2 * runs + math.ceil(count.all_trained / zero.bucket))
    return Traffic(hidden=hidden, serial=0.0, host=host, calls=calls if zero.ranks > 1 else 0)


def rate(gpu: Gpu, ranks: int) -> float:
    """Bytes/s of a ring through `ranks` GPUs: the slower of the links in a node and between nodes.

    NCCL runs several rings at once, so that a node's ports serve its GPUs together.
    """
    return gpu.peer_rate if ranks <= gpu.per_node else min(gpu.peer_rate, gpu.node_rate)


def seconds(moved: float, calls: int, gpu: Gpu, ranks: int, assumed: Efficiency = ASSUMED) -> float:
    """Seconds of `calls` collectives that move `moved` bytes per rank."""
    if ranks == 1:
        return 0.0
    return moved / (rate(gpu, ranks) * assumed.link) + calls * assumed.latency * math.log2(ranks)
