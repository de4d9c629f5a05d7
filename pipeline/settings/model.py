"""The flags that say which frozen models there are and what is tuned beside them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.runtime.command_line import flag
from pipeline.settings.checks import distinct, need

MECHANISMS: dict[str, dict[str, Any]] = {
    "paper": {
        "activation": "hard",
        "sparse_norm": False,
        "alpha": 0.9,
        "first_tuned_layer": 0,
        "inference_sparsity": True,
        "train_embeddings": "new",
        "mask_tokens": "inline",
        "clip_head": "linear",
    },
    "released": {
        "activation": "shifted",
        "sparse_norm": True,
        "alpha": 0.2,
        "first_tuned_layer": 16,
        "inference_sparsity": False,
        "train_embeddings": "all",
        "mask_tokens": "end",
        "clip_head": "mlp",
    },
}
"""What --mechanism stands for; each entry is a flag of its own too."""


@dataclass(kw_only=True)
class ModelArguments:
    """The frozen foundations, and what is tuned beside them."""

    preset: Literal["mini", "7b", "13b"] = flag("mini", "a set of values for the flags that are not given")
    config: str = flag("", "YAML file of `flag: value` lines, below the flags and above the preset")
    base: str = flag("", "folder of the frozen Hugging Face causal LM")
    base_quant: Literal["none", "nf4", "int8"] = flag("none", "bits of the frozen LM's matrices: bf16/fp32, 4 or 8")
    clip: str = flag("", "frozen CLIP: an open_clip model name, or local-dir:FOLDER")
    clip_weights: str = flag("", "weights file of the open_clip model; not needed for local-dir:")
    vqgan: str = flag("", "folder of the VQGAN that turns codes into pictures; only to look at generated pictures")
    prior: str = flag("", "folder of the transformer from CLIP embedding to VQGAN codes; only for pictures, too")
    image_merge: int = flag(1, "side of the square of patches that become one image token")
    image_cls: bool = flag(True, "give the LM the CLIP's CLS token as well, in front")
    image_prefix: str = flag("", "text with one <image> per image token, put before the dialogue; empty: tokens only")
    clip_taps: str = flag("", "CLIP layers for the mask decoder, counted from 0, as in 7,15,23; empty: three, evenly")
    mechanism: Literal["paper", "released"] = flag("paper", "fills what is not given from alpha to clip_head")
    tuner: Literal["neural", "lora", "ia3"] = flag(
        "neural", "what is trained in the LM: the sparse task network, or PEFT's LoRA or IA3 in its place"
    )
    lora_rank: int = flag(0, "rank of --tuner lora; 0: the one whose size is nearest to the sparse network's")
    lora_alpha: float = flag(0.0, "LoRA's output is scaled by this / rank; 0: twice the rank")
    alpha: float | None = flag(None, "share of the layers below in the sparse vector, 0 to < 1 (paper .9, released .2)")
    activation: Literal["hard", "shifted"] | None = flag(None, "how values below the threshold go (hard, shifted)")
    sparse_norm: bool | None = flag(None, "RMSNorm on the sparse vector (False, True)")
    first_tuned_layer: int | None = flag(None, "first layer that is tuned, counted from 0 (0, 16)")
    inference_sparsity: bool | None = flag(None, "keep the sparsity outside training (True, False)")
    train_embeddings: Literal["new", "all"] | None = flag(None, "embedding and head rows that are trained (new, all)")
    mask_tokens: Literal["inline", "end"] | None = flag(None, "where <OBJ-i> stand in an answer (inline, end)")
    clip_head: Literal["linear", "mlp"] | None = flag(None, "from the <GEN> state to the CLIP embedding (linear, mlp)")
    beta: float = flag(0.4, "share of the sparse vector that stays active, > 0 to 1")
    z_dim: int = flag(128, "width Z of the sparse vector")
    projections: str = flag("qv", "attention projections that are tuned: any of q, k, v")
    activation_pattern: Literal["gaussian", "top2beta", "level", "distribution"] = flag(
        "gaussian", "how the active share is drawn while training"
    )
    max_objects: int = flag(8, "tokens <OBJ-1>..<OBJ-N>: objects per answer at most")
    mask_dim: int = flag(64, "width of the mask decoder")
    mask_upsample: int = flag(0, "mask side = patches per side x (this // 4)^2; 0: the CLIP's patch size in pixels")

    def __post_init__(self) -> None:
        for name, value in MECHANISMS[self.mechanism].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        assert self.alpha is not None
        assert self.first_tuned_layer is not None
        need(0 <= self.alpha < 1, "alpha must be at least 0 and below 1", self.alpha)
        need(0 < self.beta <= 1, "beta must be above 0 and at most 1", self.beta)
        need(self.first_tuned_layer >= 0, "first_tuned_layer counts from 0", self.first_tuned_layer)
        need(
            bool(self.projections) and set(self.projections) <= set("qkv") and distinct(self.projections),
            "projections takes each of the letters q, k, v at most once, such as qv",
            self.projections,
        )
        need(
            self.tuner == "neural" or importlib.util.find_spec("peft") is not None,
            "--tuner lora and ia3 need PEFT (pip install peft)",
            self.tuner,
        )
        for name in ("lora_rank", "lora_alpha"):
            need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
            need(self.tuner == "lora" or not getattr(self, name), f"{name} goes with --tuner lora", self.tuner)
        for name in ("z_dim", "image_merge", "max_objects", "mask_dim"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        need(
            self.mask_upsample == 0 or self.mask_upsample >= 4,
            "mask_upsample must be 0 (patch size) or at least 4",
            self.mask_upsample,
        )
        if self.clip_taps:
            self.tap_layers(10**6)

    def tap_layers(self, layers: int) -> tuple[int, ...]:
        """The CLIP layers the mask decoder reads, counted from 0, of a tower with `layers`: 24 gives 7, 15, 23."""
        if not self.clip_taps:
            need(layers >= 3, "the CLIP has fewer than three layers: name them with --clip_taps", layers)
            return tuple(layers * third // 3 - 1 for third in (1, 2, 3))
        try:
            taps = tuple(int(part) for part in self.clip_taps.split(","))
        except ValueError:
            taps = ()
        need(bool(taps), "clip_taps takes layer numbers, such as 7,15,23", self.clip_taps)
        need(
            all(0 <= tap < layers for tap in taps) and list(taps) == sorted(set(taps)),
            f"clip_taps must rise and lie within 0..{layers - 1}",
            self.clip_taps,
        )
        return taps
