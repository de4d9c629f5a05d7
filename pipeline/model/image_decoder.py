"""Which image decoders there are: a class that has what `ImageDecoder` asks for, and its line in DECODERS.

A folder for --vqgan names its class in config.json as "decoder"; without that it is the VQGAN. A prior is trained for
one decoder (pipeline/pretrain_prior.py) and draws its codes.

Letters in shapes: B batch, R picture side, N codes per picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.model.folder import CONFIG, read_json
from pipeline.model.vqgan import VQGAN


class ImageDecoder(Protocol):
    """Pictures to codes and back, frozen. Besides, a class method `load(folder)` that raises ValueError."""

    @property
    def n_codes(self) -> int:
        """How many different codes there are."""

    @property
    def n_tokens(self) -> int:
        """N, codes per picture."""

    @property
    def resolution(self) -> int:
        """R, side of the pictures in pixels."""

    def codes(self, pictures: Tensor, /) -> Tensor:
        """[B,3,R,R] in -1..1 -> code ids [B,N], without gradients."""

    def pictures(self, codes: Tensor, /) -> Tensor:
        """Code ids [B,N] -> [B,3,R,R] in -1..1, without gradients."""

    def to(self, device: torch.device, /) -> Any:
        """Moves it, as nn.Module's."""


DECODERS: dict[str, Any] = {"vqgan": VQGAN}


def load_decoder(folder: str | Path) -> ImageDecoder:
    """The decoder of a folder. Raises ValueError if a file is missing or does not fit, or the class is unknown."""
    folder = Path(folder)
    name = read_json(folder, "image decoder").get("decoder", "vqgan")
    if name not in DECODERS:
        raise ValueError(f"{folder / CONFIG} names the decoder {name!r}, but there are {', '.join(DECODERS)}")
    return DECODERS[name].load(folder)
