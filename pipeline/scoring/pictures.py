"""Scores of generated pictures against their texts in a CLIP space: retrieval among a group of texts, and cosine.

Both depend on the CLIP that made the embeddings, so a report names it; they are no FID and are never printed as one.

Symbols: n pictures, E embedding dimensions. Row i of the pictures belongs to row i of the texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import to_pixels
from pipeline.model.vision import VisionTower

TIE = 1e-6
"""Cosines closer than this are equal: the same text embedded in two batches differs by about 1e-7."""


def embed_pictures(vision: VisionTower, pictures: Sequence[bytes | None], batch: int = 100) -> Tensor:
    """CLIP embeddings float32 [n,E], on the CPU, of picture files; a missing picture counts as a grey one."""
    side, mean, std = vision.image_size, vision.mean, vision.std
    device = next(vision.parameters()).device
    grey = torch.zeros(3, side, side)
    pixels = [grey if p is None else to_pixels(p, image_size=side, mean=mean, std=std) for p in pictures]
    parts = [torch.stack(pixels[i : i + batch]).to(device) for i in range(0, len(pixels), batch)]
    return torch.cat([vision(part).embedding.float().cpu() for part in parts])


def _unit_rows(embeddings: Any, name: str) -> np.ndarray:
    """Rows of length 1 as float64 [n,E]; rows of length 0 stay 0. Accepts arrays and CPU tensors."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be [n,E], found shape {rows.shape}")
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        raise ValueError(f"{name} hold NaN or infinity in {len(bad)} rows, the first is row {bad[0]}")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _both_unit(image_embeddings: Any, text_embeddings: Any) -> tuple[np.ndarray, np.ndarray]:
    images, texts = _unit_rows(image_embeddings, "image embeddings"), _unit_rows(text_embeddings, "text embeddings")
    if images.shape != texts.shape:
        raise ValueError(f"image embeddings {images.shape} and text embeddings {texts.shape} differ in shape")
    return images, texts


def retrieval_credits(image_embeddings: Any, text_embeddings: Any, *, group: int = 50, seed: int = 0) -> list[float]:
    """For each picture 1 if its own text is the nearest by cosine among `group` texts, its own and group-1 others.

    The others are drawn without replacement for each picture, from a generator seeded with `seed`; chance is 1/group. A
    text that ties with k-1 others (equal captions occur) counts 1/k when it is the nearest, so that a constant picture
    scores chance and not 1. The draw goes by row: sort the rows by sample key first and the result is the same on any
    number of ranks.

    Raises ValueError with fewer than `group` pictures: among fewer texts the figure would be another one.
    """
    images, texts = _both_unit(image_embeddings, text_embeddings)
    n = len(images)
    if group < 2:
        raise ValueError(f"group is {group}; it must be at least 2")
    if n < group:
        raise ValueError(f"R@1 of {group} needs at least {group} pictures, found {n}: score more samples")
    rng = np.random.default_rng(seed)
    credit = []
    for i in range(n):
        others = rng.choice(n - 1, size=group - 1, replace=False)
        others += others >= i
        own, rest = float(texts[i] @ images[i]), texts[others] @ images[i]
        if (rest > own + TIE).any():
            credit.append(0.0)
        else:
            credit.append(1.0 / (1 + int((rest >= own - TIE).sum())))
    return credit


def retrieval_r1(image_embeddings: Any, text_embeddings: Any, *, group: int = 50, seed: int = 0) -> float:
    """The mean of `retrieval_credits`: the share of pictures that find their own text."""
    credit = retrieval_credits(image_embeddings, text_embeddings, group=group, seed=seed)
    return math.fsum(credit) / len(credit)


def cosines(image_embeddings: Any, text_embeddings: Any) -> np.ndarray:
    """Cosine of each picture with its own text, float64 [n]."""
    images, texts = _both_unit(image_embeddings, text_embeddings)
    return (images * texts).sum(axis=1)


def mean_cosine(image_embeddings: Any, text_embeddings: Any) -> float:
    """Mean cosine of each picture with its own text, in [-1,1]. Raises ValueError for an empty set."""
    each = cosines(image_embeddings, text_embeddings)
    if not len(each):
        raise ValueError("the cosine of no pictures is not defined")
    return math.fsum(each) / len(each)


def score_pictures(image_embeddings: Any, text_embeddings: Any, *, group: int = 50, seed: int = 0) -> dict[str, Any]:
    """`text_r1` (None with fewer than `group` pictures), `clip_cosine` (None without pictures), `group`, `samples`."""
    images, texts = _both_unit(image_embeddings, text_embeddings)
    n = len(images)
    return {
        "text_r1": retrieval_r1(images, texts, group=group, seed=seed) if n >= group else None,
        "clip_cosine": mean_cosine(images, texts) if n else None,
        "group": group,
        "samples": n,
    }
