"""Decoders that tasks bring along: from the state that predicts <OBJ-i> and the picture's features to numbers.

A task's decoder gets the state that the mask decoder gets. Its loss is a sum over its items, divided by their number in
the global batch like the others (Eq. 10), times its weight.

Shape suffixes: N items, D hidden, W numbers for an item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import ObjectValues, VisionFeatures
from pipeline.model import losses
from pipeline.model.initialise import Resettable, reset_layers


class TaskHead(Resettable):
    """Base of a task's own decoder, made of linear layers, convolutions and LayerNorms (or with a `reset` of its own).

    It must do the same calls whatever its input holds, and keep its parameters' dtype (see decoders.CastLinear).
    """

    weight = 1.0
    """Weight of its loss."""

    def forward(self, features: VisionFeatures, states_ND: Tensor) -> Tensor:
        """Values [N,W] of N items; features: of each item's picture, N rows."""
        raise NotImplementedError

    def losses(self, values_NW: Tensor, targets_NW: Tensor) -> Tensor:
        """[N] the loss of each item, in fp32."""
        raise NotImplementedError

    def reset(self, name: str, seed: int) -> None:
        reset_layers(self, name, seed)


MakeHead = Callable[[int, int], TaskHead]
"""(width of the LM, width of the CLIP) -> a task's decoder."""
HEADS: dict[str, MakeHead] = {}
"""By task."""


def task_losses(
    heads: nn.ModuleDict,
    wanted: Mapping[str, ObjectValues],
    norms: Mapping[str, float],
    features: VisionFeatures,
    samples_M: Tensor,
    states_MD: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted loss of all heads, detached sums value/<task> with their counts values/<task>).

    wanted, norms: a batch's targets and the numbers to divide by, by task. samples_M, states_MD: the sample and the
    state of each of the batch's masks. A head without work gets one row of weight zero, so that every rank calls every
    head.
    """
    total = states_MD.new_zeros((), dtype=torch.float32)
    sums: dict[str, Tensor] = {}
    for task, module in heads.items():
        head: Any = module
        items = wanted.get(task)
        number = items.targets.shape[0] if items else 0
        if items and number:
            values_NW = head(features.select(samples_M[items.places]), states_MD[items.places])
            loss = head.losses(values_NW, items.targets).sum()
        else:
            values_NW = head(features.select(samples_M[:1]), states_MD[:1])
            loss = head.losses(values_NW, values_NW.detach()).sum() * 0.0
        total = total + head.weight * losses.share(loss, norms.get(task, 0.0))
        sums[f"value/{task}"], sums[f"values/{task}"] = loss.detach(), total.new_tensor(float(number))
    return total, sums
