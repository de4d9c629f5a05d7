"""What trains an image prior: the frozen models that make its condition and its targets, and the loss.

Language-free, as CLIP-GEN: the condition is the CLIP embedding of the picture itself, the target its codes.

Letters in shapes: B batch, E embedding width, N codes per picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.batch import PictureBatch
from pipeline.model import losses
from pipeline.model.image_decoder import ImageDecoder
from pipeline.model.losses import LossWeights, Norms
from pipeline.model.prior import ImagePrior
from pipeline.model.vision import VisionTower


@dataclass(frozen=True, slots=True)
class Coded:
    """Of B pictures the CLIP embedding [B,E], projected and unnormalised, and the codes [B,N]."""

    embedding: Tensor
    codes: Tensor


class PictureCoder:
    """The frozen CLIP and image decoder; they stay outside the engine."""

    def __init__(self, vision: VisionTower, decoder: ImageDecoder) -> None:
        self.vision, self.decoder = vision, decoder

    def __call__(self, pixel_values: tuple[Tensor, Tensor]) -> Coded:
        """See PictureBatch.pixel_values."""
        seen, coded = pixel_values
        return Coded(self.vision(seen).embedding, self.decoder.codes(coded))


class PriorTuner(nn.Module):
    """An image prior with its loss, in the call shape that the Trainer has for every model.

    condition_noise: length of the noise that is added to half of the unit-length conditions, so that the prior takes
    the slightly wrong embeddings that a tuned LM will hand it; 0, as CLIP-GEN: none.
    """

    def __init__(self, prior: ImagePrior, condition_noise: float = 0.0) -> None:
        super().__init__()
        self.prior, self.condition_noise = prior, condition_noise

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: matrices inside the network with weight decay; embeddings, norms and biases without."""
        decays: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            inner = parameter.ndim > 1 and not any(table in name for table in (".wte.", ".wpe."))
            (decays if inner else others).append(parameter)
        return [
            {"name": "prior", "lr": lr, "weight_decay": weight_decay, "params": decays},
            {"name": "prior/no_decay", "lr": lr, "weight_decay": 0.0, "params": others},
        ]

    def forward(
        self, batch: PictureBatch, features: Coded, norms: Norms, _weights: LossWeights | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(cross-entropy of the codes over norms.tokens, sums for the log)."""
        condition_BE = F.normalize(features.embedding.float(), dim=-1)
        if self.training and self.condition_noise:
            noise_BE = F.normalize(torch.randn_like(condition_BE), dim=-1) * self.condition_noise
            condition_BE = condition_BE + noise_BE * (torch.rand_like(condition_BE[:, :1]) < 0.5)
        logits_BNV = self.prior(condition_BE, features.codes)
        each = F.cross_entropy(logits_BNV.flatten(0, 1).float(), features.codes.flatten(), reduction="none")
        ce = (each * batch.attention_mask.flatten()).sum()
        count = batch.attention_mask.sum().to(ce)
        return losses.share(ce, norms.tokens), {"ce": ce.detach(), "tokens": count}
