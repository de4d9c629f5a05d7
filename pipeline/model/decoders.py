"""The light modules around the LM: picture tokens in, masks and CLIP embeddings out.

The mask decoder is transformers' CLIPSegDecoder, from which the paper's authors derived theirs: FiLM by the task
token's state over CLIP features of several layers, deepest first. The modules cast their input to their own dtype, so
a bf16 backbone works with fp32 decoders and the other way round.

Shape suffixes: B batch, M masks, N patches, C CLIP width, D hidden, E embedding width, S mask side.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPSegConfig
from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder

from pipeline.model.initialise import Resettable, normal, reset_layers, write


class CastLinear(nn.Linear):
    """A linear layer that casts its input to its weight's dtype (its own weight: safe under ZeRO-3)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class CastLayerNorm(nn.LayerNorm):
    """A LayerNorm that casts its input to its weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class ImageProjector(Resettable):
    """CLIP tokens -> picture tokens of the LM: merge x merge patches are concatenated, normalised and projected."""

    def __init__(
        self, width: int, hidden: int, *, merge: int = 1, use_cls: bool = True, output_rms: float = 0.02
    ) -> None:
        """output_rms: root mean square of a fresh projector's output; the LM's embeddings have about 0.02."""
        super().__init__()
        if merge < 1:
            raise ValueError(f"image_merge must be at least 1, not {merge}")
        self.merge, self.use_cls, self.output_rms = merge, use_cls, output_rms
        self.norm = CastLayerNorm(merge * merge * width)
        self.patches = CastLinear(merge * merge * width, hidden)
        # With merged patches the CLS token is narrower than they are and needs a way of its own.
        self.cls_norm = CastLayerNorm(width) if use_cls and merge > 1 else None
        self.cls = CastLinear(width, hidden) if use_cls and merge > 1 else None

    def reset(self, name: str, seed: int) -> None:
        """Weights N(0, output_rms² / fan_in), biases 0: picture tokens start at the scale of the LM's embeddings."""
        reset_layers(self, name, seed)
        for kind, layer in (("patches", self.patches), ("cls", self.cls)):
            if layer is not None:
                std = self.output_rms / math.sqrt(layer.in_features)
                write(layer.weight, normal(f"{name}.{kind}.weight", seed, layer.weight.shape, std))
                write(layer.bias, 0.0)

    def n_tokens(self, grid: int) -> int:
        """Picture tokens for grid x grid patches. Raises ValueError when merge does not divide the grid."""
        if grid % self.merge:
            raise ValueError(f"image_merge {self.merge} does not divide the vision tower's {grid} x {grid} patches")
        return (grid // self.merge) ** 2 + int(self.use_cls)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, n_tokens, D] of CLIP tokens [B, 1+N, C], CLS first in both (when it is used), then row by row."""
        batch, n, width = tokens.shape
        grid, m = math.isqrt(n - 1), self.merge
        assert grid * grid == n - 1 and grid % m == 0, (n, m)
        if m == 1:
            return self.patches(self.norm(tokens if self.use_cls else tokens[:, 1:]))
        squares = tokens[:, 1:].reshape(batch, grid // m, m, grid // m, m, width).permute(0, 1, 3, 2, 4, 5)
        out = self.patches(self.norm(squares.reshape(batch, (grid // m) ** 2, m * m * width)))
        if self.cls is None or self.cls_norm is None:
            return out
        return torch.cat([self.cls(self.cls_norm(tokens[:, :1])), out], dim=1)


class MaskDecoder(Resettable):
    """CLIPSegDecoder over `layers` CLIP taps, conditioned on the state that predicts <OBJ-i>."""

    def __init__(
        self,
        width: int,
        hidden: int,
        grid: int,
        *,
        dim: int = 64,
        layers: int = 3,
        heads: int = 4,
        upsample: int = 16,
    ) -> None:
        """upsample: the patch size p to decode for; the mask's side is grid * (p // 4)², 144 for ViT-L/14 at 224 px."""
        super().__init__()
        if upsample < 4:
            raise ValueError(f"mask_upsample must be at least 4 (its quarter is the kernel's side), not {upsample}")
        if dim % heads:
            raise ValueError(f"mask_dim {dim} is not a multiple of the decoder's {heads} heads")
        vision = {"hidden_size": width, "patch_size": upsample, "num_attention_heads": 1, "num_hidden_layers": 1}
        config = CLIPSegConfig(
            vision_config=vision,
            projection_dim=hidden,
            reduce_dim=dim,
            extract_layers=list(range(layers)),
            # The state conditions the sum of all taps: conditioned at the first one, as CLIPSeg does, it is drowned by
            # those added later.
            conditional_layer=layers - 1,
            use_complex_transposed_convolution=True,
            decoder_num_attention_heads=heads,
            decoder_intermediate_size=4 * dim,
        )
        # The decoder stands alone here, so nobody else chooses its attention; unset, transformers warns at every start.
        config.vision_config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        self.grid, self.layers, self.mask_size = grid, layers, grid * (upsample // 4) ** 2
        # CLIP's inner activations grow with depth and are far larger than the decoder's own.
        self.norms = nn.ModuleList([CastLayerNorm(width) for _ in range(layers)])
        self.decoder = CLIPSegDecoder(config)

    def reset(self, name: str, seed: int) -> None:
        """PyTorch's default rule. FiLM's factor starts around 0, not 1: features that pass whatever the state says make
        the decoder settle on the mask of all objects at once, and it stays there."""
        reset_layers(self, name, seed)

    def forward(self, taps: tuple[Tensor, ...], states_MD: Tensor) -> Tensor:
        """Logits [M,S,S] of the taps ([M,1+N,C] each, CLS first, shallow to deep) and the states [M,D]."""
        assert len(taps) == self.layers, f"{len(taps)} taps for a decoder of {self.layers} layers"
        assert taps[0].shape[1] == self.grid**2 + 1, (taps[0].shape, self.grid)
        # A weight's dtype, never a buffer's: DeepSpeed's bf16 casts parameters alone. Under ZeRO-3 the dtype of a
        # weight that is not gathered is still right.
        dtype = self.decoder.film_mul.weight.dtype
        normalised = tuple(norm(tap) for norm, tap in zip(self.norms, taps, strict=True))
        return self.decoder(normalised, states_MD.to(dtype)).logits


class ClipHead(Resettable):
    """Wgen: the state that predicts <GEN> -> the CLIP embedding of the picture to draw (Eq. 9)."""

    def __init__(self, hidden: int, embed: int, *, kind: str = "linear", mlp_width: int = 512) -> None:
        """kind: "linear", the paper's matrix; "mlp", four linear layers as in the released code, mlp_width wide."""
        super().__init__()
        if kind == "linear":
            self.layers = nn.Sequential(CastLinear(hidden, embed, bias=False))
        elif kind == "mlp":
            widths = (hidden, mlp_width, mlp_width, mlp_width)
            steps = [m for a, b in itertools.pairwise(widths) for m in (CastLinear(a, b), nn.GELU())]
            self.layers = nn.Sequential(*steps, CastLinear(mlp_width, embed))
        else:
            raise ValueError(f"clip_head must be 'linear' or 'mlp', not {kind!r}")

    def reset(self, name: str, seed: int) -> None:
        """PyTorch's default rule."""
        reset_layers(self, name, seed)

    def forward(self, states_GD: Tensor) -> Tensor:
        """[G,E] of the states [G,D]."""
        return self.layers(states_GD)
