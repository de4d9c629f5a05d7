"""The flags of training an image prior, and their presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.runtime.command_line import flag
from pipeline.settings.checks import REPO, need

_CLIPGEN = {
    "clip": "ViT-B-32-quickgelu",
    "dropout": 0.1,
    # CLIP-GEN's 5e-4 per 256 samples, 20 warm-up epochs of 200.
    "global_batch": 256,
    "lr": 5e-4,
    "epochs": 200.0,
    "warmup_ratio": 0.1,
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "bf16": "true",
}
PRIOR_PRESETS: dict[str, dict[str, Any]] = {
    "mini": {
        "clip": f"local-dir:{REPO / 'models/mini/clip'}",
        "vqgan": str(REPO / "models/mini/vqgan"),
        "data": str(REPO / "shards/mini"),
        "output_dir": str(REPO / "runs/mini-prior"),
        "width": 192,
        "layers": 5,
        "heads": 6,
        "condition_slots": 16,
        "condition_noise": 0.5,
        "global_batch": 64,
        "lr": 1e-3,
        "max_steps": 2000,
    },
    "clipgen": {**_CLIPGEN, "width": 1024, "layers": 24, "heads": 16, "output_dir": "runs/prior"},
    "clipgen-large": {**_CLIPGEN, "width": 1280, "layers": 36, "heads": 20, "output_dir": "runs/prior-large"},
}


@dataclass(kw_only=True)
class PriorArguments:
    """The transformer, the frozen models around it, and the pictures."""

    preset: Literal["mini", "clipgen", "clipgen-large"] = flag("mini", "a set of values for the flags not given")
    config: str = flag("", "YAML file of `flag: value` lines, below the flags and above the preset")
    data: str = flag("", "folder or URL of packed shards (pipeline/shard_mmud.py --source coco); several with commas")
    clip: str = flag("", "frozen CLIP whose embedding is the condition: an open_clip model name, or local-dir:FOLDER")
    clip_weights: str = flag("", "weights file of the open_clip model; not needed for local-dir:")
    vqgan: str = flag("", "folder of the image decoder whose codes are learned (pipeline/convert_weights.py makes it)")
    width: int = flag(1024, "width of the transformer")
    layers: int = flag(24, "layers of the transformer")
    heads: int = flag(16, "attention heads")
    condition_slots: int = flag(1, "places in front of the codes that hold the condition")
    condition_noise: float = flag(0.0, "length of the noise added to half of the unit-length conditions")
    dropout: float = flag(0.0, "dropout of the transformer, 0 to < 1")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: slower, far less memory")
    num_workers: int = flag(2, "loader processes per rank; 0 loads in the training process")
    shuffle_window: int = flag(16384, "samples shuffled together, so that storage is read in long runs; 0 for all")
    max_bad_share: float = flag(0.01, "share of unreadable samples at which training stops, 0 to 1")

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "condition_slots"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        need(self.width % self.heads == 0, "heads must divide width", self.heads)
        need(0 <= self.dropout < 1, "dropout must be at least 0 and below 1", self.dropout)
        need(0 <= self.max_bad_share <= 1, "max_bad_share must lie in 0..1", self.max_bad_share)
        for name in ("condition_noise", "num_workers", "shuffle_window"):
            need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
