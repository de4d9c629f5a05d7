"""Every setting of the entry scripts: the dataclasses of pipeline.settings, presets (mini, 7b, 13b), how they are read.

A value is taken from the flag, else from the YAML file of --config, else from --preset, else from --mechanism, else
from the default in its dataclass. Flags have underscores; `--help` of any script lists them with units and defaults.
Entries and builders read this module; classes take flat, typed arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from pipeline.mini.grammar import IMAGE_PREFIX
from pipeline.runtime import command_line
from pipeline.settings.ablation import AblationArguments
from pipeline.settings.checks import REPO
from pipeline.settings.data import DataArguments
from pipeline.settings.evaluation import EvalArguments
from pipeline.settings.inference import DemoArguments, ExportArguments, InferArguments, LoadArguments
from pipeline.settings.inspection import InspectArguments
from pipeline.settings.model import ModelArguments
from pipeline.settings.plan import PlanArguments
from pipeline.settings.prior import PRIOR_PRESETS, PriorArguments
from pipeline.settings.train import RunArguments, TrainArguments

__all__ = [
    "PRESETS",
    "REPO",
    "AblationArguments",
    "DataArguments",
    "DemoArguments",
    "EvalArguments",
    "ExportArguments",
    "InferArguments",
    "InspectArguments",
    "LoadArguments",
    "ModelArguments",
    "PlanArguments",
    "PriorArguments",
    "RunArguments",
    "TrainArguments",
    "from_dict",
    "parse",
    "to_dict",
]

KINDS: tuple[type, ...] = (ModelArguments, DataArguments, TrainArguments, EvalArguments)
_LARGE = {
    "clip": "ViT-L-14-quickgelu",
    "gradient_checkpointing": "full",
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
        "mask_upsample": 16,
        # Chosen on the validation split: docs/results/mini/preset.md.
        "z_dim": 128,
        "task_mix": "reasoning=2,referring=2",
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


def prior_preset_values(known: Mapping[str, str]) -> dict[str, Any]:
    """The values of a preset of the image prior. Raises ValueError for an unknown one."""
    return _preset(PRIOR_PRESETS, known["preset"])


def _preset(presets: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, found {name!r}")
    return dict(presets[name])


def preset_values(known: Mapping[str, str]) -> dict[str, Any]:
    """The values of a preset under a mechanism. Raises ValueError for an unknown preset."""
    name = known["preset"]
    values = _preset(PRESETS, name)
    if known.get("mechanism") == "released":
        values.pop("alpha", None)
        if name == "mini":
            # The released code tunes the upper half of 32 layers; the mini LM has 4.
            values["first_tuned_layer"] = 2
    return values


_T = TypeVar("_T")


def parse(*kinds: type[Any], argv: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """The asked-for dataclasses, filled from the command line; ends the process with a message if that cannot be.

    Presets count where ModelArguments or PriorArguments are asked for; a script that takes the model from a checkpoint
    has none. The paths that a preset leaves open must be given, except for a plan, which reads no weights and no data.
    """
    of_prior = PriorArguments in kinds
    from_preset = ModelArguments in kinds or of_prior
    model_preset = prior_preset_values if of_prior else preset_values
    return command_line.parse(
        kinds,
        argv=argv,
        every_kind=KINDS,
        preset=model_preset if from_preset else None,
        peek=("preset", "config", *(() if of_prior else ("mechanism",))) if from_preset else (),
        check=_check_required if from_preset and PlanArguments not in kinds else None,
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
    required = ("clip", "vqgan", "data") if "condition_noise" in values else ("base", "clip", "data")
    wanted = [name for name in required if values.get(name) == ""]
    if "clip_weights" in values and not values["clip_weights"] and not values["clip"].startswith("local-dir:"):
        wanted.append("clip_weights")
    if wanted:
        raise ValueError(
            f"preset {values.get('preset', 'mini')} needs {', '.join(f'--{name}' for name in wanted)}"
            " (paths on this machine); --preset mini needs nothing"
        )
