"""One run of pretrain_prior.py: its plan, its parts, and the folder that comes out of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.assembly import parts
from pipeline.assembly.training import MINI_SHARDS, open_validation, pack_mini, with_absolute_paths
from pipeline.config import PriorArguments, RunArguments, to_dict
from pipeline.data.batch import PictureBatch
from pipeline.data.loader import build_loader
from pipeline.data.mixture import MixedDataset, make_order
from pipeline.data.order import SampleOrder
from pipeline.data.pictures import PictureCollator
from pipeline.model.fingerprint import fingerprint
from pipeline.model.image_decoder import ImageDecoder, load_decoder
from pipeline.model.losses import LossWeights
from pipeline.model.prior import ImagePrior, PriorConfig
from pipeline.model.prior_training import PictureCoder, PriorTuner
from pipeline.model.vision import VisionTower
from pipeline.runtime.checkpoint import check_reader, load_trained
from pipeline.runtime.ds_config import BatchPlan, OptimizerSettings, count_steps, plan_batch, read_json, resolve
from pipeline.runtime.engine import Engine
from pipeline.runtime.provenance import run_record
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.validation import ValidationLoss

_TASKS = ("generation",)  # the one that every sample has: a picture to be made


@dataclass(frozen=True, slots=True)
class PriorPlan:
    """Everything about a run that is known before CLIP is loaded."""

    args: PriorArguments
    run: RunArguments
    ranks: Ranks
    dataset: MixedDataset
    valid: MixedDataset | None
    order: SampleOrder
    batch: BatchPlan
    optimizer: OptimizerSettings
    deepspeed: dict[str, Any]
    decoder: ImageDecoder

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.optimizer.total_steps

    @property
    def reader(self) -> dict[str, Any]:
        """What the samples, their order and the codes depend on; a resumed run must have the same."""
        return {
            "digest": self.dataset.digest,
            "seed": self.order.seed,
            "global_batch": self.order.global_batch,
            "shuffle_window": self.order.window,
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
        if state["total_steps"] != self.steps:
            raise ValueError(
                f"the checkpoint is of a run of {state['total_steps']} steps, this one has {self.steps}: give the same "
                "--max_steps or --epochs, or start anew with --resume never"
            )

    def make_model(self, config: PriorConfig) -> PriorTuner:
        """The transformer with initial values by the seed, the same on every rank."""
        torch.manual_seed(self.run.seed)
        model = PriorTuner(ImagePrior(config), self.args.condition_noise).to(self.ranks.device)
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

    def batches(self, collator: PictureCollator, first: int) -> Iterator[list[PictureBatch]]:
        """This rank's micro-batches of each step from `first` on."""
        loader = build_loader(
            self.dataset,
            self.order,
            collator,
            rank=self.ranks.rank,
            world=self.ranks.world_size,
            micro_batch=self.batch.micro_batch,
            first_step=first,
            last_step=self.steps,
            num_workers=self.args.num_workers,
            max_bad_share=1.0,
            pin_memory=self.ranks.device.type == "cuda",
        )
        return (batches for _, batches in loader)

    def validation(self, collator: PictureCollator, engine: Engine, coder: PictureCoder) -> ValidationLoss:
        """The loss per code on the validation split; needs --eval_steps."""
        assert self.valid is not None
        return ValidationLoss(self.valid, collator, engine, coder, _TASKS, self.batch, LossWeights())

    def record(self, config: PriorConfig, model: PriorTuner) -> dict[str, Any]:
        """The content of run.json, which every checkpoint holds too."""
        size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        return run_record(
            with_absolute_paths(to_dict(self.args, self.run)),
            deepspeed=self.deepspeed,
            world_size=self.ranks.world_size,
            reader=self.reader,
            prior=dataclasses.asdict(config),
            base={"path": os.path.abspath(self.args.vqgan), "fingerprint": self.reader["image_decoder"]},
            parameters={"all": size, "trained": size},
        )

    def describe(self, resume: Path | None, config: PriorConfig) -> str:
        """What is about to happen, in plain lines."""
        b = self.batch
        lines = [
            f"Training an image prior ({config.layers} layers x {config.width}, {config.n_tokens} of {config.n_codes} "
            f"codes) on {len(self.dataset):,} pictures of {self.args.data}: {self.steps:,} steps of {b.global_batch} "
            f"({b.micro_batch} per pass x {b.accumulation} x {b.world_size} ranks), "
            f"ZeRO-{self.deepspeed['zero_optimization']['stage']} on {self.ranks.device.type}. "
            f"Output: {self.run.output_dir}"
        ]
        if resume is not None:
            lines.append(f"Going on from {resume}; give --resume never to start anew.")
        return "\n".join(lines)

    def write_prior(self, config: PriorConfig) -> str:
        """Makes <output_dir>/prior of the last checkpoint, for --prior; the line to tell. For one process alone."""
        model = PriorTuner(ImagePrior(config))
        load_trained(model, Path(self.run.output_dir) / f"checkpoint-{self.steps}")
        folder = Path(self.run.output_dir) / "prior"
        model.prior.save(folder)
        return f"Trained: {folder}, for --prior beside --vqgan {self.args.vqgan} and --clip {self.args.clip}"


def plan_prior(args: PriorArguments, run: RunArguments, ranks: Ranks) -> PriorPlan:
    """Checks what can be checked without loading CLIP, and packs the mini world if it is wanted and missing.

    Raises:
        ValueError: data, batch arithmetic, DeepSpeed file or image decoder do not fit; the message says what to do.
    """
    if Path(args.data) == MINI_SHARDS:
        pack_mini(ranks)
    dataset = parts.open_split(args.data, "train")
    batch = plan_batch(run.global_batch, ranks.world_size, micro_batch=run.micro_batch, limit=run.max_micro_batch)
    steps = count_steps(len(dataset), run.global_batch, epochs=run.epochs, max_steps=run.max_steps)
    optimizer = OptimizerSettings(
        lr=run.lr,
        beta1=run.adam_beta1,
        beta2=run.adam_beta2,
        eps=run.adam_eps,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        total_steps=steps,
        warmup_steps=round(run.warmup_ratio * steps),
    )
    config = resolve(
        read_json(run.deepspeed_file()),
        plan=batch,
        optimizer=optimizer,
        bf16=run.use_bf16(ranks.device.type),
        hidden_size=args.width,
        on_cpu=ranks.device.type == "cpu",
    )
    return PriorPlan(
        args=args,
        run=run,
        ranks=ranks,
        dataset=dataset,
        valid=open_validation(args.data, run) if run.eval_steps else None,
        order=make_order(
            dataset,
            seed=run.seed,
            global_batch=run.global_batch,
            tasks=_TASKS,
            task_mix=(1.0,),
            window=args.shuffle_window,
        ),
        batch=batch,
        optimizer=optimizer,
        deepspeed=config,
        decoder=load_decoder(args.vqgan).to(ranks.device),
    )
