"""The frozen LM's matrices in 4 or 8 bits, by bitsandbytes through transformers; what is trained stays as it is.

nf4: 4-bit NormalFloat in blocks of 64 with an fp32 scale each (Dettmers et al., arXiv 2305.14314), made bf16 for every
product. int8: LLM.int8() (arXiv 2208.07339), one scale to a row. Embeddings and the output head keep their precision.
The files on disk are those of the unquantised model: its fingerprint, and checkpoints made beside it, are the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

NEEDED = ("bitsandbytes", "accelerate")


def check(quant: str, stage: int = 0) -> None:
    """Raises ValueError for a quantised base under ZeRO-3, or without the packages for it."""
    if quant == "none":
        return
    if stage == 3:
        raise ValueError(
            f"--base_quant {quant} does not work with ZeRO-3: it would cut bitsandbytes' packed weights up and gather "
            "them without the scales that unpack them. Take ds_configs/z2.json: a quantised base fits on each GPU"
        )
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"--base_quant {quant} needs {' and '.join(missing)}: pip install -e '.[quant]'")


def options(quant: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments for from_pretrained that quantise the weights as they are loaded, on `device`; none for "none"."""
    if quant == "none":
        return {}
    if quant == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        assert quant == "int8", quant
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": device}}


def elements(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for, also one that ZeRO-3 cut up or bitsandbytes packed."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return packed.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
