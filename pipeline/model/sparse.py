"""The sparse task network of one tuned layer: what the attention receives in, one part per tuned projection out.

Source: Neural Tuning Eq. 1-4 and its Appendix C. The paper names Appendix C's activation patterns; the exact rules of
all but "gaussian" are ours (no text of the appendix was at hand when they were written):

- gaussian: n of the Z units stay, n from r ~ N(beta, (0.1 beta)²), the paper's rule.
- top2beta: of the round(2 beta Z) largest units a random half stays, round(beta Z) of them.
- level: the share grows linearly with depth, from beta/2 in the first tuned layer to 3 beta/2 in the last; no draw.
- distribution: the unit of rank j stays with a chance that falls linearly with j, beta on average; rank 0 always stays.

All draws are made once per layer and optimizer step from (seed, step, layer), so every rank, every micro-batch and the
recomputation of a checkpointed layer see the same one. Without training there are no draws: the share is beta.

Shape suffixes: B batch, T tokens, D hidden, Z sparse dimension.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.initialise import Resettable, normal, write
from sparse_kernels import sparse_vector

ACTIVATIONS = ("hard", "shifted")
PATTERNS = ("gaussian", "top2beta", "level", "distribution")
RANKED = ("top2beta", "distribution")


def active_units(r: float, z_dim: int, activation: str) -> int:
    """How many units stay for the share r, always in 1..z_dim.

    "hard": round(r Z). "shifted": Z - k where theta is the k-th smallest, k = floor((1 - r) Z), none below 1.
    """
    if activation == "hard":
        return min(max(round(r * z_dim), 1), z_dim)
    return max(z_dim - max(math.floor((1.0 - r) * z_dim), 0), 1)


def keep_chances(beta: float, z_dim: int) -> list[float]:
    """The "distribution" pattern's chance of each rank 0..Z-1 to stay: linear in the rank, with mean beta."""
    middles = [(j + 0.5) / z_dim for j in range(z_dim)]
    if beta <= 0.5:
        return [2.0 * beta * (1.0 - x) for x in middles]
    return [1.0 - 2.0 * (1.0 - beta) * x for x in middles]


class SparseNetwork(Resettable):
    """Wz, Wb and, if asked, the norm's weight of one tuned layer; parameters lie here, where forward uses them."""

    def __init__(
        self,
        hidden: int,
        z_dim: int,
        out_features: dict[str, int],
        *,
        alpha: float = 0.9,
        beta: float = 0.4,
        activation: str = "hard",
        norm: bool = False,
        norm_eps: float = 1e-6,
        inference_sparsity: bool = True,
        pattern: str = "gaussian",
        layer_index: int = 0,
        depth: tuple[int, int] = (0, 1),
        seed: int = 0,
    ) -> None:
        """out_features: width of each tuned projection by name, e.g. {"q": 4096, "v": 1024}.

        depth: (place among the tuned layers, their number), for the pattern "level"; layer_index keys the draws.
        `observe`, when set, is called with (layer_index, za [B,T,Z]) in each forward.
        """
        super().__init__()
        if not 0.0 < beta <= 1.0:
            raise ValueError(f"beta, the share of active units, must lie in (0, 1], not {beta}")
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha, the memory of the EMA over layers, must lie in [0, 1), not {alpha}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
        if pattern not in PATTERNS:
            raise ValueError(f"activation_pattern must be one of {PATTERNS}, not {pattern!r}")
        if pattern in RANKED and activation != "hard":
            raise ValueError(f"activation_pattern {pattern!r} keeps units by rank: use --activation hard with it")
        if z_dim < 1 or not out_features:
            raise ValueError(f"z_dim must be at least 1 and a projection tuned, not {z_dim} and {out_features}")
        self.z_dim, self.out_features = z_dim, dict(out_features)
        self.alpha, self.beta, self.activation, self.norm_eps = alpha, beta, activation, norm_eps
        self.inference_sparsity, self.pattern = inference_sparsity, pattern
        self.layer_index, self.depth, self.seed = layer_index, depth, seed
        self.wz = nn.Parameter(torch.empty(z_dim, hidden))
        self.wb = nn.Parameter(torch.empty(sum(out_features.values()), z_dim))
        self.norm_weight = nn.Parameter(torch.empty(z_dim)) if norm else None
        self.observe: Callable[[int, Tensor], None] | None = None
        self.reset("sparse_network", seed)
        self.set_step(0)

    def reset(self, name: str, seed: int) -> None:
        """Wz ~ N(0, 1/D); Wb = 0, so that an untrained tuner leaves the pretrained model as it was; norm weight 1."""
        write(self.wz, normal(f"{name}.wz", seed, self.wz.shape, self.wz.shape[1] ** -0.5))
        write(self.wb, 0.0)
        if self.norm_weight is not None:
            write(self.norm_weight, 1.0)

    def set_step(self, step: int) -> None:
        """Makes the draws of one optimizer step; call it before the step's first micro-batch."""
        key = hashlib.sha256(f"{self.seed}/{step}/{self.layer_index}".encode()).digest()
        draw = random.Random(key)
        self.share = draw.gauss(self.beta, 0.1 * self.beta) if self.pattern == "gaussian" else self.mean_share
        self.kept_ranks: list[bool] | None = None
        if self.pattern == "top2beta":
            n = active_units(self.beta, self.z_dim, "hard")
            kept = set(draw.sample(range(min(2 * n, self.z_dim)), n))
            self.kept_ranks = [j in kept for j in range(self.z_dim)]
        elif self.pattern == "distribution":
            chances = keep_chances(self.beta, self.z_dim)
            self.kept_ranks = [j == 0 or draw.random() < chance for j, chance in enumerate(chances)]

    @property
    def mean_share(self) -> float:
        """The share without a draw: beta, or this depth's share under "level"."""
        if self.pattern != "level":
            return self.beta
        place, layers = self.depth
        return self.beta if layers == 1 else min(self.beta * (0.5 + place / (layers - 1)), 1.0)

    @property
    def n_active(self) -> int:
        """How many units of a row stay, here and now (training draws, inference takes the mean share, or all)."""
        if self.training:
            return active_units(self.share, self.z_dim, self.activation)
        return active_units(self.mean_share, self.z_dim, self.activation) if self.inference_sparsity else self.z_dim

    def forward(self, h_BTD: Tensor, z_prev_BTZ: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(zu [B,T,Z] fp32, the part [B,T,out] of each tuned projection by name)."""
        by_rank = self.training and self.kept_ranks is not None
        zu_BTZ, za_BTZ = sparse_vector(
            h_BTD.to(self.wz.dtype),
            self.wz,
            z_prev_BTZ,
            alpha=self.alpha,
            n_active=self.z_dim if by_rank else self.n_active,
            activation=self.activation,
            norm_weight=self.norm_weight,
            norm_eps=self.norm_eps,
        )
        if by_rank:
            kept = torch.tensor(self.kept_ranks, device=zu_BTZ.device)
            order = zu_BTZ.detach().argsort(dim=-1, descending=True, stable=True)
            stays = torch.zeros_like(zu_BTZ, dtype=torch.bool).scatter(-1, order, kept.expand_as(order))
            za_BTZ = torch.where(stays, zu_BTZ, 0.0)
        if self.observe is not None:
            self.observe(self.layer_index, za_BTZ)
        zb = F.linear(za_BTZ.to(self.wb.dtype), self.wb)
        parts = zb.split(list(self.out_features.values()), dim=-1)
        return zu_BTZ, dict(zip(self.out_features, parts, strict=True))
