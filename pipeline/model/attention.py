"""PyTorch's attention sample by sample: causal within each, for packed rows, without a mask of rows by rows.

Registered with transformers as "sdpa_varlen". FlashAttention's varlen functions do the same in one kernel; this needs
no package and runs everywhere. Under a mask, a row of n samples costs about n times the products that count.

Shape suffixes: B rows, T tokens, A heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA_VARLEN = "sdpa_varlen"


def attend_by_sample(
    module: nn.Module,
    q_BATK: Tensor,
    k_BATK: Tensor,
    v_BATK: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B,T,A,K] causal attention within each of the runs of tokens that lie end to end in the rows.

    sample_lengths: tokens of each run, which add up to B x T; without them (decoding) this is transformers' "sdpa".
    Raises ValueError for a run that is longer than the model's sliding window.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, q_BATK, k_BATK, v_BATK, attention_mask, **options)
    if sliding_window is not None and max(sample_lengths) > sliding_window:
        raise ValueError(
            f"a sample of {max(sample_lengths)} tokens is longer than the model's sliding window of {sliding_window}: "
            "take --attn sdpa or a smaller --max_length"
        )
    rows, width = q_BATK.shape[0], q_BATK.shape[2]
    split = [
        x.transpose(0, 1).flatten(1, 2).unsqueeze(0).split(list(sample_lengths), dim=2)
        for x in (q_BATK, k_BATK, v_BATK)
    ]
    parts = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in zip(*split, strict=True)]
    return torch.cat(parts, dim=1).unflatten(1, (rows, width)).squeeze(0), None


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """None where nothing is masked but the future: `attend_by_sample` then goes by the lengths."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options)


AttentionInterface.register(SDPA_VARLEN, attend_by_sample)
AttentionMaskInterface.register(SDPA_VARLEN, _mask)
