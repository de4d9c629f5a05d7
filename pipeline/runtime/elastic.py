"""The trained state by parameter name, the same from every ZeRO stage and world size.

DeepSpeed's own checkpoints load only under the stage and the number of ranks that wrote them. What is trained here is
small, so it is gathered whole: fp32 master weights, Adam's two moments and the model's buffers, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.runtime.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of each weight, by its names in PyTorch and DeepSpeed."""


@dataclass(kw_only=True)
class TrainedState:
    """weights: fp32 by parameter name, and buffers by theirs; moments: "<exp_avg|exp_avg_sq>/<name>"; CPU tensors."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)


def gather(engine: Engine) -> TrainedState:
    """The whole trained state on rank 0, an empty one elsewhere. Collective: every rank calls it."""
    state = TrainedState()
    keep = engine.ranks.is_main
    if engine.has_moments:
        engine.link_moments()
    for name, parameter in engine.trained():
        weight = engine.get_weight(parameter)
        if keep:
            state.weights[name] = weight.detach().float().cpu().clone()
        for key in MOMENTS if engine.has_moments else ():
            moment = engine.get_moment(parameter, key)
            if keep:
                state.moments[f"{key}/{name}"] = moment.detach().float().cpu().clone()
    if keep:
        state.weights |= {name: buffer.detach().cpu().clone() for name, buffer in saved_buffers(engine.module).items()}
    return state


def scatter(engine: Engine, state: TrainedState, *, step: int) -> None:
    """Puts a whole trained state (the same on every rank) into the engine, `step` optimizer steps done. Collective.

    Raises ValueError naming parameters that are missing, unexpected or of another shape.
    """
    shapes = {name: engine.full_shape(parameter) for name, parameter in engine.trained()}
    check_names(shapes, state.weights, saved_buffers(engine.module))
    if state.moments:
        engine.allocate_moments(step)
    for name, parameter in engine.trained():
        engine.set_weight(parameter, state.weights[name])
        for key in MOMENTS if state.moments else ():
            engine.set_moment(parameter, key, state.moments[f"{key}/{name}"])
    _load_buffers(engine.module, state.weights)
    engine.set_step(step)


def load_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Trained weights into a model without DeepSpeed (inference, evaluation). Raises ValueError as `scatter` does."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_names({name: p.shape for name, p in trained.items()}, weights, saved_buffers(model))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    _load_buffers(model, weights)


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The model's persistent buffers by name (what its state_dict would hold of them)."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def check_names(shapes: Mapping[str, torch.Size], found: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless `found` holds exactly the trained parameters `shapes`, and no more than the buffers."""
    missing = sorted((set(shapes) | set(buffers)) - set(found))
    unexpected = sorted(set(found) - set(shapes) - set(buffers))
    other = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", other)]
    text = "; ".join(f"{what}: {_few(names)}" for what, names in parts if names)
    if text:
        raise ValueError(f"the checkpoint does not fit the model ({text}): was it made with other model flags?")


def _load_buffers(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, buffer in saved_buffers(model).items():
        buffer.copy_(weights[name])


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
