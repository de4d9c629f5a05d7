"""The VQGAN that turns code grids into pictures; the only door to taming-transformers.

Built from `taming.modules` (`taming.models` does not import beside today's Lightning). The state dict has taming's
names (`encoder.*, decoder.*, quantize.embedding.weight, quant_conv.*, post_quant_conv.*`), so taming's weights load as
they are.

Letters in shapes: B batch, S picture side, G side of the code grid, N = G * G codes.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class VQGANConfig:
    """taming's `ddconfig` and codebook, one field each.

    The defaults are the f16, 16384-code, 256-pixel model of CLIP-GEN and of taming's ImageNet release.
    """

    resolution: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 16384

    @property
    def grid(self) -> int:
        """Side of the code grid."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Pictures are float [B, 3, S, S] in [-1, 1]; codes are ids [B, N] row by row."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        shape = {
            "ch": config.ch,
            "out_ch": 3,
            "ch_mult": config.ch_mult,
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": config.attn_resolutions,
            "in_channels": 3,
            "resolution": config.resolution,
            "z_channels": config.z_channels,
        }
        # taming prints the shape of its codes; standard output is for answers.
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder = Encoder(double_z=False, **shape)
            self.decoder = Decoder(**shape)
        # taming's quantizer puts its beta on the codebook term: 4 there is the usual commitment weight of 0.25.
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, beta=4.0)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """Continuous latents [B, embed_dim, G, G] of pictures."""
        return self.quant_conv(self.encoder(pictures))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, embed_dim, G, G] -> pictures [B, 3, S, S]."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures -> (reconstructions, codebook loss, codes [B, N]); gradients pass straight through the codebook."""
        quantized, loss, (_, _, codes) = self.quantize(self.encode(pictures))
        return self.decode(quantized), loss, codes.view(pictures.shape[0], -1)

    @torch.no_grad()
    def codes(self, pictures: Tensor) -> Tensor:
        """Pictures -> code ids [B, N]."""
        return self.quantize(self.encode(pictures))[2][2].view(pictures.shape[0], -1)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """Code ids [B, N] -> pictures [B, 3, S, S] in [-1, 1]."""
        side = self.config.grid
        latents = self.quantize.embedding(codes).view(codes.shape[0], side, side, -1).permute(0, 3, 1, 2)
        return self.decode(latents).clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}, folder / "model.safetensors"
        )

    @classmethod
    def load(cls, folder: Path) -> VQGAN:
        """Reads what `save` wrote.

        Raises:
            ValueError: a file is missing, or a tensor is missing, unexpected or of another shape.
        """
        model = cls(VQGANConfig(**read_config(folder, "VQGAN", sequences=("ch_mult", "attn_resolutions"))))
        return load_weights(model, folder / "model.safetensors", "VQGAN")


def read_config(folder: Path, what: str, sequences: tuple[str, ...] = ()) -> dict:
    """The keyword arguments in a folder's config.json; the named lists become tuples."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{what}: {path} is missing. Give the folder that holds config.json and model.safetensors.")
    values = json.loads(path.read_text())
    return {k: tuple(v) if k in sequences else v for k, v in values.items()}


def load_weights(model: Module, path: Path, what: str) -> Module:
    """Strictly loads a safetensors file into a model, in evaluation mode and frozen; ValueError on any mismatch."""
    if not path.is_file():
        raise ValueError(f"{what}: {path} is missing.")
    found, wanted = load_file(path), model.state_dict()
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [k for k in wanted.keys() & found.keys() if wanted[k].shape != found[k].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{what}: {path} does not fit its config.json: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}."
        )
    model.load_state_dict(found)
    return model.eval().requires_grad_(False)
