"""Tuned layers around any Hugging Face causal LM with separate q, k, v projections; its own forward is never copied.

`tune_layers` replaces layers in `llm.model.layers` by a TunedLayer each. The LM passes on what one layer returns as the
next one's first argument, so between tuned layers that is the pair (h, zu): zu is an explicit input and output of each
checkpointed region, and recomputation sees the value that the first pass saw.

Shape suffixes: B batch, T tokens, D hidden, Z sparse dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.model.sparse import SparseNetwork

CHECKPOINTED = ("attention", "full")
MakeNetwork = Callable[[int, int, dict[str, int]], SparseNetwork]
"""(layer index, hidden, out_features by projection) -> the layer's sparse network."""


@dataclass(slots=True)
class _Scratch:
    """What the hooks of one layer share within one forward."""

    z_prev: Tensor | None
    zu: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class TunedLayer(GradientCheckpointingLayer):
    """A decoder layer with a sparse network beside its attention.

    The network runs on what self_attn receives (after the input norm); its parts are added to the outputs of the tuned
    projections (Eq. 5). Takes h or (h, zu) and gives (h, zu), or h alone in the last layer.
    """

    layer: Any

    def __init__(self, layer: Any, network: SparseNetwork, *, last: bool) -> None:
        super().__init__()
        self.layer = layer
        self.network = network
        self.last = last
        self._scratch: _Scratch | None = None
        self._network_hook = layer.self_attn.register_forward_pre_hook(self._run_network, with_kwargs=True)
        for name in network.out_features:
            getattr(layer.self_attn, f"{name}_proj").register_forward_hook(_AddPart(self, name))

    def forward(self, carry: Tensor | tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Any:
        """carry: h [B,T,D], or (h, zu [B,T,Z]) from the tuned layer before."""
        assert self._scratch is None, "a tuned layer was entered twice"
        h_BTD, z_prev_BTZ = carry if isinstance(carry, tuple) else (carry, None)
        # This wrapper is the checkpointed region; a second one inside would recompute without need.
        self.layer.gradient_checkpointing = False
        self._scratch = scratch = _Scratch(z_prev_BTZ)
        try:
            h_BTD = self.layer(h_BTD, *args, **kwargs)
        finally:
            self._scratch = None
        assert scratch.zu is not None, "the layer did not call self_attn"
        return h_BTD if self.last else (h_BTD, scratch.zu)

    def _run_network(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._scratch is not None, "a tuned layer's attention ran outside its wrapper"
        h_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._scratch.zu, self._scratch.parts = self.network(h_BTD, self._scratch.z_prev)

    def recompute_attention(self) -> None:
        """Makes self_attn and the sparse network one checkpointed region, with zu among its outputs."""
        self._network_hook.remove()
        attention = self.layer.self_attn
        attend = attention.forward

        def region(z_prev_BTZ: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
            outer, self._scratch = self._scratch, _Scratch(z_prev_BTZ)
            try:
                self._run_network(attention, args, kwargs)
                return attend(*args, **kwargs), self._scratch.zu
            finally:
                self._scratch = outer

        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._scratch is not None, "a tuned layer's attention ran outside its wrapper"
            out, self._scratch.zu = _recomputed(region)(self._scratch.z_prev, *args, **kwargs)
            return out

        attention.forward = forward


class _AddPart:
    """The forward hook of one tuned projection; a class, so that a model with hooks can be copied and pickled."""

    def __init__(self, owner: TunedLayer, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self.owner._scratch is not None, "a tuned projection ran outside its layer"
        return output + self.owner._scratch.parts[self.name].to(output.dtype)


def tune_layers(llm: nn.Module, *, first_layer: int, projections: str, make_network: MakeNetwork) -> list[TunedLayer]:
    """Wraps llm.model.layers[first_layer:] in place and returns the wrappers.

    projections: which of q, k, v to tune, e.g. "qv". Raises ValueError for a model without separate projections, an
    impossible first layer or choice, or a model that is tuned already.
    """
    if not projections or len(set(projections)) != len(projections) or set(projections) - set("qkv"):
        raise ValueError(f"projections must name each of q, k, v at most once, e.g. 'qv', not {projections!r}")
    layers = getattr(getattr(llm, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(llm).__name__} has no model.layers: take a LLaMA, Mistral or Qwen causal LM")
    if not 0 <= first_layer < len(layers):
        raise ValueError(f"first_tuned_layer must lie in 0..{len(layers) - 1} for this model, not {first_layer}")
    for index, layer in enumerate(layers):
        if isinstance(layer, TunedLayer):
            raise ValueError(f"layer {index} is tuned already: load the base model again")
        if any(not hasattr(getattr(layer, "self_attn", None), f"{name}_proj") for name in "qkv"):
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) has no separate self_attn.q_proj, k_proj and v_proj: take a "
                "model that has them (LLaMA, Mistral, Qwen2, Qwen3), not one with a fused projection"
            )
    wrappers = []
    for index in range(first_layer, len(layers)):
        attention: Any = layers[index].self_attn
        out_features = {name: getattr(attention, f"{name}_proj").out_features for name in projections}
        network = make_network(index, attention.q_proj.in_features, out_features)
        layers[index] = wrapper = TunedLayer(layers[index], network, last=index == len(layers) - 1)
        wrappers.append(wrapper)
    return wrappers


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its activations recomputed in the backward pass, where there will be one."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return run


def enable_checkpointing(llm: PreTrainedModel, part: str = "full") -> None:
    """Activation checkpointing for the whole LM.

    part: "full", each layer (a tuned one with its sparse network); "attention", each layer's attention (with the sparse
    network) alone: less is computed twice, the MLP's activations are kept. Raises ValueError for another.
    """
    if part not in CHECKPOINTED:
        raise ValueError(f"gradient_checkpointing must be one of {CHECKPOINTED}, not {part!r}")
    if part == "attention":
        for layer in llm.model.layers:
            if isinstance(layer, TunedLayer):
                layer.recompute_attention()
            else:
                layer.self_attn.forward = _recomputed(layer.self_attn.forward)
        return
    llm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for module in llm.modules():
        if isinstance(module, TunedLayer):
            module.layer.gradient_checkpointing = False


def compile_layers(llm: PreTrainedModel, backend: str = "inductor") -> None:
    """torch.compile of each layer's norms and MLP, one graph for any number of tokens.

    Attention is left out: it goes by the lengths of the samples in a row, others in every batch, for which the graph of
    a whole layer would be compiled anew; PyTorch's attention and the sparse vector are fused kernels already.
    """
    for layer in llm.model.layers:
        inner: Any = layer.layer if isinstance(layer, TunedLayer) else layer
        for part in (inner.input_layernorm, inner.post_attention_layernorm, inner.mlp):
            part.compile(dynamic=True, backend=backend)
