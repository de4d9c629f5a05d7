"""What a run will need at least: bytes of memory per rank and bytes of disk. A rough sum, before anything is loaded.

Per rank, with N the LM's parameters, P those that are trained, W ranks, s bytes per weight (2 in bf16, 4 in fp32):

    fixed        N s (under ZeRO-3 N s / W; a quantised base has its own s); P s weights, P s gradients; 12 P / W for
                 AdamW's fp32 state; CLIP in fp32
    activations  with recomputation one input per layer, tokens x hidden x s, and one layer's working set; without it
                 each layer's working set: 34 tokens x hidden bytes at 2 bytes per value (Korthikanti et al., 2022,
                 arXiv 2205.05198, equation 2, less the attention scores that flash attention does not keep)

Left out: the CUDA context, NCCL's buffers, fragmentation, ZeRO-3's gathered layers. So what does not fit by this sum
does not fit at all; what fits may still be too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CLIP_WIDTH, _CLIP_EMBEDDING, _MASK_DECODER = 1024, 768, 1.5e6


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes. `fixed` and `activations` per rank; `checkpoint` of one on disk."""

    fixed: float
    activations: float
    checkpoint: float


def trained_parameters(
    config: Mapping[str, Any], *, z_dim: int, projections: str, first_layer: int, max_objects: int, all_rows: bool
) -> float:
    """About how many parameters are trained beside the LM of this config.json, with a CLIP ViT-L/14."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    side = config.get("head_dim") or hidden // heads
    widths = {"q": heads * side, "k": (config.get("num_key_value_heads") or heads) * side}
    widths["v"] = widths["k"]
    sparse = (layers - first_layer) * z_dim * (hidden + sum(widths[name] for name in projections))
    rows = 2 * hidden * (config["vocab_size"] + max_objects if all_rows else max_objects + 1)
    return sparse + rows + _CLIP_WIDTH * hidden + hidden * _CLIP_EMBEDDING + _MASK_DECODER


def estimate(
    config: Mapping[str, Any],
    *,
    base_parameters: float,
    trained: float,
    deepspeed: Mapping[str, Any],
    world_size: int,
    tokens: int,
    recompute: bool,
    clip_parameters: float = 0.0,
    base_bytes: float | None = None,
) -> Needs:
    """config: the LM's config.json; deepspeed: the resolved configuration; tokens: of one micro-batch.

    recompute: any recomputation in the backward pass. base_bytes: of a frozen weight that is quantised.
    """
    zero = deepspeed["zero_optimization"]
    size = 2 if deepspeed["bf16"]["enabled"] else 4
    base = base_parameters * (base_bytes or size)
    if zero["stage"] == 3:
        base = 0.0 if zero.get("offload_param") else base / world_size
    state = 0.0 if zero.get("offload_optimizer") else 12 * trained / world_size
    working = 34 * tokens * config["hidden_size"] * size / 2
    layers = config["num_hidden_layers"]
    kept = layers * tokens * config["hidden_size"] * size
    return Needs(
        fixed=base + 2 * trained * size + state + 4 * clip_parameters,
        activations=kept + working if recompute else layers * working,
        checkpoint=12 * trained,
    )
