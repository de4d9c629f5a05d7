"""What the four pretrainings of the mini world share: the step loop, the optimizers, batches of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from pipeline.mini.scenes import Scene, render, scene_at


def autocast() -> contextlib.AbstractContextManager[None]:
    """bf16 autocast where the processor multiplies bf16 natively (else it is slower than fp32), otherwise nothing."""
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    name: str,
    model: nn.Module,
    steps: int,
    step_loss: Callable[[int], dict[str, Tensor]],
    *,
    lr: float,
    weight_decay: float = 0.02,
    warmup: int = 100,
    check: Callable[[], dict[str, float]] | None = None,
    check_every: int = 250,
) -> None:
    """Muon for matrices inside the networks, AdamW for all else; warm-up, cosine decay, clipping at norm 1.

    Muon learns from about half as many scenes as AdamW here; embeddings, heads and norms are not for it.

    Args:
        name: the progress bar's label.
        model: everything that is trained.
        step_loss: step -> named losses; the optimizer follows their sum.
        check: saves what is trained so far and returns held-out figures, printed every `check_every` steps.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, lr, weight_decay)
    schedules = [get_cosine_schedule_with_warmup(o, min(warmup, steps // 10 + 1), steps) for o in optimizers]
    with tqdm(total=steps, desc=name, unit="step", mininterval=2) as bar:
        for step in range(steps):
            losses = step_loss(step)
            model.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix({k: f"{v.item():.3f}" for k, v in losses.items()})
            if check is not None and (step + 1) % check_every == 0 and step + 1 < steps:
                bar.write(f"{name} step {step + 1}: " + " ".join(f"{k} {v:.3f}" for k, v in check().items()))


_OUTER = ("embed", "token", "position", "head", "proj_out", "conv", "codebook", "wte", "wpe", "probe")


def make_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon over the weight matrices of the inner layers, AdamW over the rest."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_inner = parameter.ndim == 2 and not any(part in name for part in _OUTER)
            (inner if is_inner else outer).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    ]
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class ScenePool:
    """The first `size` scenes of a split with their pictures at `side` pixels, uint8 [size, 3, side, side]."""

    def __init__(self, split: str, size: int, side: int, seed: int) -> None:
        self.scenes: list[Scene] = []
        self.pictures = torch.empty(size, 3, side, side, dtype=torch.uint8)
        for i in tqdm(range(size), desc=f"drawing {split} scenes", unit="scene", mininterval=2):
            scene = scene_at(split, i, seed)
            small = Image.fromarray(render(scene)).resize((side, side), Image.Resampling.BICUBIC)
            self.pictures[i] = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
            self.scenes.append(scene)

    def __len__(self) -> int:
        return len(self.scenes)

    def batches(self, size: int, seed: int) -> Iterator[np.ndarray]:
        """Endless batches of indices: seeded permutations one after another."""
        rng = np.random.default_rng([seed, 77])
        rest = np.empty(0, dtype=np.int64)
        while True:
            while len(rest) < size:
                rest = np.concatenate([rest, rng.permutation(len(self))])
            yield rest[:size]
            rest = rest[size:]
