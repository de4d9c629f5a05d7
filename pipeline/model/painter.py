"""From CLIP embeddings to pictures: the image prior draws VQGAN codes, the VQGAN decodes them.

Letters in shapes: G pictures, E embedding width, S picture side.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.model.prior import ImagePrior
from pipeline.model.vqgan import VQGAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How codes are drawn; see `ImagePrior.sample`."""

    temperature: float = 1.0
    top_k: int = 500
    top_p: float = 0.95


class Painter:
    """An image prior with its VQGAN.

    Raises:
        ValueError: the two do not belong together, or the prior takes another embedding than the vision tower gives.
    """

    def __init__(self, prior: ImagePrior, vqgan: VQGAN, embed_dim: int, sampling: Sampling) -> None:
        wanted, given = (vqgan.config.n_embed, vqgan.config.grid**2), (prior.config.n_codes, prior.config.n_tokens)
        if wanted != given:
            raise ValueError(
                f"the prior draws {given[1]} of {given[0]} codes, but the VQGAN's pictures have {wanted[1]} of "
                f"{wanted[0]}: give a prior that was trained on this VQGAN"
            )
        if prior.config.embed_dim != embed_dim:
            raise ValueError(
                f"the prior takes embeddings of {prior.config.embed_dim} numbers, the CLIP gives {embed_dim}: "
                "give a prior that was trained on this CLIP"
            )
        self.prior, self.vqgan, self.sampling = prior, vqgan, sampling

    @classmethod
    def load(cls, prior: str, vqgan: str, embed_dim: int, sampling: Sampling, device: torch.device) -> Painter:
        """Reads both from their folders."""
        return cls(ImagePrior.load(Path(prior)).to(device), VQGAN.load(Path(vqgan)).to(device), embed_dim, sampling)

    @torch.no_grad()
    def paint(self, embedding_GE: Tensor, seed: int) -> list[bytes]:
        """PNG bytes of one picture per embedding; the same embeddings and seed give the same pictures."""
        options = self.sampling
        codes = self.prior.sample(
            embedding_GE, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=seed
        )
        pictures = ((self.vqgan.pictures(codes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [_png(picture) for picture in pictures]


def _png(picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
