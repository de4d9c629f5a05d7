"""What is looked at on the validation split during training: the losses, the same on any number of ranks, and a sheet
of answers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.data.batch import TrainingBatch
from pipeline.data.loader import MakeBatch, SampleSource, build_loader
from pipeline.data.order import SampleOrder
from pipeline.model.losses import LossWeights, Norms
from pipeline.runtime.ds_config import BatchPlan
from pipeline.runtime.engine import Engine
from pipeline.runtime.evaluator import Evaluator
from pipeline.runtime.reporting import contact_sections
from pipeline.runtime.tracking import Tracker
from pipeline.scoring.contact_sheet import draw_sheet

_COUNT_OF = {"ce": "tokens", "dice": "masks", "mse": "pictures"}


class ValidationLoss:
    """Called with a step, goes once through the split in global batches, a share of each task in each.

    The order's seed is fixed, so every validation of every run sees the same samples for the same tasks. Samples beyond
    the last whole global batch are left out.
    """

    def __init__(
        self,
        dataset: SampleSource,
        collator: MakeBatch[TrainingBatch],
        engine: Engine,
        vision: Callable[[Any], Any],
        tasks: Sequence[str],
        batch: BatchPlan,
        weights: LossWeights,
    ) -> None:
        assert len(dataset) >= batch.global_batch, "the plan of the run refuses a smaller split"
        self.dataset, self.collator, self.engine, self.vision = dataset, collator, engine, vision
        self.order = SampleOrder(len(dataset), 0, batch.global_batch, tuple(tasks), (1.0,) * len(tasks))
        self.batch, self.weights = batch, weights

    def __call__(self, step: int) -> dict[str, float]:
        """Mean loss per answer token, mask and picture."""
        ranks = self.engine.ranks
        loader = build_loader(
            self.dataset,
            self.order,
            self.collator,
            rank=ranks.rank,
            world=ranks.world_size,
            micro_batch=self.batch.micro_batch,
            last_step=len(self.dataset) // self.batch.global_batch,
            max_bad_share=1.0,
        )
        sums: Counter[str] = Counter()
        self.engine.module.eval()
        with torch.no_grad():
            for _, batches in loader:
                for micro in batches:
                    on_device = micro.to(ranks.device)
                    features = self.vision(on_device.pixel_values)
                    _, found = self.engine(on_device, features, Norms(tokens=1, masks=1, pictures=1), self.weights)
                    sums.update({name: float(value) for name, value in found.items()})
        names = sorted(sums)
        total = dict(zip(names, ranks.sum([sums[name] for name in names]), strict=True))
        return {kind: total[kind] / total[count] for kind, count in _COUNT_OF.items() if total.get(count)}


class ValidationSheet:
    """Called with a step, draws the answers to the split's first samples and gives the sheet to the tracker.

    Answers are teacher-forced: one pass for each task, where free-running decoding would gather a model in pieces once
    for every token. Under ZeRO-3 all ranks must make the same passes, so each answers all of these few prompts.

    Args:
        evaluator: of a world of one, on every rank; its limit says how many samples, its painter (rank 0's alone) rests
            in CPU memory in between.
        is_main: whether this rank draws.
    """

    FOLDER = "validation"

    def __init__(self, evaluator: Evaluator, tracker: Tracker, *, is_main: bool, title: str) -> None:
        assert evaluator.ranks.world_size == 1 and evaluator.limit > 0
        self.evaluator, self.tracker, self.is_main, self.title = evaluator, tracker, is_main, title

    def __call__(self, step: int) -> None:
        """Collective under ZeRO-3."""
        painter, device = self.evaluator.painter, self.evaluator.ranks.device
        if painter is not None:
            painter.to(device)
        answers = self.evaluator.predict("tuned", "teacher-forced")
        if painter is not None:
            painter.to(torch.device("cpu"))
        if not self.is_main:
            return
        sections = contact_sections(answers, self.evaluator.dataset, per_task=self.evaluator.limit)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"step-{step:06d}.png"
            subtitle = f"step {step:,} · teacher-forced decoding · the validation split's first samples"
            draw_sheet(sections, path, title=self.title, subtitle=subtitle)
            self.tracker.log_artifact(path, self.FOLDER)
