"""Decoders that tasks bring along: from the state that predicts <OBJ-i> and the picture's features to numbers.

A task's decoder gets the state that the mask decoder gets. Its loss is a sum over its items, divided by their number in
the global batch like the others (Eq. 10), times its weight.

Shape suffixes: N items, D hidden, W numbers for an item.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pipeline.data.batch import VisionFeatures
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
