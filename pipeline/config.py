"""Every setting of the entry scripts: dataclasses, presets (mini, 7b, 13b) and how they are read.

A value is taken from the flag, else from the YAML file of --config, else from --preset, else from --mechanism, else
from the default below. Flags have underscores; `--help` of any script lists them with units and defaults. Entries and
builders read this module; classes take flat, typed arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from pipeline.data.tasks import TASKS
from pipeline.mini.grammar import IMAGE_PREFIX
from pipeline.runtime import command_line
from pipeline.runtime.command_line import flag, numbers

REPO = Path(__file__).resolve().parents[1]
"""Root of the checkout: the mini preset's paths stand on it, so that scripts run from any folder."""

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
    clip: str = flag("", "frozen CLIP: an open_clip model name, or local-dir:FOLDER")
    clip_weights: str = flag("", "weights file of the open_clip model; not needed for local-dir:")
    vqgan: str = flag("", "folder of the VQGAN that turns codes into pictures; only to look at generated pictures")
    prior: str = flag("", "folder of the transformer from CLIP embedding to VQGAN codes; only for pictures, too")
    image_merge: int = flag(1, "side of the square of patches that become one image token")
    image_cls: bool = flag(True, "give the LM the CLIP's CLS token as well, in front")
    image_prefix: str = flag("", "text with one <image> per image token, put before the dialogue; empty: tokens only")
    clip_taps: str = flag("", "CLIP layers for the mask decoder, counted from 0, as in 7,15,23; empty: three, evenly")
    mechanism: Literal["paper", "released"] = flag("paper", "fills what is not given from alpha to clip_head")
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
        _need(0 <= self.alpha < 1, "alpha must be at least 0 and below 1", self.alpha)
        _need(0 < self.beta <= 1, "beta must be above 0 and at most 1", self.beta)
        _need(self.first_tuned_layer >= 0, "first_tuned_layer counts from 0", self.first_tuned_layer)
        _need(
            bool(self.projections) and set(self.projections) <= set("qkv") and _distinct(self.projections),
            "projections takes each of the letters q, k, v at most once, such as qv",
            self.projections,
        )
        for name in ("z_dim", "image_merge", "max_objects", "mask_dim"):
            _need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        _need(
            self.mask_upsample == 0 or self.mask_upsample >= 4,
            "mask_upsample must be 0 (patch size) or at least 4",
            self.mask_upsample,
        )
        if self.clip_taps:
            self.tap_layers(10**6)

    def tap_layers(self, layers: int) -> tuple[int, ...]:
        """The CLIP layers the mask decoder reads, counted from 0, of a tower with `layers`: 24 gives 7, 15, 23."""
        if not self.clip_taps:
            _need(layers >= 3, "the CLIP has fewer than three layers: name them with --clip_taps", layers)
            return tuple(layers * third // 3 - 1 for third in (1, 2, 3))
        try:
            taps = tuple(int(part) for part in self.clip_taps.split(","))
        except ValueError:
            taps = ()
        _need(bool(taps), "clip_taps takes layer numbers, such as 7,15,23", self.clip_taps)
        _need(
            all(0 <= tap < layers for tap in taps) and list(taps) == sorted(set(taps)),
            f"clip_taps must rise and lie within 0..{layers - 1}",
            self.clip_taps,
        )
        return taps


@dataclass(kw_only=True)
class DataArguments:
    """The packed data set and what is made of each sample."""

    data: str = flag(
        "", "folder or URL of packed shards (pipeline/shard_mmud.py makes it); several with commas between"
    )
    data_weights: str = flag("", "share of each data set in every global batch, as in 2,1; empty: each sample once")
    shuffle_window: int = flag(16384, "samples shuffled together, so that storage is read in long runs; 0 for all")
    tasks: str = flag(",".join(TASKS), "tasks that are tuned together")
    task_mix: str = flag("", "share of each task in every global batch, as in 2,1,1,1; empty: equal")
    referring_objects: int = flag(3, "objects asked for in one referring prompt, at most")
    max_length: int = flag(512, "tokens per row at most, image tokens included")
    num_workers: int = flag(2, "loader processes per rank; 0 loads in the training process")
    max_bad_share: float = flag(0.01, "share of unreadable samples at which training stops, 0 to 1")

    def __post_init__(self) -> None:
        names = self.task_names
        unknown = sorted(set(names) - set(TASKS))
        _need(not unknown and bool(names) and _distinct(names), f"tasks must be some of {','.join(TASKS)}", self.tasks)
        _ = self.task_shares
        _need(0 <= self.max_bad_share <= 1, "max_bad_share must lie in 0..1", self.max_bad_share)
        for name, least in (("num_workers", 0), ("shuffle_window", 0), ("referring_objects", 1), ("max_length", 1)):
            _need(getattr(self, name) >= least, f"{name} must be at least {least}", getattr(self, name))

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks in order."""
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())

    @property
    def task_shares(self) -> tuple[float, ...]:
        """One share per task, in any unit."""
        if not self.task_mix:
            return (1.0,) * len(self.task_names)
        shares = numbers(self.task_mix)
        _need(
            len(shares) == len(self.task_names) and min(shares) >= 0 and sum(shares) > 0,
            f"task_mix takes {len(self.task_names)} shares, one per task ({self.tasks})",
            self.task_mix,
        )
        return shares


@dataclass(kw_only=True)
class TrainArguments:
    """The run: batch, schedule, losses, checkpoints, tracking."""

    output_dir: str = flag("", "folder of checkpoints, metrics and run.json; empty: runs/<preset>")
    deepspeed: str = flag("", 'DeepSpeed JSON, its "auto" values filled from these flags; empty: ds_configs/z2.json')
    global_batch: int = flag(12, "samples per optimizer step, over all ranks")
    micro_batch: int | None = flag(None, "samples per rank and forward pass; unset: the largest up to max_micro_batch")
    max_micro_batch: int = flag(16, "upper limit of the micro-batch that is chosen when micro_batch is unset")
    epochs: float = flag(10.0, "passes over the training split")
    max_steps: int = flag(-1, "optimizer steps; above 0 it counts instead of epochs")
    lr: float = flag(1e-4, "peak learning rate of AdamW")
    lr_sparse: float | None = flag(None, "the same for the sparse networks; unset: lr")
    lr_projector: float | None = flag(None, "the same for the image projector; unset: lr")
    lr_tokens: float | None = flag(None, "the same for the new tokens' rows; unset: lr")
    lr_mask: float | None = flag(None, "the same for the mask decoder; unset: lr")
    lr_clip: float | None = flag(None, "the same for the CLIP head; unset: lr")
    weight_decay: float = flag(0.0, "AdamW's weight decay, on matrices")
    warmup_ratio: float = flag(0.03, "share of the steps in which the learning rate rises, before cosine decay to 0")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this L2 norm; 0: never")
    adam_beta1: float = flag(0.9, "AdamW's decay of the first moment")
    adam_beta2: float = flag(0.999, "AdamW's decay of the second moment")
    adam_eps: float = flag(1e-8, "AdamW's epsilon")
    seed: int = flag(0, "of initial values, sample order and draws")
    bf16: str = flag("auto", "train in bfloat16 with fp32 master weights: auto (on a GPU), true, false")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: slower, far less memory")
    lambda_seg: float = flag(1.0, "weight of the masks' Dice loss")
    lambda_gen: float = flag(10.0, "weight of the pictures' CLIP embedding loss (MSE)")
    lambda_bce: float = flag(0.0, "weight of the masks' pixel loss (BCE)")
    logging_steps: int = flag(10, "steps between lines of metrics")
    save_steps: int = flag(500, "steps between checkpoints; 0: only at the end")
    save_total_limit: int = flag(2, "checkpoints kept; 0: all")
    eval_steps: int = flag(0, "steps between validations; 0: never")
    resume: str = flag("auto", "auto: from the newest whole checkpoint; never: start anew; or a checkpoint folder")
    mlflow_experiment: str = flag("neural-tuning", "MLflow experiment (server: MLFLOW_TRACKING_URI; else a local file)")
    run_name: str = flag("", "MLflow run name; empty: the output folder's name")
    local_rank: int = flag(-1, "given by the deepspeed launcher; the environment counts")

    def __post_init__(self) -> None:
        self.bf16 = self.bf16.lower()
        _need(self.bf16 in ("auto", "true", "false"), "bf16 must be auto, true or false", self.bf16)
        for name in ("global_batch", "max_micro_batch", "logging_steps"):
            _need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("save_steps", "save_total_limit", "eval_steps", "weight_decay", "max_grad_norm", "adam_eps"):
            _need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        for name in ("lambda_seg", "lambda_gen", "lambda_bce", "lr"):
            _need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        _need(self.max_steps > 0 or self.epochs > 0, "epochs must be above 0 when max_steps is not given", self.epochs)
        _need(0 <= self.warmup_ratio < 1, "warmup_ratio must be at least 0 and below 1", self.warmup_ratio)
        for name in ("adam_beta1", "adam_beta2"):
            _need(0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1", getattr(self, name))
        _need(bool(self.resume), "resume must be auto, never or a checkpoint folder", self.resume)

    @property
    def learning_rates(self) -> dict[str, float | None]:
        """A learning rate for each trained part; None means lr."""
        return {
            "sparse": self.lr_sparse,
            "projector": self.lr_projector,
            "tokens": self.lr_tokens,
            "mask_decoder": self.lr_mask,
            "clip_head": self.lr_clip,
        }

    def use_bf16(self, device_type: str) -> bool:
        """Whether to train in bfloat16 on a device of this type ("cuda", "cpu")."""
        return device_type == "cuda" if self.bf16 == "auto" else self.bf16 == "true"

    def deepspeed_file(self) -> Path:
        """The DeepSpeed JSON; a relative path is looked for in the working folder, then in the checkout."""
        path = Path(self.deepspeed or "ds_configs/z2.json")
        return path if path.exists() or path.is_absolute() or not (REPO / path).exists() else REPO / path


@dataclass(kw_only=True)
class EvalArguments:
    """Scoring of a checkpoint."""

    checkpoint: str = flag("", "checkpoint folder, or a run's folder (its newest whole one); empty: runs/mini")
    split: str = flag("test", "split of the data set")
    eval_batch: int = flag(32, "prompts per rank decoded together")
    max_new_tokens: int = flag(64, "tokens of an answer at most")
    protocol: Literal["free", "teacher-forced"] = flag("free", "free: the model writes its own answers and task tokens")
    condition: Literal["tuned", "untuned", "shuffled", "all"] = flag("tuned", "shuffled: each prompt has another image")
    limit: int = flag(0, "score only the first so many samples; 0: all")
    report_dir: str = flag("", "folder of report.json, report.md and the contact sheet; empty: the run's folder")
    data: str = flag("", "folder of packed shards; empty: the one that was trained on")
    base: str = flag("", "folder of the frozen LM; empty: as in training (the same for clip, vqgan, prior)")
    clip: str = flag("", "frozen CLIP, as in training when empty")
    clip_weights: str = flag("", "weights file of the CLIP, as in training when empty")
    vqgan: str = flag("", "folder of the VQGAN, as in training when empty")
    prior: str = flag("", "folder of the image prior, as in training when empty")
    candidates: int = flag(4, "pictures drawn for each text; the one nearest to the wanted CLIP embedding is kept")
    temperature: float = flag(1.0, "of the draw of picture codes; 0: the likeliest code")
    top_k: int = flag(100, "picture codes drawn from the likeliest so many; 0: all")
    top_p: float = flag(0.95, "picture codes drawn from the likeliest with this mass, above 0 to 1")
    summarise: str = flag("", "comma-separated folders of evaluated runs (seeds): only write their mean ± deviation")
    title: str = flag("Mean over seeds", "heading of that table")
    seed: int = flag(0, "of the picture codes' draw and of the texts a picture is ranked among")
    num_workers: int = flag(0, "loader processes")

    def __post_init__(self) -> None:
        for name in ("eval_batch", "max_new_tokens", "candidates"):
            _need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("limit", "temperature", "top_k", "num_workers"):
            _need(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        _need(0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p)
        _need(
            not self.summarise or bool(self.report_dir), "--summarise needs --report_dir, its folder", self.report_dir
        )

    @property
    def summarised_runs(self) -> list[Path]:
        """The folders that `summarise` names."""
        return [Path(part.strip()) for part in self.summarise.split(",") if part.strip()]

    @property
    def replaced(self) -> dict[str, str]:
        """The paths that were given, in place of those of the training run."""
        names = ("data", "base", "clip", "clip_weights", "vqgan", "prior")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


KINDS: tuple[type, ...] = (ModelArguments, DataArguments, TrainArguments, EvalArguments)
_LARGE = {
    "clip": "ViT-L-14-quickgelu",
    "gradient_checkpointing": True,
    "bf16": "true",
    "global_batch": 12,
    "epochs": 10.0,
    "lr": 1e-4,
    "warmup_ratio": 0.03,
    "beta": 0.4,
    "z_dim": 128,
}
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {
        "base": str(REPO / "models/mini/llm"),
        "clip": f"local-dir:{REPO / 'models/mini/clip'}",
        "vqgan": str(REPO / "models/mini/vqgan"),
        "prior": str(REPO / "models/mini/prior"),
        "data": str(REPO / "shards/mini"),
        "output_dir": str(REPO / "runs/mini"),
        "image_merge": 2,
        "image_cls": False,
        "image_prefix": IMAGE_PREFIX,
        "alpha": 0.5,
        "beta": 0.4,
        "z_dim": 64,
        "mask_upsample": 16,
        # Chosen on the validation split: docs/results/mini/preset.md.
        "lr": 4e-3,
        "lr_mask": 5e-3,
        "lambda_bce": 2.0,
        "global_batch": 32,
        "max_micro_batch": 16,
        "max_steps": 1500,
        "max_length": 256,
    },
    "7b": {**_LARGE, "output_dir": "runs/7b", "max_micro_batch": 4},
    "13b": {**_LARGE, "output_dir": "runs/13b", "max_micro_batch": 2},
}
"""7b and 13b hold the paper's settings (CLIP ViT-L/14 at 224 pixels: 257 image tokens). Give --base and the rest."""


def preset_values(known: Mapping[str, str]) -> dict[str, Any]:
    """The values of a preset under a mechanism. Raises ValueError for an unknown preset."""
    name = known["preset"]
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, found {name!r}")
    values = dict(PRESETS[name])
    if known.get("mechanism") == "released":
        values.pop("alpha", None)
        if name == "mini":
            # The released code tunes the upper half of 32 layers; the mini LM has 4.
            values["first_tuned_layer"] = 2
    return values


_T = TypeVar("_T")


def parse(*kinds: type[Any], argv: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """The asked-for dataclasses, filled from the command line; ends the process with a message if that cannot be.

    Presets count where ModelArguments are asked for; a script that takes the model from a checkpoint has none.
    """
    from_preset = ModelArguments in kinds
    return command_line.parse(
        kinds,
        argv=argv,
        every_kind=KINDS,
        preset=preset_values if from_preset else None,
        peek=("preset", "config", "mechanism") if from_preset else (),
        check=_check_required if from_preset else None,
        description=description,
    )


def to_dict(*arguments: Any) -> dict[str, dict[str, Any]]:
    """{"ModelArguments": {flag: value}, ...}: what run.json and checkpoints hold."""
    return {type(part).__name__: dataclasses.asdict(part) for part in arguments}


def from_dict(kind: type[_T], config: Mapping[str, Any], **changes: Any) -> _T:
    """A dataclass out of `to_dict`'s answer, with `changes`. Raises ValueError for a setting that is unknown here."""
    values = {**config.get(kind.__name__, {}), **changes}
    if unknown := sorted(set(values) - set(get_type_hints(kind))):
        raise ValueError(f"the checkpoint's {kind.__name__} hold settings of another version: {', '.join(unknown)}")
    return kind(**values)


def _check_required(*arguments: Any) -> None:
    """Raises ValueError naming every flag that the preset leaves open and the command line did not give."""
    values = {field.name: getattr(part, field.name) for part in arguments for field in dataclasses.fields(part)}
    wanted = [name for name in ("base", "clip", "data") if values.get(name) == ""]
    if "clip_weights" in values and not values["clip_weights"] and not values["clip"].startswith("local-dir:"):
        wanted.append("clip_weights")
    if wanted:
        raise ValueError(
            f"preset {values.get('preset', 'mini')} needs {', '.join(f'--{name}' for name in wanted)}"
            " (paths on this machine); --preset mini needs nothing"
        )


def _distinct(items: Sequence[Any]) -> bool:
    return len(set(items)) == len(items)


def _need(holds: bool, rule: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{rule}, found {found!r}")
