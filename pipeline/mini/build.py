"""Makes the mini world's foundation models, and judges them on held-out scenes.

Four stages, each saved with a `gate.json` (settings, seconds, figures) as soon as it is done, so that a build that was
stopped goes on with the next stage: llm, clip, vqgan, prior. Weights are stored as float16 safetensors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from pipeline.mini import contrast, language, pictures, training
from pipeline.mini.scenes import scene_at
from pipeline.model.prior import ImagePrior
from pipeline.model.vision import VisionTower
from pipeline.model.vqgan import VQGAN

GATES = {
    "llm": {"caption_object_f1": 0.95},
    "clip": {
        "r1_of_400": 0.85,
        "beats_size_swap": 0.95,
        "beats_colour_swap": 0.95,
        "beats_shape_swap": 0.95,
    },
    "vqgan": {"text_r1_of_50": 0.8},
    "prior": {"text_r1_of_50": 0.6},
}
"""What each model must reach on held-out scenes before anything is built on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSize:
    """Steps of each pretraining, and the numbers of scenes: to train on and held out."""

    llm_steps: int = 3600
    clip_steps: int = 1400
    vqgan_steps: int = 1000
    prior_steps: int = 2800
    llm_pool: int = 40_000
    picture_pool: int = 24_000
    held_out: int = 400


SMOKE = BuildSize(llm_steps=3, clip_steps=3, vqgan_steps=4, prior_steps=3, llm_pool=64, picture_pool=128, held_out=60)
"""A build that only shows that every stage runs; its models fail the gates."""


def halve(path: Path) -> None:
    """Rewrites a safetensors file with its floating-point tensors as float16."""
    tensors = load_file(path)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, path, {"format": "pt"})


def load_clip(folder: Path) -> VisionTower:
    return VisionTower.from_local(f"local-dir:{folder / 'clip'}").to(training.device())


class Builder:
    """Runs the stages into one folder.

    Args:
        out: the folder of the models, one sub-folder per stage.
        size: steps and scenes.
        seed: of scenes, initial weights and batches.
    """

    def __init__(self, out: Path, size: BuildSize, seed: int) -> None:
        self.out, self.size, self.seed = out, size, seed
        self._pools: dict[str, training.ScenePool] = {}

    def build(self) -> None:
        """Every stage that is not there yet, in order."""
        size, seed = self.size, self.seed
        self._stage(
            "llm",
            "model.safetensors",
            lambda to: language.pretrain_llm(to, steps=size.llm_steps, pool=size.llm_pool, seed=seed),
        )
        self._stage(
            "clip",
            "open_clip_model.safetensors",
            lambda to: contrast.pretrain_clip(to, self._train, self._held_out, steps=size.clip_steps, seed=seed),
        )
        self._stage(
            "vqgan",
            "model.safetensors",
            lambda to: pictures.pretrain_vqgan(
                to, self._train, self._held_out, load_clip(self.out), steps=size.vqgan_steps, seed=seed
            ),
        )
        self._stage(
            "prior",
            "model.safetensors",
            lambda to: pictures.pretrain_prior(
                to, self._train, self._held_out, load_clip(self.out), self._vqgan(), steps=size.prior_steps, seed=seed
            ),
        )

    def _stage(self, name: str, weights: str, train: Callable[[Path], dict[str, float]]) -> None:
        folder = self.out / name
        record = folder / "gate.json"
        if record.is_file():
            print(f"{name}: already in {folder} (delete the folder to make it again)")
            return
        start = time.perf_counter()
        train(folder)
        halve(folder / weights)
        settings = {"seed": self.seed, **asdict(self.size)}
        figures = judge(self.out, (name,), self.size.held_out, self.seed)[name]
        seconds = round(time.perf_counter() - start)
        record.write_text(json.dumps({"settings": settings, "seconds": seconds, "figures": figures}, indent=1) + "\n")

    def _pool(self, split: str, count: int) -> training.ScenePool:
        if split not in self._pools:
            self._pools[split] = training.ScenePool(split, count, pictures.VQGAN_CONFIG.resolution, self.seed)
        return self._pools[split]

    @property
    def _train(self) -> training.ScenePool:
        return self._pool("train", self.size.picture_pool)

    @property
    def _held_out(self) -> training.ScenePool:
        return self._pool("valid", self.size.held_out)

    def _vqgan(self) -> VQGAN:
        return VQGAN.load(self.out / "vqgan").to(training.device())


def judge(folder: Path, stages: tuple[str, ...], held_out: int, seed: int) -> dict[str, dict[str, float]]:
    """The gates' figures of the models in `folder`, on `held_out` scenes of the validation split."""
    dev = training.device()
    found: dict[str, dict[str, float]] = {}
    if "llm" in stages:
        tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        llm: Any = LlamaForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32)
        llm.to(dev)
        scenes = [scene_at("valid", i, seed) for i in range(min(200, held_out))]
        found["llm"] = language.caption_gate(llm, tokenizer, scenes)
    if set(stages) & {"clip", "vqgan", "prior"}:
        pool = training.ScenePool("valid", held_out, pictures.VQGAN_CONFIG.resolution, seed)
        clip = load_clip(folder)
        if "clip" in stages:
            found["clip"] = contrast.clip_gate(clip.model, clip.tokenizer.tokenizer, pool)  # type: ignore[attr-defined]
        if set(stages) & {"vqgan", "prior"}:
            vqgan = VQGAN.load(folder / "vqgan").to(dev)
            if "vqgan" in stages:
                found["vqgan"] = pictures.vqgan_gate(vqgan, pool, clip)
            if "prior" in stages:
                found["prior"] = pictures.prior_gate(ImagePrior.load(folder / "prior").to(dev), pool, clip, vqgan)
    return found


def failed_gates(figures: dict[str, dict[str, float]]) -> list[str]:
    """One line for each figure that misses its gate."""
    return [
        f"{stage}: {name} is {figures[stage].get(name, float('nan')):.3f}, the gate is {floor}"
        for stage, floors in GATES.items()
        if stage in figures
        for name, floor in floors.items()
        if not figures[stage].get(name, 0.0) >= floor
    ]


_CARD = """---
license: mit
library_name: neural-tuning
---
# Foundation models of the mini world

Four small models, trained from scratch on drawn scenes of the mini world (`pipeline/mini`) by

    python pipeline/build_mini.py --from_scratch

and frozen: they stand where LLaMA-2, CLIP ViT-L/14, a VQGAN and CLIP-GEN's transformer stand in the real pipeline, and
are of the same classes. Weights are float16 safetensors. Licence: MIT, as the repository; the data is drawn by code.

| folder | class | parameters | trained on | minutes |
|---|---|---|---|---|
{rows}

## Gates

Measured on scenes of the validation split, which shares no scene with the training split, from the stored weights
(`python pipeline/build_mini.py` measures them again):

| model | figure | measured | gate |
|---|---|---|---|
{gates}

## What the pretraining borrows

- **LLM**: it never saw a picture, but it read the *text map* of scenes: 16 cells, each named by a coordinate word
  (`c00 _ c01 small-red-circle ...`), followed by captions, referring and reasoning dialogues in the prompts of
  `pipeline/data/prompts.py`. Short lookup questions about the map ("What is at c11?") taught it to find things there.
  Where a tuned answer has a mask token, these answers have the word of the object's cell ("the small red circle c01"):
  the state that follows a name holds the place, and tuning replaces the word by the token. The mini preset puts the
  same coordinate words between the image tokens. So the LLM knows the mini world's language and what its questions
  mean; what tuning adds is sight, the task tokens and the decoders.
  Noise of {noise:.0%} of the embeddings' scale lay on the map words.
- **CLIP**: beside the contrastive loss it was trained against captions with one attribute swapped (hard negatives), and
  with a linear probe that reads off each map cell's patch tokens which object has its centre there (region
  supervision). The probe is not kept.
- **VQGAN**: reconstruction and codebook losses only (no discriminator, no perceptual network).
- **Image prior**: conditioned on the mini CLIP's embedding of the picture; noise of length {blur} on half of the
  conditions. Its gate is of pictures as the pipeline draws them: the best of 4 candidates by the mini CLIP.

They know nothing outside the mini world and are of no use there.
"""


def write_card(folder: Path) -> None:
    """Writes `README.md` from the stages' gate.json."""
    rows, gates = [], []
    trained_on = {
        "llm": ("LlamaForCausalLM", "{llm_steps} steps of 16 texts, {llm_pool} scenes"),
        "clip": ("open_clip ViT + text transformer", "{clip_steps} steps of 64 pictures, {picture_pool} scenes"),
        "vqgan": ("taming VQGAN", "{vqgan_steps} steps of 32 pictures, {picture_pool} scenes"),
        "prior": ("GPT-2 over VQGAN codes", "{prior_steps} steps of 64 pictures, {picture_pool} scenes"),
    }
    for stage, (kind, text) in trained_on.items():
        record = json.loads((folder / stage / "gate.json").read_text())
        weights = next((folder / stage).glob("*.safetensors"))
        count = sum(t.numel() for t in load_file(weights).values())
        minutes = round(record["seconds"] / 60)
        rows.append(f"| {stage} | {kind} | {count:,} | {text.format(**record['settings'])} | {minutes} |")
        for name, value in record["figures"].items():
            floor = GATES[stage].get(name)
            gates.append(f"| {stage} | {name} | {value:.3f} | {'' if floor is None else f'>= {floor}'} |")
    card = _CARD.format(
        rows="\n".join(rows), gates="\n".join(gates), noise=language.MAP_NOISE, blur=pictures.CONDITION_NOISE
    )
    (folder / "README.md").write_text(card)
