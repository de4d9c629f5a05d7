"""The fastest configuration that fits, of all ZeRO stages, offloads, micro-batches, checkpointing and precisions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.planning import step_time
from pipeline.planning.counting import Parameters, Traced
from pipeline.planning.gpus import Gpu
from pipeline.planning.memory import Memory, Zero, estimate
from pipeline.planning.step_time import StepTime
from pipeline.planning.workload import Workload

FILES = ("z1", "z2", "z2_offload", "z3", "z3_offload")
"""The DeepSpeed files that are tried, the simplest first."""


CHECKPOINTING = ("none", "attention", "full")
"""What is recomputed in the backward pass, the least first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a search may choose, named as the flags are."""

    file: str
    micro_batch: int
    checkpointing: str
    quant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A choice, what it needs and how long it takes."""

    choice: Choice
    zero: Zero
    memory: Memory
    time: StepTime
    flops: float
    """Matrix FLOPs of a step on one rank that tuning cannot do without: no recomputation."""
    workload: Workload
    gpu: Gpu

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.time.total * self.workload.steps / 3600

    @property
    def mfu(self) -> float:
        """Share of the GPU's peak that does necessary work."""
        return self.flops / (self.time.total * self.gpu.flops)

    @property
    def fits(self) -> bool:
        """Whether the GPU holds it."""
        return self.memory.fits(self.gpu)


Tracer = Callable[[int, str], tuple[Traced, float]]
"""(samples of a pass, what is checkpointed) -> its trace and the mean share of its work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans one model and workload on one kind of GPU. Traces come from outside: they are the only slow thing."""

    count: Parameters
    workload: Workload
    gpu: Gpu
    trace: Tracer
    trace_vision: Callable[[int], Traced]

    def plan(self, choice: Choice, zero: Zero) -> Plan:
        """Memory and time of one choice under a filled DeepSpeed configuration."""
        passed, share = self.trace(choice.micro_batch, choice.checkpointing)
        needed = self.trace(choice.micro_batch, "none")[0]
        vision = self.trace_vision(choice.micro_batch)
        return Plan(
            choice=choice,
            zero=zero,
            memory=estimate(self.count, zero, passed, vision, quant=choice.quant),
            time=step_time.predict(
                self.count,
                zero,
                self.gpu,
                passed,
                vision,
                share=share,
                quant=choice.quant,
                recomputed=choice.checkpointing == "full",
            ),
            flops=zero.accumulation * share * needed.flops,
            workload=self.workload,
            gpu=self.gpu,
        )

    def fastest(self, ranks: int, zero_of: Callable[[str, int], Zero], quants: tuple[str, ...]) -> Plan:
        """The fastest plan that fits; of those within 1 % the one with the fewest devices (the search's order).

        zero_of: (file of FILES, micro-batch) -> the filled configuration. Raises ValueError if nothing fits, saying how
        much is missing.
        """
        plans = [self.plan(choice, zero_of(choice.file, choice.micro_batch)) for choice in self._choices(ranks, quants)]
        fitting = [plan for plan in plans if plan.fits]
        if not fitting:
            least = min(plans, key=lambda plan: plan.memory.total)
            raise ValueError(
                f"nothing fits: the smallest needs {least.memory.total / 2**30:.1f} GiB on each {self.gpu.name} "
                f"({least.choice}). Take more or larger GPUs, or --base_quant nf4"
            )
        best = min(plan.time.total for plan in fitting)
        return next(plan for plan in fitting if plan.time.total <= 1.01 * best)

    def _choices(self, ranks: int, quants: tuple[str, ...]) -> Iterator[Choice]:
        share = self.workload.global_batch // ranks
        sizes = [number for number in range(share, 0, -1) if share % number == 0]
        for quant, file, checkpointing, micro in itertools.product(quants, FILES, CHECKPOINTING, sizes):
            # bitsandbytes' packed weights cannot be cut up by ZeRO-3.
            if quant == "none" or not file.startswith("z3"):
                yield Choice(file=file, micro_batch=micro, checkpointing=checkpointing, quant=quant)
