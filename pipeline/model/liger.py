"""The one door to liger-kernel: its Triton kernels in the place of the LM's RMSNorm, RoPE and SwiGLU.

Each of them reads and writes its tensors once where PyTorch runs several operations, and SwiGLU keeps two of three
tensors for the backward pass (Hsu et al., arXiv 2410.10989). Its cross entropies are not taken. The one fused with the
linear layer saves the logits of all positions, where we have those of N labelled ones alone; it wants one matrix, and
ours is a frozen table with the new tokens' rows beside it, whose copy (V x D) would be larger than the logits (N x V)
that it saves. The other waits for the device three times a step and rounds each token's loss to bf16.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

APPLY = {name: f"apply_liger_kernel_to_{name}" for name in ("llama", "mistral", "qwen2", "qwen3")}
"""Liger's function for each kind of LM (config.json's model_type) that can be tuned."""


def check(device_type: str, model_type: str | None) -> None:
    """Raises ValueError where Liger's kernels cannot run: not on a GPU, not installed, or not for this LM."""
    if device_type != "cuda":
        raise ValueError(f"--liger true runs on a GPU only (Triton kernels), and this run is on {device_type}")
    if find_spec("liger_kernel") is None:
        raise ValueError("--liger true needs liger-kernel: pip install -e '.[gpu]'")
    if model_type not in APPLY:
        raise ValueError(
            f"--liger true knows {', '.join(APPLY)}, and --base is a {model_type or 'model of unknown type'}: leave it "
            "out"
        )


def patch(llm: Any) -> None:
    """Puts the kernels into a loaded LM, before its layers are tuned.

    Liger changes RoPE for all LMs of this kind in the process.
    """
    import liger_kernel.transformers as liger

    apply = getattr(liger, APPLY[llm.config.model_type])
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=llm)
