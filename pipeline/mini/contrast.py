"""Pretraining of the mini CLIP: an open_clip model on scenes and captions, with hard negatives and region supervision.

Three losses: the symmetric contrast of pictures and captions in a batch; against each picture, a caption of its own
scene with one attribute of one object swapped; and, per cell of the text map, what object has its centre there (size,
colour, shape, read by a linear probe from the last block's patch tokens; the probe is thrown away). The last two are
what a small CLIP needs to encode shapes and places; the model's card declares them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.mini import grammar, training
from pipeline.mini.grammar import COLOURS, GRID, SHAPES, SIZES
from pipeline.mini.scenes import Scene
from pipeline.mini.tokenizer import build_tokenizer
from pipeline.model.vision import new_clip

CONTEXT = 48
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 8,
        "width": 192,
        "layers": 6,
        "head_width": 32,
        "mlp_ratio": 4.0,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": len(grammar.VOCABULARY),
        "width": 128,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "mini",
        "pool_type": "eos",
        "eos_id": 2,
        "pad_id": 0,
    },
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SWAPS = ("size", "colour", "shape", "place")
SWAP_SHARES = (0.2, 0.15, 0.35, 0.3)
"""How often each attribute is the one swapped: the hardest to see, shape and place, most."""
_VALUES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}


def normalise(pictures: Tensor) -> Tensor:
    """uint8 [B,3,S,S] -> CLIP-normalised float."""
    shape = (1, 3, 1, 1)
    return (pictures.float() / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


def swapped_caption(scene: Scene, kind: str, rng: np.random.Generator) -> str:
    """The caption with one attribute (or the place) of one object changed, and everything else as it was."""
    i = int(rng.integers(len(scene.objects)))
    o = scene.objects[i]
    if kind == "place":
        side = 128 / 2
        x, y = (o.x, (o.y + side) % 128) if rng.random() < 0.5 else ((o.x + side) % 128, o.y)
        changed = replace(o, x=x, y=y)
    else:
        others = [v for v in _VALUES[kind] if v != getattr(o, kind)]
        changed = replace(o, **{kind: others[rng.integers(len(others))]})  # type: ignore[arg-type]
    objects = (*scene.objects[:i], changed, *scene.objects[i + 1 :])
    return replace(scene, objects=objects).caption()


def cell_targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """Per attribute, class ids [B, GRID*GRID] of the object centred in each cell; -100 where there is none.

    "present" is 1 where an object's centre lies, else 0.
    """
    targets = {kind: torch.full((len(scenes), GRID * GRID), -100) for kind in _VALUES}
    targets["present"] = torch.zeros(len(scenes), GRID * GRID, dtype=torch.long)
    for b, scene in enumerate(scenes):
        for o in scene.objects:
            targets["present"][b, o.cell] = 1
            for kind, values in _VALUES.items():
                targets[kind][b, o.cell] = values.index(getattr(o, kind))
    return targets


class CellProbe(nn.Module):
    """Linear classifiers over each map cell's four patch tokens; used in pretraining only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.heads = nn.ModuleDict({k: nn.Linear(4 * width, len(v)) for k, v in _VALUES.items()})
        self.heads["present"] = nn.Linear(4 * width, 2)

    def forward(self, grid_BCHW: Tensor) -> dict[str, Tensor]:
        """Patch tokens on their grid [B,C,8,8] -> logits [B,16,classes] per attribute."""
        cells = F.unfold(grid_BCHW.float(), kernel_size=2, stride=2).transpose(1, 2)
        cells = self.norm(cells)
        return {k: head(cells) for k, head in self.heads.items()}


def pretrain_clip(
    out: Path,
    pool: training.ScenePool,
    held_out: training.ScenePool,
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 3.0e-3,
) -> dict[str, float]:
    """Trains the CLIP and saves it to `out` in open_clip's local-dir form; returns the gate's figures."""
    torch.manual_seed(seed)
    dev = training.device()
    model = new_clip(MODEL_CFG).to(dev)
    tokenizer = build_tokenizer(add_special_tokens=True)
    probe = CellProbe(MODEL_CFG["vision_cfg"]["width"]).to(dev)
    rng = np.random.default_rng([seed, 2])
    batches = pool.batches(batch, seed)
    visual: Any = model.visual

    def step_loss(_: int) -> dict[str, Tensor]:
        index = next(batches)
        scenes = [pool.scenes[i] for i in index]
        wrong = [swapped_caption(s, SWAPS[rng.choice(len(SWAPS), p=SWAP_SHARES)], rng) for s in scenes]
        pictures = normalise(pool.pictures[index]).to(dev)
        texts = tokenize(tokenizer, [s.caption() for s in scenes] + wrong).to(dev)
        with training.autocast():
            seen = visual.forward_intermediates(pictures, indices=[visual.transformer.layers - 1], output_fmt="NCHW")
            image_BE = F.normalize(seen["image_features"].float(), dim=-1)
            text_NE = F.normalize(model.encode_text(texts).float(), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        right_BE, wrong_BE = text_NE.chunk(2)
        logits_BB = scale * image_BE @ right_BE.T
        hard_B = scale * (image_BE * wrong_BE).sum(1, keepdim=True)
        diagonal = torch.arange(len(scenes), device=dev)
        contrast = F.cross_entropy(torch.cat([logits_BB, hard_B], 1), diagonal) + F.cross_entropy(logits_BB.T, diagonal)
        margin = F.cross_entropy(torch.cat([logits_BB.diagonal()[:, None], hard_B], 1), torch.zeros_like(diagonal))
        found = probe(seen["image_intermediates"][0])
        wanted = cell_targets(scenes)
        region = torch.stack(
            [F.cross_entropy(found[k].flatten(0, 1), wanted[k].flatten().to(dev), ignore_index=-100) for k in found]
        ).sum()
        return {"contrast": 0.5 * contrast, "swaps": margin, "cells": 0.5 * region}

    def check() -> dict[str, float]:
        save_clip(model, tokenizer, out)
        return clip_gate(model, tokenizer, held_out)

    model.train()
    training.fit("mini CLIP", nn.ModuleDict({"clip": model, "probe": probe}), steps, step_loss, lr=lr, check=check)
    return check()


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    """Captions -> ids [N, CONTEXT] with <s> and </s>, as open_clip's HFTokenizer makes them."""
    return tokenizer(texts, return_tensors="pt", max_length=CONTEXT, padding="max_length", truncation=True).input_ids


def save_clip(model: nn.Module, tokenizer, out: Path) -> None:
    """open_clip's local-dir form: open_clip_config.json, open_clip_model.safetensors, tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    tokenizer.save_pretrained(out)


@torch.no_grad()
def clip_gate(model: Any, tokenizer, held_out: training.ScenePool) -> dict[str, float]:
    """R@1 (picture -> caption) over the held-out pool, and how often the caption beats one with a swapped attribute."""
    training_mode = model.training
    model.eval()
    dev = next(model.parameters()).device
    rng = np.random.default_rng(6)

    def encode_texts(texts: list[str]) -> Tensor:
        parts = [model.encode_text(t.to(dev), normalize=True) for t in tokenize(tokenizer, texts).split(100)]
        return torch.cat(parts)

    pictures = normalise(held_out.pictures).split(100)
    image_NE = torch.cat([model.encode_image(p.to(dev), normalize=True) for p in pictures])
    text_NE = encode_texts([s.caption() for s in held_out.scenes])
    best = (image_NE @ text_NE.T).argmax(1)
    figures = {f"r1_of_{len(held_out)}": (best.cpu() == torch.arange(len(held_out))).float().mean().item()}
    own = (image_NE * text_NE).sum(1)
    for kind in SWAPS:
        wrong_NE = encode_texts([swapped_caption(s, kind, rng) for s in held_out.scenes])
        figures[f"beats_{kind}_swap"] = (own > (image_NE * wrong_NE).sum(1)).float().mean().item()
    model.train(training_mode)
    return figures
