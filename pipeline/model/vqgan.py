"""The VQGAN that turns code grids into pictures; the only door to taming-transformers.

Built from `taming.modules` (`taming.models` does not import beside today's Lightning). The state dict has taming's
names (`encoder.*, decoder.*, quantize.embedding.weight, quant_conv.*, post_quant_conv.*`), so taming's weights load as
they are.

Letters in shapes: B batch, S picture side, G side of the code grid, N = G * G codes.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn

from pipeline.model.folder import load_weights, read_config, save_folder


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
    norm_eps: float = 1e-6
    """Epsilon of the group norms: taming's 1e-6, CLIP-GEN's 1e-5."""

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
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = config.norm_eps
        # taming's quantizer puts its beta on the codebook term: 4 there is the usual commitment weight of 0.25.
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, beta=4.0)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def n_codes(self) -> int:
        """Entries of the codebook."""
        return self.config.n_embed

    @property
    def n_tokens(self) -> int:
        """Codes per picture."""
        return self.config.grid**2

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return self.config.resolution

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
        """Pictures -> code ids [B, N].

        taming's own choice of the nearest code, without the quantizer's one-hot matrix, which it makes on the CPU.
        """
        latents_ND = self.encode(pictures).permute(0, 2, 3, 1).flatten(0, 2)
        book_KD = self.quantize.embedding.weight
        distances_NK = latents_ND.square().sum(1, keepdim=True) + book_KD.square().sum(1) - 2 * latents_ND @ book_KD.T
        return distances_NK.argmin(1).view(pictures.shape[0], -1)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """Code ids [B, N] -> pictures [B, 3, S, S] in [-1, 1]."""
        side = self.config.grid
        latents = self.quantize.embedding(codes).view(codes.shape[0], side, side, -1).permute(0, 3, 1, 2)
        return self.decode(latents).clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        save_folder(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path) -> VQGAN:
        """Reads what `save` wrote; ValueError when a file or a tensor is missing or does not fit."""
        return load_weights(cls(read_config(VQGANConfig, folder, "VQGAN")), folder, "VQGAN")
