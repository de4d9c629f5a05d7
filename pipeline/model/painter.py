"""From CLIP embeddings to pictures: the image prior draws codes, the image decoder (a VQGAN) makes pictures of them.

Letters in shapes: G pictures, E embedding width, S picture side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.image_decoder import ImageDecoder, load_decoder
from pipeline.model.prior import ImagePrior

Embed = Callable[[list[bytes]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How codes are drawn (see `ImagePrior.sample`), and how many candidates of each picture.

    top_k: None takes 100 for each 512 codes that there are, and at most CLIP-GEN's 500.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 0.95
    candidates: int = 4


class Painter:
    """An image prior with its image decoder.

    Args:
        embed: picture files -> their CLIP embeddings, to choose among candidates.
        embed_dim: width of that CLIP's embeddings.

    Raises:
        ValueError: the two do not belong together, or the prior takes another embedding than the vision tower gives.
    """

    def __init__(
        self, prior: ImagePrior, decoder: ImageDecoder, embed: Embed, embed_dim: int, sampling: Sampling
    ) -> None:
        wanted, given = (decoder.n_codes, decoder.n_tokens), (prior.config.n_codes, prior.config.n_tokens)
        if wanted != given:
            raise ValueError(
                f"the prior draws {given[1]} of {given[0]} codes, but the decoder's pictures have {wanted[1]} of "
                f"{wanted[0]}: give a prior that was trained on this decoder"
            )
        if prior.config.embed_dim != embed_dim:
            raise ValueError(
                f"the prior takes embeddings of {prior.config.embed_dim} numbers, the CLIP gives {embed_dim}: "
                "give a prior that was trained on this CLIP"
            )
        self.prior, self.decoder, self.embed, self.sampling = prior, decoder, embed, sampling

    @classmethod
    def load(
        cls, prior: str, vqgan: str, embed: Embed, embed_dim: int, sampling: Sampling, device: torch.device
    ) -> Painter:
        """Reads both from their folders."""
        models = ImagePrior.load(Path(prior)).to(device), load_decoder(vqgan).to(device)
        return cls(*models, embed, embed_dim, sampling)

    def to(self, device: torch.device) -> None:
        """Moves both models."""
        self.prior.to(device)
        self.decoder.to(device)

    @torch.no_grad()
    def paint(
        self, embedding_GE: Tensor, seed: int, sampling: Sampling | None = None, keys: Sequence[int] | None = None
    ) -> list[bytes]:
        """PNG bytes of one picture per embedding.

        A picture depends on its embedding, the seed and its key alone, not on the others of the call; the keys are the
        rows' numbers unless given. sampling: another than the painter's own, for this call.
        """
        options = sampling or self.sampling
        count = options.candidates
        wanted_NE = embedding_GE.repeat_interleave(count, dim=0)
        codes = self.prior.sample(
            wanted_NE,
            temperature=options.temperature,
            top_k=min(500, self.prior.config.n_codes // 512 * 100) if options.top_k is None else options.top_k,
            top_p=options.top_p,
            seed=seed,
            keys=[(key, candidate) for key in keys or range(len(embedding_GE)) for candidate in range(count)],
        )
        pixels = ((self.decoder.pictures(codes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        drawn = [_png(picture) for picture in pixels]
        if count == 1:
            return drawn
        near_GK = F.cosine_similarity(self.embed(drawn), wanted_NE.float().cpu()).unflatten(0, (-1, count))
        return [drawn[row * count + best] for row, best in enumerate(near_GK.argmax(1).tolist())]


def _png(picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
