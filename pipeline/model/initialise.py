"""Initial values that depend on a parameter's name and the seed alone: alike on every rank and in every ZeRO stage.

Construction and initialisation are apart. Modules with parameters of their own are `Resettable`; `initialise` walks a
model and calls each one's `reset` inside `gather(parameters)`, which the runtime may make a gathering of ZeRO-3 shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


class Resettable(nn.Module):
    """A module that can write its own initial values."""

    def reset(self, name: str, seed: int) -> None:
        """Writes this module's new parameters; `name` is its path in the model, the key of its random draws."""
        raise NotImplementedError


def keyed_init(name: str, seed: int) -> torch.Generator:
    """A CPU generator whose state depends on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(name: str, seed: int, shape: torch.Size, std: float) -> Tensor:
    """fp32 CPU draws N(0, std²) for the parameter `name`."""
    return torch.randn(shape, generator=keyed_init(name, seed), device="cpu") * std


def write(parameter: Tensor, values: Tensor | float) -> None:
    """Copies values into a parameter, in its dtype and on its device."""
    with torch.no_grad():
        if isinstance(values, Tensor):
            assert parameter.shape == values.shape, (parameter.shape, values.shape)
            parameter.copy_(values)
        else:
            parameter.fill_(values)


def reset_layers(root: nn.Module, name: str, seed: int) -> None:
    """PyTorch's default rule for every linear, convolution and LayerNorm under root: U(±1/sqrt(fan_in)); 1 and 0."""
    for path, module in root.named_modules():
        key = f"{name}.{path}" if path else name
        if isinstance(module, nn.LayerNorm):
            write(module.weight, 1.0)
            write(module.bias, 0.0)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = math.prod(module.weight.shape[1:])
            for kind, parameter in module.named_parameters(recurse=False):
                uniform = torch.rand(parameter.shape, generator=keyed_init(f"{key}.{kind}", seed), device="cpu")
                write(parameter, (2.0 * uniform - 1.0) / math.sqrt(fan_in))
        else:
            assert not list(module.parameters(recurse=False)), f"{key}: no rule for {type(module).__name__}"


def initialise(model: nn.Module, seed: int, gather: Gather | None = None) -> None:
    """Resets every Resettable module of the model; pretrained weights stay as they are.

    `gather` wraps each module's reset with its parameters, those of a wrapped pretrained table included, since new rows
    start from its mean; the default does nothing. Under ZeRO-3: `runtime.engine.whole`, the tables being in pieces.
    """
    for name, module in model.named_modules():
        if isinstance(module, Resettable):
            with gather(list(module.parameters())) if gather else contextlib.nullcontext():
                module.reset(name, seed)
