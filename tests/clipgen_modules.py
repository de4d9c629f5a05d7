"""CLIP-GEN's networks at any size, with its tensors' names and its arithmetic: what its .pt files are written from.

Written from the published format (github.com/HFAiLab/clip-gen, models/): rows of blocks in nn.Sequential, attention by
nn.MultiheadAttention, PyTorch's own transformer layers, a head with a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__()
        first = [nn.GroupNorm(32, wide_in), nn.SiLU(), nn.Conv2d(wide_in, wide_out, 3, padding=1)]
        second = [nn.GroupNorm(32, wide_out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(wide_out, wide_out, 3, padding=1)]
        self.block = nn.Sequential(*first, *second)
        if wide_in != wide_out:
            self.shortcut = nn.Conv2d(wide_in, wide_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class Attention(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, wide)
        self.attn = nn.MultiheadAttention(wide, num_heads=1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attn(rows, rows, rows, need_weights=False)[0].transpose(1, 2).view_as(x)


class Resize(nn.Module):
    def __init__(self, wide: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(wide, wide, 3, padding=1) if up else nn.Conv2d(wide, wide, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


def middle(wide: int) -> nn.Sequential:
    return nn.Sequential(Residual(wide, wide), Attention(wide), Residual(wide, wide))


class Encoder(nn.Module):
    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], blocks: int, attn: tuple[int, ...], side: int, z: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        row: list[nn.Module] = []
        wide = ch
        for level, factor in enumerate(ch_mult):
            for _ in range(blocks):
                row.append(Residual(wide, ch * factor))
                wide = ch * factor
                if side in attn:
                    row.append(Attention(wide))
            if level < len(ch_mult) - 1:
                row.append(Resize(wide, up=False))
                side //= 2
        self.down, self.mid = nn.Sequential(*row), middle(wide)
        last = [nn.Conv2d(wide, z, 3, padding=1), nn.Conv2d(z, z, 1)]
        self.final = nn.Sequential(nn.GroupNorm(32, wide), nn.SiLU(), *last)

    def forward(self, x: Tensor) -> Tensor:
        return self.final(self.mid(self.down(self.conv_in(x))))


class Decoder(nn.Module):
    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], blocks: int, attn: tuple[int, ...], side: int, z: int
    ) -> None:
        super().__init__()
        wide = ch * ch_mult[-1]
        self.quant_conv_in, self.conv_in = nn.Conv2d(z, z, 1), nn.Conv2d(z, wide, 3, padding=1)
        self.mid = middle(wide)
        row: list[nn.Module] = []
        side //= 2 ** (len(ch_mult) - 1)
        for level, factor in reversed(list(enumerate(ch_mult))):
            for _ in range(blocks + 1):
                row.append(Residual(wide, ch * factor))
                wide = ch * factor
                if side in attn:
                    row.append(Attention(wide))
            if level:
                row.append(Resize(wide, up=True))
                side *= 2
        self.up = nn.Sequential(*row)
        self.final = nn.Sequential(nn.GroupNorm(32, wide), nn.SiLU(), nn.Conv2d(wide, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.final(self.up(self.mid(self.conv_in(self.quant_conv_in(z)))))


class ClipGenVQGAN(nn.Module):
    def __init__(self, codes: int, z: int, **sizes: object) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(z=z, **sizes), Decoder(z=z, **sizes)  # type: ignore[arg-type]
        self.quantizer = nn.Module()
        self.quantizer.embedding = nn.Embedding(codes, z)
        self.discriminator = nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4))

    def codes(self, pictures: Tensor) -> Tensor:
        latents = self.encoder(pictures).permute(0, 2, 3, 1)
        return torch.cdist(latents.flatten(0, 2), self.quantizer.embedding.weight).argmin(1).view(len(pictures), -1)

    def pictures(self, codes: Tensor) -> Tensor:
        side = int(codes.shape[1] ** 0.5)
        return self.decoder(self.quantizer.embedding(codes).view(len(codes), side, side, -1).permute(0, 3, 1, 2))


class Layer(nn.Module):
    def __init__(self, wide: int, heads: int, length: int) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            wide, heads, 4 * wide, 0.1, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.register_buffer("mask", ~torch.tril(torch.ones(length, length, dtype=torch.bool)))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, self.mask[: x.shape[1], : x.shape[1]])


class ClipGenTransformer(nn.Module):
    def __init__(self, codes: int, layers: int, wide: int, heads: int, length: int, embed: int) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(codes, wide), nn.Parameter(torch.randn(1, length, wide))
        self.cond_proj = nn.Linear(embed, wide)
        self.blocks = nn.Sequential(*[Layer(wide, heads, length) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, codes)

    def forward(self, codes: Tensor, embedding: Tensor) -> Tensor:
        x = torch.cat([self.cond_proj(embedding).unsqueeze(1), self.tok_emb(codes)], dim=1)
        return self.head(self.norm(self.blocks(x + self.pos_emb[:, : x.shape[1]])))
