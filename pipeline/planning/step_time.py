"""Seconds of one optimizer step: every operation of the traced pass on the GPU's roofline, and what comes on top.

An operation takes the longest of its matrix FLOPs at the GPU's rate, its bytes at the memory's rate, and the time of a
launch (the roofline of Williams et al., 2009). The rates are data sheets' times assumed efficiencies: a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.planning import communication
from pipeline.planning.counting import Parameters, Traced
from pipeline.planning.gpus import ASSUMED, Efficiency, Gpu
from pipeline.planning.memory import QUANTISED_BYTES, Zero
from pipeline.planning.trace import Operation

ADAM_BYTES = 34
"""Bytes that AdamW reads and writes per element: fp32 weight, gradient and moments, bf16 weight and gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step by what it is spent on."""

    matrices: float
    moving: float
    launches: float
    vision: float
    dequantising: float
    communication: float
    optimizer: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


def predict(
    count: Parameters,
    zero: Zero,
    gpu: Gpu,
    passed: Traced,
    vision: Traced,
    *,
    share: float = 1.0,
    quant: str = "none",
    recomputed: bool = False,
    assumed: Efficiency = ASSUMED,
) -> StepTime:
    """One step of zero.accumulation passes. share: mean part of the traced pass's operations that a pass does."""
    passes = zero.accumulation
    by = {name: passes * spent for name, spent in _roofline(passed.operations, gpu, share, assumed).items()}
    tower = passes * sum(_roofline(vision.operations, gpu, 1.0, assumed).values())
    dequantising = passes * _dequantising(count, gpu, quant, recomputed, assumed)
    computing = sum(by.values()) + tower + dequantising

    traffic = communication.traffic(count, zero)
    hidden = communication.seconds(traffic.hidden, traffic.calls, gpu, zero.ranks, assumed)
    serial = communication.seconds(traffic.serial, 0, gpu, zero.ranks, assumed)
    host = traffic.host / (gpu.host_rate * assumed.link)
    own = count.all_trained / zero.ranks
    stepping = (
        own / assumed.host_adam if zero.offload_optimizer else own * ADAM_BYTES / (gpu.memory_rate * assumed.memory)
    )
    return StepTime(
        matrices=by["matrices"],
        moving=by["moving"],
        launches=by["launches"],
        vision=tower,
        dequantising=dequantising,
        communication=max(0.0, hidden - assumed.overlap * computing) + serial + host,
        optimizer=stepping,
    )


def _roofline(operations: Iterable[Operation], gpu: Gpu, share: float, assumed: Efficiency) -> dict[str, float]:
    """Seconds of the operations, each under what limits it."""
    spent = {"matrices": 0.0, "moving": 0.0, "launches": 0.0}
    memory_rate = gpu.memory_rate * assumed.memory
    for operation in operations:
        peak = gpu.flops if operation.itemsize <= 2 else gpu.fp32_flops
        matrix = share * operation.flops / (peak * assumed.matrix)
        moving = share * operation.moved / memory_rate
        longest = max(matrix, moving, assumed.launch)
        limit = "matrices" if longest == matrix else "moving" if longest == moving else "launches"
        spent[limit] += longest
    return spent


def _dequantising(count: Parameters, gpu: Gpu, quant: str, recomputed: bool, assumed: Efficiency) -> float:
    """Seconds in which bitsandbytes makes the frozen matrices bf16 before each product, forward and backward."""
    stored = QUANTISED_BYTES[quant]
    if stored is None:
        return 0.0
    uses = 3 if recomputed else 2
    return uses * count.linears * (stored + 2) / (gpu.memory_rate * assumed.memory)
