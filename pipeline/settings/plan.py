"""The flags of pipeline/plan.py beside those of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.gpus import GPUS
from pipeline.planning.workload import MMUD_TRAIN
from pipeline.runtime.command_line import flag
from pipeline.settings.checks import need


@dataclass(kw_only=True)
class PlanArguments:
    """The machine and the data that are planned for."""

    gpu: str = flag("A100-80", f"kind of GPU: {', '.join(GPUS)}")
    gpus: int = flag(1, "number of GPUs, 1 to 1024")
    gpus_per_node: int = flag(0, "GPUs in a node; 0: as many as such nodes usually have")
    samples: int = flag(MMUD_TRAIN, "samples of one epoch (MMUD's training split)")
    text_tokens: float = flag(110.0, "tokens of question and answer, mean")
    fit: bool = flag(False, "search the fastest of all DeepSpeed files, micro-batches, checkpointing and precisions")
    out: str = flag("", "with --fit: folder for train.yaml (flags) and ds_config.json; empty: only print them")
    curves: str = flag("", "PNG file for curves over 1 to 1,024 GPUs")
    json: bool = flag(False, "print one JSON object instead of a table")

    def __post_init__(self) -> None:
        need(self.gpu in GPUS, f"gpu must be one of {', '.join(GPUS)}", self.gpu)
        need(1 <= self.gpus <= 1024, "gpus must lie in 1..1024", self.gpus)
        need(self.gpus_per_node >= 0, "gpus_per_node must not be negative", self.gpus_per_node)
        need(self.samples >= 1, "samples must be at least 1", self.samples)
        need(self.text_tokens >= 1, "text_tokens must be at least 1", self.text_tokens)
        need(self.fit or not self.out, "--out needs --fit", self.out)
