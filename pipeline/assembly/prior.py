"""One run of pretrain_prior.py: its plan, its parts, and the folder that comes out of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.assembly.running import with_absolute_paths
from pipeline.assembly.schedule import Schedule, plan_schedule
from pipeline.config import PriorArguments, RunArguments, to_dict
from pipeline.data.pictures import PictureCollator
from pipeline.model.fingerprint import fingerprint
from pipeline.model.image_decoder import ImageDecoder, load_decoder
from pipeline.model.losses import LossWeights
from pipeline.model.prior import ImagePrior, PriorConfig
from pipeline.model.prior_training import PictureCoder, PriorTuner
from pipeline.model.vision import VisionTower
from pipeline.runtime.checkpoint import check_reader, load_trained
from pipeline.runtime.engine import Engine
from pipeline.runtime.provenance import run_record
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.validation import ValidationLoss

_TASKS = ("generation",)  # the one that every sample has: a picture to be made


@dataclass(frozen=True, slots=True)
class PriorPlan:
    """Everything about a run that is known before CLIP is loaded."""

    args: PriorArguments
    schedule: Schedule
    decoder: ImageDecoder

    @property
    def reader(self) -> dict[str, Any]:
        """What the samples, their order and the codes depend on; a resumed run must have the same."""
        return {
            "digest": self.schedule.dataset.digest,
            "seed": self.schedule.order.seed,
            "global_batch": self.schedule.order.global_batch,
            "shuffle_window": self.schedule.order.window,
            "image_decoder": fingerprint(self.args.vqgan),
        }

    def prior_config(self, vision: VisionTower) -> PriorConfig:
        """The transformer's sizes, as CLIP and the image decoder demand them."""
        a = self.args
        return PriorConfig(
            embed_dim=vision.embed_dim,
            n_codes=self.decoder.n_codes,
            n_tokens=self.decoder.n_tokens,
            width=a.width,
            layers=a.layers,
            heads=a.heads,
            dropout=a.dropout,
            condition_slots=a.condition_slots,
        )

    def check_resume(self, state: Mapping[str, Any], config: PriorConfig) -> None:
        """Raises ValueError if a checkpoint is of other data, another decoder, another schedule or other sizes."""
        check_reader(state["reader"], self.reader)
        check_reader(state["prior"], dataclasses.asdict(config))
        self.schedule.check_resume(state)

    def make_model(self, config: PriorConfig) -> PriorTuner:
        """The transformer with initial values by the seed, the same on every rank."""
        torch.manual_seed(self.schedule.run.seed)
        model = PriorTuner(ImagePrior(config), self.args.condition_noise).to(self.schedule.ranks.device)
        if self.args.gradient_checkpointing:
            model.prior.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def make_collator(self, vision: VisionTower) -> PictureCollator:
        """The maker of batches for this CLIP and this decoder."""
        return PictureCollator(
            clip_size=vision.image_size,
            mean=vision.mean,
            std=vision.std,
            decoder_size=self.decoder.resolution,
            n_codes=self.decoder.n_tokens,
        )

    def validation(self, collator: PictureCollator, engine: Engine, coder: PictureCoder) -> ValidationLoss | None:
        """The loss per code on the validation split; None without --eval_steps."""
        valid = self.schedule.valid
        if valid is None:
            return None
        return ValidationLoss(valid, collator, engine, coder, _TASKS, self.schedule.batch, LossWeights())

    def record(self, config: PriorConfig, model: PriorTuner) -> dict[str, Any]:
        """The content of run.json, which every checkpoint holds too."""
        size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        return run_record(
            with_absolute_paths(to_dict(self.args, self.schedule.run)),
            deepspeed=self.schedule.deepspeed,
            world_size=self.schedule.ranks.world_size,
            reader=self.reader,
            prior=dataclasses.asdict(config),
            base={"path": os.path.abspath(self.args.vqgan), "fingerprint": self.reader["image_decoder"]},
            parameters={"all": size, "trained": size},
        )

    def describe(self, config: PriorConfig) -> str:
        """What is about to happen, in plain lines."""
        return (
            f"Training an image prior ({config.layers} layers x {config.width}, {config.n_tokens} of {config.n_codes} "
            f"codes) on {len(self.schedule.dataset):,} pictures of {self.args.data}: {self.schedule.steps:,} steps of "
            f"{self.schedule.batch_words}"
        )

    def write_prior(self, config: PriorConfig) -> str:
        """Makes <output_dir>/prior of the last checkpoint, for --prior; the line to tell. For one process alone."""
        model = PriorTuner(ImagePrior(config))
        load_trained(model, Path(self.schedule.run.output_dir) / f"checkpoint-{self.schedule.steps}")
        folder = Path(self.schedule.run.output_dir) / "prior"
        model.prior.save(folder)
        return f"Trained: {folder}, for --prior beside --vqgan {self.args.vqgan} and --clip {self.args.clip}"


def plan_prior(args: PriorArguments, run: RunArguments, ranks: Ranks) -> PriorPlan:
    """Checks what can be checked without loading CLIP, and packs the mini world if it is wanted and missing.

    Raises:
        ValueError: data, batch arithmetic, DeepSpeed file or image decoder do not fit; the message says what to do.
    """
    schedule = plan_schedule(run, args, ranks, tasks=_TASKS, task_mix=(1.0,), hidden_size=args.width)
    return PriorPlan(args=args, schedule=schedule, decoder=load_decoder(args.vqgan).to(ranks.device))
