"""The losses of neural tuning (Eq. 6-10), each as a SUM over its items in fp32; the caller divides by global counts.

Sums, not means: a mean per micro-batch would change the objective with the number of ranks and micro-batches.

Shape suffixes: N labelled tokens, V vocabulary, M masks, S mask side, G pictures, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """What the sums are divided by: the global batch's answer tokens, masks, pictures (scaled by the runtime)."""

    tokens: float
    masks: float
    pictures: float
    values: Mapping[str, float] = field(default_factory=dict)
    """The same of each task's own decoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of the mask loss (Dice), the picture loss (MSE) and the optional pixel loss (BCE)."""

    seg: float = 1.0
    gen: float = 10.0
    bce: float = 0.0


def answer_losses(logits_NV: Tensor, labels_N: Tensor, ignore: int) -> Tensor:
    """[N] cross entropy of each answer token (Eq. 6); 0 where the label is `ignore`."""
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=ignore, reduction="none")


def dice_losses(logits_MSS: Tensor, masks_MSS: Tensor, smooth: float = 1.0) -> Tensor:
    """[M] Dice loss of each mask (Eq. 7), on the sigmoid of the logits."""
    p, g = logits_MSS.float().sigmoid().flatten(1), masks_MSS.float().flatten(1)
    return 1.0 - (2.0 * (p * g).sum(1) + smooth) / (p.sum(1) + g.sum(1) + smooth)


def bce_losses(logits_MSS: Tensor, masks_MSS: Tensor) -> Tensor:
    """[M] binary cross entropy of each mask, a mean over its pixels."""
    pixels = F.binary_cross_entropy_with_logits(logits_MSS.float(), masks_MSS.float(), reduction="none")
    return pixels.flatten(1).mean(1)


def picture_losses(embedding_GE: Tensor, target_GE: Tensor) -> Tensor:
    """[G] squared error of each picture's CLIP embedding (Eq. 9), a mean over its dimensions."""
    return (embedding_GE.float() - target_GE.float()).square().mean(1)


def share(total: Tensor, norm: float) -> Tensor:
    """total / norm, or 0 (in the graph still) when the global batch holds no such item."""
    return total / norm if norm > 0 else total * 0.0
