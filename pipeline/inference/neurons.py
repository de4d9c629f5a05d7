"""Which units of the sparse networks fired while an answer was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.model.sparse import SparseNetwork


@dataclass
class Firing:
    """layers: index of each tuned layer. counts [layers, Z]: tokens at which a unit passed something on, of `tokens`
    that the model read one by one, the prompt's last and the answer's."""

    layers: list[int] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    tokens: int = 0

    @property
    def shares(self) -> np.ndarray:
        """[layers, Z]: share of the tokens at which each unit fired, 0..1."""
        return self.counts / max(self.tokens, 1)

    def most_active(self, layer: int, count: int = 5) -> list[tuple[int, float]]:
        """(unit, share) of the units of a layer (its row in counts) that fired most."""
        order = np.argsort(-self.shares[layer], kind="stable")[:count]
        return [(int(unit), float(self.shares[layer, unit])) for unit in order]


@contextmanager
def recorded(networks: Sequence[SparseNetwork]) -> Iterator[Firing]:
    """Records the networks while a single prompt is answered; the result is whole when the block ends."""
    firing = Firing(layers=[network.layer_index for network in networks])
    sums: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}

    def observe(layer: int, za_BTZ: Tensor) -> None:
        # The last position alone: of the prompt it is where the answer begins, later passes have no other.
        fired = (za_BTZ[:, -1] != 0).sum(0).float().cpu()
        sums[layer] = sums[layer] + fired if layer in sums else fired
        tokens[layer] = tokens.get(layer, 0) + za_BTZ.shape[0]

    for network in networks:
        network.observe = observe
    try:
        yield firing
    finally:
        for network in networks:
            network.observe = None
        if sums:
            firing.counts = torch.stack([sums[layer] for layer in firing.layers]).numpy()
            firing.tokens = max(tokens.values())
