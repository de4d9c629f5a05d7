"""Weights of taming-transformers (.ckpt) and CLIP-GEN (.pt) into the folders that `VQGAN.load` and `ImagePrior.load`
read.

Such files are pickles that name classes of their writers (Lightning's callbacks, OmegaConf's configurations). torch's
restricted unpickler reads them: it knows tensors and containers, and every other class that the file names stands for
an empty shell that runs nothing. What a file is shows in its tensors' names, its sizes in their shapes.

Formats: taming keeps its weights under "state_dict", with those of its loss beside them (`loss.*`, dropped); CLIP-GEN
under "model", with its discriminator (`discriminator.*`, dropped) and attention masks (`blocks.*.mask`, dropped).
CLIP-GEN's VQGAN is taming's network under other names, with attention as nn.MultiheadAttention and PyTorch's default
epsilon in the norms; its transformer is GPT-2 with a bias in the head.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.prior import ImagePrior, PriorConfig
from pipeline.model.vqgan import VQGAN, VQGANConfig

Weights = dict[str, Tensor]
_DROPPED = ("loss.", "discriminator.")
_HEAD_WIDTH = 64  # CLIP-GEN's medium (1024 wide, 16 heads) and large (1280, 20)


class _Shell:
    """Stands for a class of the file's writer; takes any state and does nothing with it."""

    def __new__(cls, *_arguments: Any) -> _Shell:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def _mapping(*_arguments: Any) -> OrderedDict[Any, Any]:
    """Stands for collections.defaultdict, which is filled after it is made."""
    return OrderedDict()


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made of a file: the model, the names of its format, tensors dropped by prefix."""

    model: VQGAN | ImagePrior
    format: str
    dropped: dict[str, int]


def read_weights(path: Path) -> Weights:
    """The tensors of a .ckpt or .pt file by name; nothing of what else it pickles is run.

    Raises ValueError for a file that torch.save did not write, that pickles something dangerous, or without weights.
    """
    try:
        shells: list[Any] = [
            (_mapping if name == "collections.defaultdict" else _Shell, name)
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
        ]
        with torch.serialization.safe_globals(shells):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # torch's own first lines advise to switch the restriction off.
        why = (str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [""])[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of torch.save (version 1.6 or later): {why}. A file of an older "
            "torch has to be saved anew with today's"
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    weights = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not weights:
        raise ValueError(f"{path} holds no tensors, neither by themselves nor under 'state_dict' or 'model'")
    return weights


def convert(path: Path, *, resolution: int = 256) -> Converted:
    """The model whose weights a file holds, in evaluation mode.

    resolution: side in pixels of the pictures a VQGAN was trained on; its weights do not tell.
    Raises ValueError for an unknown format, and naming every tensor that is missing, left over or of another shape.
    """
    weights = read_weights(path)
    dropped = Counter(prefix for name in weights for prefix in _DROPPED if name.startswith(prefix))
    dropped.update("mask" for name in weights if name.endswith(".mask"))
    kept = {k: v.float() for k, v in weights.items() if not k.startswith(_DROPPED) and not k.endswith(".mask")}
    model: VQGAN | ImagePrior
    if "quantize.embed.weight" in kept:
        raise ValueError(f"{path} is a VQGAN with Gumbel quantisation; only plain codebooks are supported")
    if "quantize.embedding.weight" in kept:
        kind, model = "taming VQGAN", VQGAN(_vqgan_config(kept, resolution, norm_eps=1e-6))
    elif "quantizer.embedding.weight" in kept:
        kept = _clipgen_vqgan(kept)
        kind, model = "CLIP-GEN VQGAN", VQGAN(_vqgan_config(kept, resolution, norm_eps=1e-5))
    elif "cond_proj.weight" in kept:
        kept = _clipgen_prior(kept)
        kind, model = "CLIP-GEN transformer", ImagePrior(_prior_config(kept))
    else:
        raise ValueError(
            f"{path} is neither a VQGAN of taming-transformers nor a VQGAN or transformer of CLIP-GEN; it holds "
            f"{', '.join(sorted(kept)[:5])}, ..."
        )
    _gate(model, kept, f"{path} ({kind})")
    model.load_state_dict(kept)
    return Converted(model.eval().requires_grad_(False), kind, dict(dropped))


def _gate(model: nn.Module, weights: Weights, what: str) -> None:
    wanted = model.state_dict()
    faults = [f"missing {name}" for name in sorted(wanted.keys() - weights.keys())]
    faults += [f"unexpected {name}" for name in sorted(weights.keys() - wanted.keys())]
    faults += [
        f"{name} is {list(weights[name].shape)} instead of {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & weights.keys())
        if wanted[name].shape != weights[name].shape
    ]
    if faults:
        raise ValueError(f"{what} does not fit: {'; '.join(faults)}")


def _numbers(weights: Weights, prefix: str) -> list[int]:
    """The numbers that follow a prefix in the tensors' names, in order."""
    return sorted({int(k[len(prefix) :].split(".")[0]) for k in weights if k.startswith(prefix)})


def _vqgan_config(weights: Weights, resolution: int, norm_eps: float) -> VQGANConfig:
    """taming's sizes out of its shapes."""
    try:
        ch = weights["encoder.conv_in.weight"].shape[0]
        levels = _numbers(weights, "encoder.down.")
        widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
        n_embed, embed_dim = weights["quantize.embedding.weight"].shape
        return VQGANConfig(
            resolution=resolution,
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=len(_numbers(weights, "encoder.down.0.block.")),
            attn_resolutions=tuple(
                resolution // 2**level for level in levels if _numbers(weights, f"encoder.down.{level}.attn.")
            ),
            z_channels=weights["quant_conv.weight"].shape[1],
            embed_dim=embed_dim,
            n_embed=n_embed,
            norm_eps=norm_eps,
        )
    except KeyError as error:
        raise ValueError(f"a VQGAN without the tensor {error}: the file is not whole") from error


_BLOCK = {"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.6": "conv2", "shortcut": "nin_shortcut"}


def _clipgen_vqgan(weights: Weights) -> Weights:
    """CLIP-GEN's VQGAN in taming's names. Its blocks stand in one row: which level each is of follows from its kind."""
    named: Weights = {}

    def put(old: str, new: str) -> None:
        for part in ("weight", "bias"):
            if (tensor := weights.pop(f"{old}.{part}", None)) is not None:
                named[f"{new}.{part}"] = tensor

    def put_attention(old: str, new: str) -> None:
        put(f"{old}.norm", f"{new}.norm")
        for part in ("weight", "bias"):
            if (joint := weights.pop(f"{old}.attn.in_proj_{part}", None)) is not None:
                named.update({f"{new}.{n}.{part}": t for n, t in zip("qkv", joint.chunk(3), strict=True)})
            if (out := weights.pop(f"{old}.attn.out_proj.{part}", None)) is not None:
                named[f"{new}.proj_out.{part}"] = out
        for name in ("q", "k", "v", "proj_out"):
            if (key := f"{new}.{name}.weight") in named:
                # A linear map of the channels is a convolution of one pixel.
                named[key] = named[key][..., None, None]

    def put_block(old: str, new: str) -> None:
        for before, after in _BLOCK.items():
            put(f"{old}.{before}", f"{new}.{after}")

    def put_row(old: str, new: str, levels: list[int], change: str) -> None:
        level, blocks, attentions = 0, 0, 0
        for number in _numbers(weights, f"{old}."):
            here, place = f"{old}.{number}", f"{new}.{levels[level]}"
            if f"{here}.conv.weight" in weights:
                put(f"{here}.conv", f"{place}.{change}.conv")
                level, blocks, attentions = level + 1, 0, 0
            elif f"{here}.norm.weight" in weights:
                put_attention(here, f"{place}.attn.{attentions}")
                attentions += 1
            else:
                put_block(here, f"{place}.block.{blocks}")
                blocks += 1

    levels = list(
        range(1 + sum(f"encoder.down.{n}.conv.weight" in weights for n in _numbers(weights, "encoder.down.")))
    )
    put_row("encoder.down", "encoder.down", levels, "downsample")
    put_row("decoder.up", "decoder.up", levels[::-1], "upsample")
    for side in ("encoder", "decoder"):
        put(f"{side}.conv_in", f"{side}.conv_in")
        put_block(f"{side}.mid.0", f"{side}.mid.block_1")
        put_attention(f"{side}.mid.1", f"{side}.mid.attn_1")
        put_block(f"{side}.mid.2", f"{side}.mid.block_2")
        put(f"{side}.final.0", f"{side}.norm_out")
        put(f"{side}.final.2", f"{side}.conv_out")
    put("encoder.final.3", "quant_conv")
    put("decoder.quant_conv_in", "post_quant_conv")
    put("quantizer.embedding", "quantize.embedding")
    # What is left has no place in taming's network: the gate names it.
    return named | weights


_LAYER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "self_attn.in_proj": "attn.c_attn",
    "self_attn.out_proj": "attn.c_proj",
    "linear1": "mlp.c_fc",
    "linear2": "mlp.c_proj",
}
_OUTER = {"tok_emb": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"}


def _clipgen_prior(weights: Weights) -> Weights:
    """CLIP-GEN's transformer in the names of `ImagePrior`."""
    named: Weights = {}
    for old, tensor in weights.items():
        stem, _, part = old.rpartition(".")
        if old.endswith(("in_proj_weight", "in_proj_bias")):
            stem, part = old.rsplit("_", 1)
        if stem.startswith("blocks."):
            _, number, inner = stem.split(".", 2)
            place = _LAYER.get(inner.removeprefix("encoder."))
            new = f"transformer.transformer.h.{number}.{place}.{part}" if place else old
            # GPT-2's linear maps are stored the other way round.
            named[new] = tensor.T if place and part == "weight" and not place.startswith("ln_") else tensor
        elif stem in _OUTER:
            named[f"transformer.{_OUTER[stem]}.{part}"] = tensor
        elif stem == "cond_proj":
            named[f"condition.{part}"] = tensor
        elif old == "pos_emb":
            named["transformer.transformer.wpe.weight"] = tensor[0]
        else:
            named[old] = tensor
    return named


def _prior_config(weights: Weights) -> PriorConfig:
    try:
        n_codes, width = weights["transformer.transformer.wte.weight"].shape
        return PriorConfig(
            embed_dim=weights["condition.weight"].shape[1],
            n_codes=n_codes,
            n_tokens=weights["transformer.transformer.wpe.weight"].shape[0],
            width=width,
            layers=len(_numbers(weights, "transformer.transformer.h.")),
            heads=width // _HEAD_WIDTH,
            head_bias=True,
        )
    except KeyError as error:
        raise ValueError(f"a transformer without the tensor {error}: the file is not whole") from error
