"""LoRA and IA3 on the frozen LM, through PEFT: the baselines that stand where the sparse networks stand.

They adapt the same LM in the same tuned model, with the same picture tokens, task tokens, decoders, losses and
checkpoint, so that a comparison changes nothing but the adapter. PEFT is imported on first use: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from pipeline.model.initialise import Resettable, reset_layers, write

IA3_TARGETS = ("k_proj", "v_proj", "down_proj")
"""What IA3 rescales in LLaMA, Mistral and Qwen (its paper, and PEFT's own default for them)."""


class AdaptedProjection(Resettable):
    """One projection of the LM with PEFT's adapter around it; it draws its initial values as everything else does."""

    adapted: Any

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted projection gives."""
        return self.adapted(*args, **kwargs)

    def adapter_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, container) of what PEFT added; the rest is the frozen projection."""
        for name in self.adapted.adapter_layer_names:
            if isinstance(added := getattr(self.adapted, name, None), nn.Module):
                yield f"adapted.{name}", added

    def adapter_parameters(self, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what is trained."""
        for path, added in self.adapter_modules():
            yield from added.named_parameters(prefix=f"{prefix}.{path}")

    def reset(self, name: str, seed: int) -> None:
        """LoRA: A as PyTorch draws a linear layer (PEFT's own rule), B zero. IA3: ones. Both leave the LM as it was."""
        for path, added in self.adapter_modules():
            if path.endswith("lora_A"):
                reset_layers(added, f"{name}.{path}", seed)
            else:
                for parameter in added.parameters():
                    write(parameter, 1.0 if path.endswith("ia3_l") else 0.0)


def sparse_parameters(llm: nn.Module, *, first_layer: int, projections: str, z_dim: int) -> int:
    """Parameters that sparse networks of width z_dim would have here: Z (D + outputs) in each tuned layer."""
    return z_dim * sum(
        shapes[0][0] + sum(out for _, out in shapes) for shapes in _shapes(llm, first_layer, projections)
    )


def matched_rank(llm: nn.Module, *, first_layer: int, projections: str, z_dim: int) -> int:
    """The LoRA rank, at least 1, whose size comes nearest to that of sparse networks of width z_dim."""
    per_rank = sum(sum(shape) for shapes in _shapes(llm, first_layer, projections) for shape in shapes)
    wanted = sparse_parameters(llm, first_layer=first_layer, projections=projections, z_dim=z_dim)
    return max(1, round(wanted / per_rank))


def add_lora(llm: nn.Module, *, first_layer: int, projections: str, rank: int, alpha: float) -> None:
    """LoRA (Hu et al., 2021) of that rank, scaled by alpha / rank, on these projections from first_layer on; in place.

    projections: letters of q, k, v. Raises ValueError if the LM's layers have no such projections.
    """
    from peft import LoraConfig

    targets = _targets(llm, [f"{name}_proj" for name in projections], first_layer)
    # PEFT scales by any number, but declares int.
    _inject(llm, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))  # type: ignore[arg-type]


def add_ia3(llm: nn.Module, *, first_layer: int) -> None:
    """IA3 (Liu et al., 2022): learned factors on keys, values and the MLP's inner states from first_layer on; in place.

    Raises ValueError if the LM's layers have no such projections.
    """
    from peft import IA3Config

    targets = _targets(llm, IA3_TARGETS, first_layer)
    inner = [name for name in targets if name.endswith("down_proj")]
    _inject(llm, IA3Config(target_modules=targets, feedforward_modules=inner))


def _shapes(llm: Any, first_layer: int, projections: str) -> list[list[tuple[int, int]]]:
    """(inputs, outputs) of each tuned projection of each tuned layer."""
    found = []
    for layer in llm.model.layers[first_layer:]:
        tuned = [getattr(layer.self_attn, f"{name}_proj") for name in projections]
        found.append([(projection.in_features, projection.out_features) for projection in tuned])
    return found


def _targets(llm: Any, endings: Sequence[str], first_layer: int) -> list[str]:
    """Full names of the linear layers with these last names in model.layers[first_layer:]."""
    found = []
    for index, layer in enumerate(llm.model.layers):
        if index >= first_layer:
            names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
            own = [f"model.layers.{index}.{name}" for name in names if name.rpartition(".")[2] in endings]
            if len(own) != len(endings):
                raise ValueError(
                    f"layer {index} ({type(layer).__name__}) has not each of {', '.join(endings)} as a linear layer: "
                    "take LLaMA, Mistral or Qwen, or --tuner neural"
                )
            found += own
    return found


def _inject(llm: Any, config: Any) -> None:
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    inject_adapter_in_model(config, llm)
    modules = dict(llm.named_modules())
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, AdaptedProjection(module))
