"""The flags of a training run: batch, schedule, losses, checkpoints, tracking."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.runtime.command_line import flag
from pipeline.settings.checks import REPO, need


@dataclass(kw_only=True)
class RunArguments:
    """What every run with DeepSpeed has: batch, schedule, checkpoints, tracking."""

    output_dir: str = flag("", "folder of checkpoints, metrics and run.json; empty: runs/<preset>")
    deepspeed: str = flag("", 'DeepSpeed JSON, its "auto" values filled from these flags; empty: ds_configs/z2.json')
    global_batch: int = flag(12, "samples per optimizer step, over all ranks")
    micro_batch: int | None = flag(None, "samples per rank and forward pass; unset: the largest up to max_micro_batch")
    max_micro_batch: int = flag(16, "upper limit of the micro-batch that is chosen when micro_batch is unset")
    epochs: float = flag(10.0, "passes over the training split")
    max_steps: int = flag(-1, "optimizer steps; above 0 it counts instead of epochs")
    lr: float = flag(1e-4, "peak learning rate of AdamW")
    weight_decay: float = flag(0.0, "AdamW's weight decay, on matrices")
    warmup_ratio: float = flag(0.03, "share of the steps in which the learning rate rises, before cosine decay to 0")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this L2 norm; 0: never")
    adam_beta1: float = flag(0.9, "AdamW's decay of the first moment")
    adam_beta2: float = flag(0.999, "AdamW's decay of the second moment")
    adam_eps: float = flag(1e-8, "AdamW's epsilon")
    seed: int = flag(0, "of initial values, sample order and draws")
    bf16: str = flag("auto", "train in bfloat16 with fp32 master weights: auto (on a GPU), true, false")
    logging_steps: int = flag(10, "steps between lines of metrics")
    save_steps: int = flag(500, "steps between checkpoints; 0: only at the end")
    save_total_limit: int = flag(2, "checkpoints kept; 0: all")
    eval_steps: int = flag(0, "steps between validations; 0: never")
    max_bad_steps: int = flag(5, "steps in a row without finite loss or gradients (skipped) that stop the run")
    hang_timeout: float = flag(1800.0, "seconds without a finished step that end the run, with stacks; 0: for ever")
    resume: str = flag("auto", "auto: from the newest whole checkpoint; never: start anew; or a checkpoint folder")
    mlflow_experiment: str = flag("neural-tuning", "MLflow experiment (server: MLFLOW_TRACKING_URI; else a local file)")
    run_name: str = flag("", "MLflow run name; empty: the output folder's name")
    local_rank: int = flag(-1, "given by the deepspeed launcher; the environment counts")

    def __post_init__(self) -> None:
        self.bf16 = self.bf16.lower()
        need(self.bf16 in ("auto", "true", "false"), "bf16 must be auto, true or false", self.bf16)
        for name in ("global_batch", "max_micro_batch", "logging_steps", "max_bad_steps"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("save_steps", "save_total_limit", "eval_steps", "hang_timeout"):
            need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        for name in ("weight_decay", "max_grad_norm", "adam_eps", "lr"):
            need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        need(self.max_steps > 0 or self.epochs > 0, "epochs must be above 0 when max_steps is not given", self.epochs)
        need(0 <= self.warmup_ratio < 1, "warmup_ratio must be at least 0 and below 1", self.warmup_ratio)
        for name in ("adam_beta1", "adam_beta2"):
            need(0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1", getattr(self, name))
        need(bool(self.resume), "resume must be auto, never or a checkpoint folder", self.resume)

    def use_bf16(self, device_type: str) -> bool:
        """Whether to train in bfloat16 on a device of this type ("cuda", "cpu")."""
        return device_type == "cuda" if self.bf16 == "auto" else self.bf16 == "true"

    def deepspeed_file(self) -> Path:
        """The DeepSpeed JSON; a relative path is looked for in the working folder, then in the checkout."""
        path = Path(self.deepspeed or "ds_configs/z2.json")
        return path if path.exists() or path.is_absolute() or not (REPO / path).exists() else REPO / path


@dataclass(kw_only=True)
class TrainArguments(RunArguments):
    """The run that tunes: its losses and learning rates besides."""

    lr_sparse: float | None = flag(None, "peak learning rate of the sparse networks; unset: lr")
    lr_adapter: float | None = flag(None, "peak learning rate of LoRA or IA3 in their place; unset: lr")
    lr_projector: float | None = flag(None, "peak learning rate of the image projector; unset: lr")
    lr_tokens: float | None = flag(None, "peak learning rate of the new tokens' rows; unset: lr")
    lr_mask: float | None = flag(None, "peak learning rate of the mask decoder; unset: lr")
    lr_clip: float | None = flag(None, "peak learning rate of the CLIP head; unset: lr")
    gradient_checkpointing: Literal["none", "attention", "full"] = flag(
        "none",
        "activations recomputed in the backward pass: none, each layer's attention, or whole layers (least memory)",
    )
    attn: Literal["auto", "sdpa_varlen", "sdpa", "eager", "flash_attention_2", "flex_attention"] = flag(
        "auto", "the LM's attention while training; auto: sdpa_varlen if --packing, else what transformers takes"
    )
    liger: bool = flag(False, "RMSNorm, RoPE and SwiGLU of the LM by liger-kernel (a GPU; pip install -e '.[gpu]')")
    compile_layers: bool = flag(False, "torch.compile of the LM's norms and MLPs (ZeRO-1 and 2, unquantised base)")
    lambda_seg: float = flag(1.0, "weight of the masks' Dice loss")
    lambda_gen: float = flag(10.0, "weight of the pictures' CLIP embedding loss (MSE)")
    lambda_bce: float = flag(0.0, "weight of the masks' pixel loss (BCE)")
    eval_samples: int = flag(4, "samples of each task whose answers a validation draws, as a sheet in MLflow; 0: none")
    preflight: bool = flag(False, "only check files, batch, disk and memory, load no model; exit code 0 if all is well")
    register_model: str = flag("", "when done, the tuned weights become a version of this registered model of MLflow")
    mlflow_parent: str = flag("", "id of the MLflow run that this one is a child of (pipeline/ablate.py gives it)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_seg", "lambda_gen", "lambda_bce"):
            need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        need(self.eval_samples >= 0, "eval_samples must not be negative", self.eval_samples)

    @property
    def learning_rates(self) -> dict[str, float | None]:
        """A learning rate for each trained part; None means lr."""
        return {
            "sparse": self.lr_sparse,
            "adapter": self.lr_adapter,
            "projector": self.lr_projector,
            "tokens": self.lr_tokens,
            "mask_decoder": self.lr_mask,
            "clip_head": self.lr_clip,
        }
