"""The flags of scoring a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pipeline.runtime.command_line import flag
from pipeline.settings.checks import need

_WITH_SAVED = ("from_predictions", "task_module", "report_dir", "bootstrap", "seed", "local_rank")
"""What counts where saved answers are scored."""


@dataclass(kw_only=True)
class EvalArguments:
    """Scoring of a checkpoint."""

    checkpoint: str = flag("", "checkpoint, run or exported folder; empty: runs/mini, else runs/quickstart")
    split: str = flag("test", "split of the data set")
    eval_batch: int = flag(32, "prompts per rank decoded together")
    max_new_tokens: int = flag(0, "tokens of an answer at most; 0: 128, for a model of the mini preset 64")
    protocol: Literal["free", "teacher-forced", "both"] = flag(
        "free", "free: the model writes its own answers and task tokens; both: and given the right ones besides"
    )
    from_predictions: str = flag("", "score the answers saved in this folder again, without a model", alias="--from")
    task_module: str = flag("", "with --from: the Python file of a task of your own, if the answers name one")
    inception_weights: str = flag("", "weights-inception-2015-12-05-6726825d.pth, for FID, KID and IS")
    bootstrap: int = flag(1000, "replicates of the bootstrap that makes the scores' 95 % intervals; 0: no intervals")
    condition: Literal["tuned", "untuned", "shuffled", "all"] = flag("tuned", "shuffled: each prompt has another image")
    each_phrase: bool = flag(
        False, "referring alone, each object by each of its phrases: the RefCOCO family's protocol"
    )
    limit: int = flag(0, "score only the first so many samples; 0: all")
    report_dir: str = flag("", "folder of report.json, report.md and the contact sheet; empty: the run's folder")
    data: str = flag("", "folder of packed shards; empty: the one that was trained on")
    base: str = flag("", "folder of the frozen LM; empty: as in training (the same for clip, vqgan, prior)")
    base_quant: Literal["", "none", "nf4", "int8"] = flag(
        "", "bits of the frozen LM's matrices, as in training when empty"
    )
    clip: str = flag("", "frozen CLIP, as in training when empty")
    clip_weights: str = flag("", "weights file of the CLIP, as in training when empty")
    vqgan: str = flag("", "folder of the VQGAN, as in training when empty")
    prior: str = flag("", "folder of the image prior, as in training when empty")
    candidates: int = flag(4, "pictures drawn for each text; the one nearest to the wanted CLIP embedding is kept")
    temperature: float = flag(1.0, "of the draw of picture codes; 0: the likeliest code")
    top_k: int | None = flag(
        None, "picture codes drawn from the likeliest so many; 0: all; unset: 100 for each 512 codes, at most 500"
    )
    top_p: float = flag(0.95, "picture codes drawn from the likeliest with this mass, above 0 to 1")
    tables: str = flag(
        "", "comma-separated folders of evaluated runs: only write the paper's tables with a row of each"
    )
    summarise: str = flag("", "comma-separated folders of evaluated runs (seeds): only write their mean ± deviation")
    title: str = flag("Mean over seeds", "heading of that table")
    seed: int = flag(0, "of the picture codes' draw and of the texts a picture is ranked among")
    num_workers: int = flag(0, "loader processes")
    local_rank: int = flag(-1, "given by the deepspeed launcher; the environment counts")

    def __post_init__(self) -> None:
        for name in ("eval_batch", "candidates"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("limit", "max_new_tokens", "temperature", "top_k", "num_workers", "bootstrap"):
            need((getattr(self, name) or 0) >= 0, f"{name} must not be negative", getattr(self, name))
        need(0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p)
        for name in ("summarise", "tables"):
            wanted = bool(getattr(self, name))
            need(not wanted or bool(self.report_dir), f"--{name} needs --report_dir, its folder", self.report_dir)
        forced = self.protocol == "both" and self.condition not in ("tuned", "all")
        need(not forced, "--protocol both goes with --condition tuned or all", self.condition)
        if self.from_predictions:
            changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
            idle = ", ".join(f"--{name}" for name in changed if name not in _WITH_SAVED)
            need(not idle, "--from scores answers as they were given and takes no flag that changes them", idle)
        else:
            need(not self.task_module, "--task_module goes with --from; a checkpoint remembers it", self.task_module)

    @property
    def summarised_runs(self) -> list[Path]:
        """The folders that `summarise` names."""
        return _folders(self.summarise)

    @property
    def tabled_runs(self) -> list[Path]:
        """The folders that `tables` names."""
        return _folders(self.tables)

    @property
    def replaced(self) -> dict[str, str]:
        """What was given in place of the training run's: paths, and the frozen LM's bits."""
        names = ("data", "base", "base_quant", "clip", "clip_weights", "vqgan", "prior")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def _folders(text: str) -> list[Path]:
    return [Path(part.strip()) for part in text.split(",") if part.strip()]
