"""What one pass of the real model does, counted on the meta device: operations, bytes, and memory as it comes and goes.

A trace watches every operation that PyTorch dispatches while the model runs forward and backward on tensors that have a
shape and no content. Nothing is computed and no weights are needed; the classes are those that train.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface

ATTENTION = "planned"
"""Name of the attention to give to a model that is traced."""


def _planned_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """[B,T,H,D] attention by the operator that GPUs run: it keeps q, k, v and one number per row for the backward.

    On the meta device PyTorch would choose the plain formula, whose [T,T] weights no GPU run ever holds.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _planned_attention)


_FREE = {torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty}
"""Operations that neither compute nor move anything, and are no views by PyTorch's reckoning."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One dispatched operation: matrix FLOPs (0 if it only moves data), bytes read and written, element size."""

    flops: int
    moved: int
    itemsize: int


@dataclass
class Trace(TorchDispatchMode):
    """A dispatch mode that lists operations and follows the bytes of every tensor made under it until it is freed."""

    operations: list[Operation] = field(default_factory=list)
    live: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and counts it."""
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        count = flop_registry.get(func.overloadpacket)
        if not func.is_view and func.overloadpacket not in _FREE:
            self.operations.append(
                Operation(
                    flops=count(*args, **(kwargs or {}), out_val=out) if count else 0,
                    moved=sum(map(_bytes, made)) + sum(map(_bytes, taken)),
                    itemsize=made[0].element_size() if made else 1,
                )
            )
        for tensor in made:
            self._follow(tensor)
        return out

    def ignore(self, *tensors: Tensor) -> None:
        """Leaves out what was there before the trace: weights, and inputs that are counted elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata, 0))

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, partial(self._forget, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: Any) -> None:
        self._known.pop(key, None)
        self.live -= size


def _bytes(tensor: Tensor) -> int:
    # What is read of an expanded tensor is what lies behind it.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
