"""A tuned model out of a checkpoint or an exported folder, ready to answer: what infer, demo and evaluation build on.

Everything that can be wrong is looked at before the large files are read: the checkpoint, the base model's
fingerprint, the CLIP's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from pipeline.assembly import parts
from pipeline.config import PRESETS, REPO, DataArguments, ModelArguments, from_dict
from pipeline.data.collate import Collator
from pipeline.data.tokens import TokenMap
from pipeline.model import quantisation
from pipeline.model.fingerprint import clip_fingerprint, fingerprint
from pipeline.model.initialise import initialise
from pipeline.model.painter import Painter, Sampling
from pipeline.model.tuner import NeuralTuner
from pipeline.model.vision import VisionTower
from pipeline.runtime.checkpoint import find_latest, is_exported, load_trained, read_state, verify
from pipeline.scoring.pictures import embed_pictures

Kind = TypeVar("Kind")
PATHS = ("base", "clip", "clip_weights", "vqgan", "prior")
"""The settings that say where a frozen model lies."""
_SETTINGS = ("ModelArguments", "DataArguments", "TrainArguments")


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint's folder and what it says of the model, the data and the run."""

    folder: Path
    model: ModelArguments
    data: DataArguments
    state: dict[str, Any]

    @property
    def seed(self) -> int:
        """Of the training run."""
        return int(self.state["config"]["TrainArguments"]["seed"])


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that answers a prompt; painter is None where the checkpoint names no picture decoder."""

    trained: Trained
    tuner: NeuralTuner
    vision: VisionTower
    token_map: TokenMap
    collator: Collator
    painter: Painter | None
    device: torch.device


def open_checkpoint(checkpoint: str | Path, replaced: Mapping[str, str]) -> Trained:
    """A checkpoint, the newest whole one of a run's folder, or an exported folder; its weights are not read yet.

    An exported folder holds no paths: those of the preset stand in where it names any.

    Args:
        checkpoint: the folder; empty takes runs/mini, else runs/quickstart.
        replaced: paths that stand elsewhere than when it was trained, by flag.

    Raises:
        ValueError: there is no whole checkpoint, or it was made by an incompatible version.
    """
    asked = Path(checkpoint) if checkpoint else _own_run()
    folder = asked if is_exported(asked) or (asked / "state.json").is_file() else find_latest(asked)
    if folder is None:
        raise ValueError(
            f"--checkpoint {asked}: there is no whole checkpoint; `make quickstart` or `deepspeed pipeline/train.py` "
            "makes one"
        )
    state = read_state(folder)
    config, base = state.get("config"), state.get("base")
    whole = isinstance(config, dict) and all(isinstance(config.get(name), dict) for name in _SETTINGS)
    if not whole or not isinstance(base, dict) or "fingerprint" not in base:
        raise ValueError(f"{folder} is no checkpoint of a tuned model: it does not say its settings and its base model")
    known = {name: path for name, path in replaced.items() if path}
    if is_exported(folder):
        preset = PRESETS.get(state["config"]["ModelArguments"].get("preset", ""), {})
        known = {name: preset[name] for name in PATHS if preset.get(name)} | known

    def settings(kind: type[Kind]) -> Kind:
        own = {name: path for name, path in known.items() if name in get_type_hints(kind)}
        return from_dict(kind, state["config"], **own)

    return Trained(folder, settings(ModelArguments), settings(DataArguments), state)


def _own_run() -> Path:
    """The run that a newcomer has: that of `make quickstart`, or of `train.py` without flags."""
    runs = [REPO / "runs" / name for name in ("mini", "quickstart")]
    return next((run for run in runs if any(run.glob("checkpoint-*"))), runs[0])


def check_base(trained: Trained) -> None:
    """Raises ValueError if the base model is missing, or is another one than was tuned; likewise for the CLIP where the
    checkpoint holds its fingerprint."""
    if not trained.model.base:
        raise ValueError(f"{trained.folder} holds the tuned part alone: give --base, the folder of its base model")
    parts.read_config(trained.model)
    quantisation.check(trained.model.base_quant)
    found, trained_on = fingerprint(trained.model.base), trained.state["base"]["fingerprint"]
    if found != trained_on:
        raise ValueError(
            f"--base {trained.model.base} is not the model that {trained.folder} was tuned on (fingerprint "
            f"{found[:12]} instead of {trained_on[:12]}): give the folder of the same base model"
        )
    if wanted := trained.state.get("clip"):
        found = clip_fingerprint(trained.model.clip, trained.model.clip_weights)
        if found != wanted["fingerprint"]:
            raise ValueError(
                f"--clip {trained.model.clip} {trained.model.clip_weights} is not the CLIP that {trained.folder} was "
                f"tuned with (fingerprint {found[:12]} instead of {wanted['fingerprint'][:12]}): give the same CLIP"
            )


def default_dtype(device: torch.device) -> torch.dtype:
    """Of the frozen LM: bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_painter(
    model: ModelArguments, vision: VisionTower, sampling: Sampling, device: torch.device
) -> Painter | None:
    """The picture decoder, or None where the settings name none."""
    if not (model.prior and model.vqgan):
        return None
    folders, embed = (model.prior, model.vqgan), partial(embed_pictures, vision)
    return Painter.load(*folders, embed, vision.embed_dim, sampling, device)


def untrained_tuner(trained: Trained, vision: VisionTower, device: torch.device, dtype: torch.dtype) -> NeuralTuner:
    """The checkpoint's model with initial values, `dtype` being that of the frozen LM."""
    llm = parts.load_llm(trained.model, dtype, device=device)
    tuner = parts.make_tuner(trained.model, llm, vision, seed=trained.seed, tasks=trained.data.task_names).to(device)
    initialise(tuner, trained.seed)
    return tuner


def load(
    checkpoint: str | Path = "",
    *,
    replaced: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mechanism: str | None = None,
    sampling: Sampling | None = None,
) -> Loaded:
    """A model that answers, in eval mode.

    Args:
        replaced: paths of the frozen models, by flag, where they are not those of the training run.
        dtype: of the frozen LM; see `default_dtype`. The trained part and the decoders stay float32.
        mechanism: raise unless the checkpoint was tuned with this one ("paper" or "released").

    Raises:
        ValueError: something is missing, damaged or does not belong together; the message says what to do.
    """
    device = torch.device(device)
    trained = open_checkpoint(checkpoint, replaced or {})
    if mechanism and mechanism != trained.model.mechanism:
        raise ValueError(
            f"{trained.folder} was tuned with --mechanism {trained.model.mechanism}, not {mechanism}: "
            "leave the mechanism out, a checkpoint brings its own"
        )
    # load_trained verifies again; here a damaged file is told before a large base model loads.
    if problems := verify(trained.folder):
        raise ValueError(f"{trained.folder} is no whole checkpoint: {'; '.join(problems)}")
    check_base(trained)
    token_map = parts.load_token_map(trained.model)
    vision = parts.load_vision(trained.model, device)
    collator = parts.make_collator(trained.model, trained.data, token_map, vision, trained.seed)
    painter = load_painter(trained.model, vision, sampling or Sampling(), device)
    tuner = untrained_tuner(trained, vision, device, dtype or default_dtype(device))
    load_trained(tuner, trained.folder)
    return Loaded(trained, tuner.eval(), vision, token_map, collator, painter, device)
