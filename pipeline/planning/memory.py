"""Memory of one rank by part, from the counts of the real model and DeepSpeed's way of storing it.

Weights, gradients and Adam's state under ZeRO (Rajbhandari et al., arXiv 1910.02054, with DeepSpeed 0.19's padding and
its gradients in the weights' precision) are sums that a test compares with the tensors of a real engine. Activations,
logits and workspace are read off the traced pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.planning.counting import Parameters, Traced
from pipeline.planning.gpus import ASSUMED, Efficiency, Gpu

QUANTISED_BYTES = {"none": None, "nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes per frozen weight. nf4: half a byte and an fp32 scale for 64 of them; int8: one byte, the row's scale aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """How DeepSpeed spreads a model: what its JSON says, numbers of ranks and elements.

    persistence: ZeRO-3 keeps parameters up to this many elements whole on each rank. bucket, prefetch: elements of its
    communication buffers. offload_optimizer, offload_params: kept in the CPU's memory.
    """

    stage: int
    ranks: int
    accumulation: int = 1
    itemsize: int = 2
    bucket: int = 500_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    live_limit: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_params: bool = False

    @classmethod
    def of(cls, config: Mapping[str, object], ranks: int) -> Zero:
        """From a DeepSpeed configuration that runtime.ds_config.resolve has filled."""
        zero = config["zero_optimization"]
        bf16 = config["bf16"]
        assert isinstance(zero, dict) and isinstance(bf16, dict)

        def offloaded(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") != "none"

        return cls(
            stage=zero["stage"],
            ranks=ranks,
            accumulation=int(config["gradient_accumulation_steps"]),  # type: ignore[call-overload]
            itemsize=2 if bf16["enabled"] else 4,
            bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
            live_limit=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_params=offloaded("offload_param"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank on its GPU by part, and `host`, bytes in the CPU's memory per rank."""

    base_weights: float
    trained_weights: float
    gradients: float
    optimizer: float
    clip: float
    activations: float
    logits: float
    workspace: float
    host: float = 0.0

    @property
    def on_gpu(self) -> dict[str, float]:
        """The parts that lie on the GPU."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "host"}

    @property
    def fixed(self) -> float:
        """What lies on the GPU whatever a micro-batch holds."""
        return self.base_weights + self.trained_weights + self.gradients + self.optimizer + self.clip

    @property
    def total(self) -> float:
        """All that lies on the GPU."""
        return sum(self.on_gpu.values())

    def gib(self) -> dict[str, float]:
        """GiB by part, with their total and the CPU's."""
        parts = {**self.on_gpu, "total": self.total, "host": self.host}
        return {name: size / 2**30 for name, size in parts.items()}

    def fits(self, gpu: Gpu, assumed: Efficiency = ASSUMED) -> bool:
        """Whether a GPU holds it, with what is set aside for CUDA and the allocator's losses."""
        return self.total <= usable(gpu.memory, assumed)


def usable(free: float, assumed: Efficiency = ASSUMED) -> float:
    """Bytes that a plan may fill of the `free` bytes of a GPU."""
    return free * (1 - assumed.fragmentation) - assumed.reserve_gib * 2**30


def states(count: Parameters, zero: Zero, *, quant: str = "none") -> Memory:
    """Weights, gradients (between backward and step) and Adam's state with the fp32 master weights, per rank."""
    if zero.stage == 3:
        return _states_cut_up(count, zero)
    base = _base_bytes(count, zero.itemsize, quant)
    # Each group is padded so that every rank's piece begins at a multiple of four bytes.
    padded = sum(_up(sum(sizes), 2 * zero.ranks) for sizes in count.groups)
    own = padded / zero.ranks
    # ZeRO-1 reduces at the end of a global batch: until then each rank adds up whole gradients.
    whole = zero.stage == 1 and zero.accumulation > 1
    gradients = count.all_trained if whole else _kept_gradients(count, zero.ranks)
    # fp32 master weights and two moments; fp32 training keeps master weights, too.
    optimizer = 12.0 * own
    return Memory(
        base_weights=base,
        trained_weights=zero.itemsize * padded,
        gradients=0.0 if zero.offload_optimizer else float(zero.itemsize * gradients),
        optimizer=0.0 if zero.offload_optimizer else optimizer,
        clip=0.0,
        activations=0.0,
        logits=0.0,
        workspace=0.0,
        # The CPU's Adam has its gradients in fp32.
        host=optimizer + 4.0 * own if zero.offload_optimizer else 0.0,
    )


def _kept_gradients(count: Parameters, ranks: int) -> int:
    """Elements of the gradients that the fullest rank keeps until the step: those of every parameter that its piece
    touches, whole, since DeepSpeed keeps views of them."""
    kept = [0] * ranks
    for sizes in count.groups:
        piece = _up(sum(sizes), 2 * ranks) // ranks
        begin = 0
        for number in sizes:
            for rank in range(begin // piece, (begin + number - 1) // piece + 1):
                kept[rank] += number
            begin += number
    return max(kept)


def _states_cut_up(count: Parameters, zero: Zero) -> Memory:
    """ZeRO-3: every parameter alone is padded to a multiple of the ranks; small ones stay whole besides."""
    weights = {True: 0.0, False: 0.0}
    whole = {True: 0.0, False: 0.0}
    own = 0
    for number, trained in count.shapes:
        piece = math.ceil(number / zero.ranks)
        weights[trained] += zero.itemsize * piece
        own += piece if trained else 0
        if number <= zero.persistence:
            whole[trained] += zero.itemsize * number
    optimizer = 12.0 * own
    on_host = (weights[False] + weights[True]) if zero.offload_params else 0.0
    return Memory(
        base_weights=whole[False] + (0.0 if zero.offload_params else weights[False]),
        trained_weights=whole[True] + (0.0 if zero.offload_params else weights[True]),
        gradients=zero.itemsize * own * (0 if zero.offload_optimizer else 1),
        optimizer=0.0 if zero.offload_optimizer else optimizer,
        clip=0.0,
        activations=0.0,
        logits=0.0,
        workspace=0.0,
        host=on_host + (optimizer + zero.itemsize * own if zero.offload_optimizer else 0.0),
    )


def estimate(count: Parameters, zero: Zero, passed: Traced, vision: Traced, *, quant: str = "none") -> Memory:
    """All parts of one rank's memory at the highest moment of a step.

    passed, vision: the traced pass of one micro-batch and of its pictures.
    """
    state = states(count, zero, quant=quant)
    return Memory(
        base_weights=state.base_weights,
        trained_weights=state.trained_weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        clip=float(count.clip_bytes),
        activations=float(passed.activations + passed.features),
        logits=float(passed.logits),
        workspace=max(passed.workspace, vision.workspace) + _buffers(count, zero, quant),
        host=state.host,
    )


def _buffers(count: Parameters, zero: Zero, quant: str) -> float:
    """Bytes that DeepSpeed's communication and bitsandbytes' dequantisation hold beside the pass."""
    bucket = zero.itemsize * min(zero.bucket, count.all_trained)
    if quant != "none":
        # One matrix at a time is made bf16.
        bucket += zero.itemsize * max(number for number, _ in count.shapes)
    if zero.stage == 2:
        # overlap_comm: one bucket is reduced while the other fills. The step makes fp32 gradients of a rank's share.
        return 2 * bucket + 4 * count.all_trained / zero.ranks
    if zero.stage == 1:
        return bucket + 4 * count.all_trained / zero.ranks
    # Weights stay gathered while they are used again soon: those around the turn from forward to backward.
    gathered = min(zero.live_limit, sum(number for number, _ in count.shapes)) + zero.prefetch
    return bucket + zero.itemsize * gathered + 4 * count.all_trained / zero.ranks


def _base_bytes(count: Parameters, itemsize: int, quant: str) -> float:
    per_weight = QUANTISED_BYTES[quant]
    if per_weight is None:
        return float(itemsize * count.base)
    return itemsize * (count.base - count.linears) + per_weight * count.linears


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
