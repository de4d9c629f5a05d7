"""Parameters of a model on the meta device by part, and the operations and memory of one of its passes.

Shape suffixes: B rows, T tokens, D hidden, N labelled tokens, C CLIP width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.batch import IGNORE, VisionFeatures
from pipeline.model import losses
from pipeline.model.tuner import NeuralTuner
from pipeline.model.vision import VisionTower
from pipeline.planning.trace import Operation, Trace
from pipeline.planning.workload import Pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Numbers of parameters. `linears`: of the frozen matrices that --base_quant stores in fewer bits."""

    base: int
    trained: Mapping[str, int]
    clip: int
    clip_bytes: int
    linears: int
    shapes: tuple[tuple[int, bool], ...]
    """(elements, whether trained) of every parameter of the tuned model, in order: what ZeRO-3 cuts up one by one."""
    groups: tuple[tuple[int, ...], ...]
    """Elements of each trained parameter by optimizer group: what ZeRO-1 and 2 lay end to end and cut."""

    @property
    def all_trained(self) -> int:
        """All that is trained."""
        return sum(self.trained.values())

    @property
    def trained_share(self) -> float:
        """Of the tuned model, CLIP not counted."""
        return self.all_trained / (self.base + self.all_trained)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What one pass does: its operations, and bytes by part at the end of the forward and at the peak."""

    operations: tuple[Operation, ...]
    activations: int
    logits: int
    features: int
    workspace: int
    """Bytes on top of the parts above at the peak: what an operation or a recomputed layer needs for a moment."""

    @property
    def flops(self) -> int:
        """Matrix FLOPs, recomputation included."""
        return sum(operation.flops for operation in self.operations)


def count_parameters(tuner: NeuralTuner, tower: nn.Module) -> Parameters:
    """Counts the real modules. Tied tables count once, as PyTorch names them."""
    kinds: dict[str, int] = {}
    groups = []
    for group in tuner.parameter_groups(1.0):
        sizes = tuple(parameter.numel() for parameter in group["params"])
        kind = group["name"].split("/")[0]
        kinds[kind] = kinds.get(kind, 0) + sum(sizes)
        groups.append(sizes)
    named = list(tuner.named_parameters())
    linears = [
        module.weight.numel()
        for name, module in tuner.llm.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}" and not module.weight.requires_grad
    ]
    return Parameters(
        base=sum(p.numel() for _, p in named if not p.requires_grad),
        trained=kinds,
        clip=sum(p.numel() for p in tower.parameters()),
        clip_bytes=sum(p.numel() * p.element_size() for p in tower.parameters()),
        linears=sum(linears),
        shapes=tuple((p.numel(), p.requires_grad) for _, p in named),
        groups=tuple(groups),
    )


def forward_tmac(llm: nn.Module, tokens: int) -> float:
    """10^12 multiply-accumulates of one forward of the LM over one row, logits of every position included."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llm(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
    return counter.get_total_flops() / 2 / 1e12


def trace_pass(tuner: NeuralTuner, size: Pass) -> Traced:
    """Forward and backward of the tuned model's parts in the order in which NeuralTuner.forward calls them.

    Its forward itself looks at values (which positions are labelled), and a meta tensor has none: here their numbers
    are given instead. A test holds the two equal, operation by operation.
    """
    for parameter in tuner.parameters():
        parameter.grad = None
    weights = [*tuner.parameters(), *tuner.buffers()]
    trace = Trace()
    trace.ignore(*weights)
    with trace:
        features = _features(tuner, size.rows)
        after_features = trace.live
        ids_BT = torch.zeros(size.rows, size.tokens, dtype=torch.long, device="meta")
        embeds_BTD = tuner.llm.get_input_embeddings()(ids_BT)
        pictures = tuner.projector(features.tokens).to(embeds_BTD.dtype)
        n = min(pictures.shape[1], size.tokens)
        embeds_BTD = torch.cat([pictures[:, :n], embeds_BTD[:, n:]], dim=1)
        hidden_BTD = tuner.llm.model(inputs_embeds=embeds_BTD, attention_mask=None, use_cache=False).last_hidden_state
        after_layers = trace.live
        hidden = hidden_BTD.flatten(0, 1)
        n_labelled = max(size.labelled, 1)
        labels_N = torch.zeros(n_labelled, dtype=torch.long, device="meta")
        logits = tuner.llm.get_output_embeddings()(hidden[_rows(n_labelled)])
        ce = losses.answer_losses(logits, labels_N, IGNORE).sum()
        del logits
        after_head = trace.live
        masks, drawn = max(size.masks, 1), max(size.pictures, 1)
        picked = tuple(tap.index_select(0, _rows(masks)) for tap in features.taps)
        mask_logits = tuner.mask_decoder(picked, hidden[_rows(masks)])
        dice = losses.dice_losses(mask_logits, torch.empty_like(mask_logits)).sum()
        embedding = tuner.clip_head(hidden[_rows(drawn)])
        mse = losses.picture_losses(embedding, torch.empty_like(embedding)).sum()
        loss = ce + dice + mse
        del mask_logits, picked, embedding, ce, dice, mse, hidden, hidden_BTD, embeds_BTD, pictures
        after_forward = trace.live
        loss.backward()
    parts = (after_layers - after_features) + (after_forward - after_head)
    found = Traced(
        operations=tuple(trace.operations),
        activations=parts,
        logits=after_head - after_layers,
        features=after_features,
        workspace=trace.peak - after_forward,
    )
    for parameter in tuner.parameters():
        parameter.grad = None
    return found


def trace_vision(tower: VisionTower, rows: int) -> Traced:
    """The frozen CLIP's forward over `rows` pictures."""
    trace = Trace()
    trace.ignore(*tower.parameters(), *tower.buffers())
    side = tower.image_size
    with trace, torch.no_grad():
        pixels = torch.empty(rows, 3, side, side, device="meta")
        out = tower(pixels)
        kept = trace.live
        del out
    return Traced(
        operations=tuple(trace.operations), activations=0, logits=0, features=kept, workspace=trace.peak - kept
    )


def _rows(number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.long, device="meta")


def _features(tuner: NeuralTuner, rows: int) -> VisionFeatures:
    grid = tuner.mask_decoder.grid
    norm: Any = tuner.mask_decoder.norms[0]
    width = norm.normalized_shape[0]
    embed: Any = tuner.clip_head.layers[-1]

    def tokens() -> Tensor:
        return torch.empty(rows, grid * grid + 1, width, device="meta")

    taps = tuple(tokens() for _ in range(tuner.mask_decoder.layers - 1))
    last = tokens()
    return VisionFeatures(
        tokens=last, taps=(*taps, last), embedding=torch.empty(rows, embed.out_features, device="meta")
    )
