"""The losses on the validation split during training, the same on any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.data.batch import TrainingBatch
from pipeline.data.loader import MakeBatch, SampleSource, build_loader
from pipeline.data.order import SampleOrder
from pipeline.model.losses import LossWeights, Norms
from pipeline.runtime.ds_config import BatchPlan
from pipeline.runtime.engine import Engine

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
