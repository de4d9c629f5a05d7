"""How the LM's layers are computed while training: the attention, Liger's kernels, torch.compile; what runs where."""

from __future__ import annotations

import os
import shutil

from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from pipeline.config import TrainArguments
from pipeline.model import liger
from pipeline.model.attention import SDPA_VARLEN
from pipeline.model.backbone import compile_layers


def check(train: TrainArguments, *, device_type: str, stage: int, quant: str, model_type: str | None) -> None:
    """Raises ValueError for a flag that cannot be followed here.

    stage: ZeRO's. quant: of the base. model_type: config.json's.
    """
    check_attention(train.attn, device_type, bf16=train.use_bf16(device_type))
    if train.liger:
        liger.check(device_type, model_type)
    if train.compile_layers:
        check_compile(train, device_type=device_type, stage=stage, quant=quant)


def check_attention(attn: str, device_type: str, *, bf16: bool) -> None:
    """Raises ValueError if --attn names an implementation that does not run here; bf16: what the LM computes in."""
    if attn in ("flash_attention_2", "flex_attention") and device_type != "cuda":
        raise ValueError(f"--attn {attn} trains on a GPU only, and this run is on {device_type}: take --attn sdpa")
    if attn == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError("--attn flash_attention_2 needs the package flash-attn: install it, or take --attn sdpa")
    if attn == "flash_attention_2" and not bf16:
        raise ValueError("--attn flash_attention_2 does not compute in fp32: take --bf16 true, or --attn sdpa")


def check_compile(train: TrainArguments, *, device_type: str, stage: int, quant: str) -> None:
    """Raises ValueError where the layers cannot be compiled."""
    if train.liger:
        raise ValueError("--liger true and --compile_layers true replace the same operations: take one of them")
    if stage == 3:
        raise ValueError(
            "--compile_layers true does not work with ZeRO-3, which gathers weights by hooks that a compiled layer "
            "would not call: take ds_configs/z2.json, or leave it out"
        )
    if quant != "none":
        raise ValueError(f"--compile_layers true is for an unquantised base, not --base_quant {quant}: leave one out")
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("--compile_layers true needs a C++ compiler (apt install g++, or CXX in the environment)")


def attention(attn: str, packing: bool) -> str | None:
    """--attn as transformers takes it, None for its own choice."""
    if attn == "auto":
        return SDPA_VARLEN if packing else None
    return attn


def patch(llm: PreTrainedModel, train: TrainArguments) -> None:
    """Puts Liger's kernels into a loaded LM, if they are asked for; before its layers are tuned."""
    if train.liger:
        liger.patch(llm)


def compiled(llm: PreTrainedModel, train: TrainArguments) -> None:
    """Compiles the layers of a tuned LM, if that is asked for."""
    if train.compile_layers:
        compile_layers(llm)
