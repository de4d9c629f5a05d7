"""What train.py does every --eval_steps on the validation split: the losses, and a sheet of answers for MLflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.assembly.loading import load_painter
from pipeline.assembly.training import RunPlan
from pipeline.data.collate import Collator
from pipeline.data.tokens import TokenMap
from pipeline.model.painter import Painter, Sampling
from pipeline.model.vision import VisionTower
from pipeline.runtime.engine import Engine
from pipeline.runtime.evaluator import Evaluator
from pipeline.runtime.reporting import HEADINGS
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.validation import ValidationLoss, ValidationSheet


def sheet_painter(plan: RunPlan, vision: VisionTower) -> Painter | None:
    """The picture decoder of the sheets, on the CPU of the rank that draws them; None where none is wanted or named.

    Loaded before the LM: a damaged one is told in the run's first seconds. Raises ValueError.
    """
    if not (plan.train.eval_steps and plan.train.eval_samples and plan.ranks.is_main):
        return None
    return load_painter(plan.model, vision, Sampling(candidates=1), torch.device("cpu"))


def make_validation(
    plan: RunPlan,
    engine: Engine,
    tracker: Tracker,
    *,
    vision: VisionTower,
    token_map: TokenMap,
    collator: Collator,
    painter: Painter | None,
) -> Callable[[int], dict[str, float]] | None:
    """What the trainer calls with a step for the losses; None without --eval_steps."""
    valid, batch = plan.schedule.valid, plan.schedule.batch
    if valid is None:
        return None
    data, train, ranks = plan.data, plan.train, plan.ranks
    losses = ValidationLoss(valid, collator, engine, vision, data.task_names, batch, plan.weights)
    # Without a picture decoder there is nothing to show of picture generation.
    draws = plan.model.prior and plan.model.vqgan
    tasks = [task for task in data.task_names if task in HEADINGS and (draws or task != "generation")]
    if not (train.eval_samples and tasks):
        return losses
    evaluator = Evaluator(
        tuner=engine.module,  # type: ignore[arg-type]
        vision=vision,
        token_map=token_map,
        collator=collator,
        dataset=valid,
        painter=painter,
        tasks=tasks,
        ranks=replace(ranks, rank=0, world_size=1),
        batch_size=train.eval_samples,
        max_new_tokens=0,
        limit=train.eval_samples,
        seed=train.seed,
        progress=False,
    )
    sheet = ValidationSheet(evaluator, tracker, is_main=ranks.is_main, title=Path(train.output_dir).name)

    def validate(step: int) -> dict[str, float]:
        sheet(step)
        return losses(step)

    return validate
