"""What the four pretrainings of the mini world share: the step loop, the learning rate, batches of scenes and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

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
    parameters: Iterable[nn.Parameter],
    steps: int,
    step_loss: Callable[[int], dict[str, Tensor]],
    *,
    lr: float,
    weight_decay: float = 0.02,
    warmup: int = 100,
    check: Callable[[], dict[str, float]] | None = None,
    check_every: int = 250,
) -> None:
    """AdamW with warm-up, cosine decay and clipping at norm 1 over `steps` calls of `step_loss`.

    Args:
        name: the progress bar's label.
        step_loss: step -> named losses; the optimizer follows their sum.
        check: saves what is trained so far and returns held-out figures, printed every `check_every` steps.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps // 10 + 1), steps)
    with tqdm(total=steps, desc=name, unit="step", mininterval=2) as bar:
        for step in range(steps):
            losses = step_loss(step)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix({k: f"{v.item():.3f}" for k, v in losses.items()})
            if check is not None and (step + 1) % check_every == 0 and step + 1 < steps:
                bar.write(f"{name} step {step + 1}: " + " ".join(f"{k} {v:.3f}" for k, v in check().items()))


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
