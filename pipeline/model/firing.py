"""Which units of the sparse networks fire at the places where a task's answer is written (the paper's Fig. 2b).

A unit fires where its value stays after the masking (za != 0). The places are those whose state predicts an answer's
token, with the right answer as the past, so that every model is seen on the same text.

Shape suffixes: N answer places, L tuned layers, Z sparse dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import IGNORE, Batch, VisionFeatures
from pipeline.model.generation import evaluating
from pipeline.model.losses import Norms
from pipeline.model.tuner import NeuralTuner


@dataclass(frozen=True, slots=True)
class Firing:
    """What fired in one task: fired [N,L,Z] bool, tokens [N] (what stands at each place), samples [N] (running)."""

    fired: np.ndarray
    tokens: np.ndarray
    samples: np.ndarray


@contextmanager
def _observed(tuner: NeuralTuner) -> Iterator[list[Tensor]]:
    """The sparse vectors [B,T,Z] of the forward that runs inside, layer after layer."""
    seen: list[Tensor] = []
    for network in tuner.networks:
        network.observe = lambda _, za_BTZ: seen.append(za_BTZ)
    try:
        yield seen
    finally:
        for network in tuner.networks:
            network.observe = None


def record(tuner: NeuralTuner, batches: Iterable[tuple[Batch, VisionFeatures]], task: str) -> Firing:
    """Runs the batches and notes what fires in the samples of one task (samples that cannot be asked it get another).

    Raises ValueError for a model without sparse networks, or one that keeps every unit outside training.
    """
    if not tuner.networks:
        raise ValueError("this checkpoint has no sparse network (--tuner lora or ia3): there are no units to look at")
    fired, tokens, samples, before = [], [], [], 0
    with evaluating(tuner):
        if all(network.n_active == network.z_dim for network in tuner.networks):
            raise ValueError(
                "this checkpoint keeps every unit outside training (beta 1, or inference_sparsity off): nothing tells "
                "its tasks apart"
            )
        for batch, features in batches:
            with _observed(tuner) as seen:
                tuner(batch, features, Norms(tokens=1.0, masks=1.0, pictures=1.0))
            rows_N, at_N = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
            samples_N = batch.segment_ids[rows_N, at_N]
            own = torch.tensor([name == task for name in batch.tasks], device=rows_N.device)[samples_N]
            rows_N, at_N, samples_N = rows_N[own], at_N[own], samples_N[own]
            fired.append(torch.stack([za_BTZ[rows_N, at_N] != 0 for za_BTZ in seen], dim=1).cpu())
            tokens.append(batch.input_ids[rows_N, at_N].cpu())
            samples.append(samples_N.cpu() + before)
            before += len(batch.keys)
    return Firing(*(torch.cat(parts).numpy() for parts in (fired, tokens, samples)))
