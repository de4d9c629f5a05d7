"""A fifth task in one file: grounding, where the thing that a phrase describes is answered with a box.

    deepspeed pipeline/train.py --deepspeed ds_configs/z2.json --output_dir runs/five \
        --task_module examples/grounding.py --tasks reasoning,referring,caption,generation,grounding
    python pipeline/evaluate_mmud.py --checkpoint runs/five

Everything that the pipeline asks of a task stands here: its prompt, answer and targets, a decoder with its loss, a
score, and the call that registers them. Shape suffixes: N boxes, D hidden, P patches, C CLIP width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss

from pipeline.assembly.registry import register
from pipeline.data.batch import VisionFeatures
from pipeline.data.schema import Sample
from pipeline.data.tasks import TaskOptions, TaskText
from pipeline.model.decoders import CastLinear
from pipeline.model.heads import TaskHead
from pipeline.scoring.predictions import PictureFeatures, Prediction
from pipeline.scoring.scores import Score
from pipeline.scoring.suite import Rules, Scored


class Grounding:
    """One object by a phrase; the answer names it, and <OBJ-1> calls its box: x1, y1, x2, y2 as shares of the sides."""

    name, needs_image, values = "grounding", True, 4

    def available(self, sample: Sample) -> bool:
        return bool(sample.objects)

    def build(self, sample: Sample, rng: np.random.Generator, options: TaskOptions) -> TaskText:
        index = int(rng.integers(len(sample.objects)))
        chosen = sample.objects[index]
        phrase = chosen.phrases[int(rng.integers(len(chosen.phrases)))]
        x1, y1, x2, y2 = chosen.box
        box = (x1 / sample.width, y1 / sample.height, x2 / sample.width, y2 / sample.height)
        return TaskText(
            prompt=f"Where is {phrase}?",
            answer=f"the {chosen.category} <OBJ-1>.",
            object_indices=(index,),
            values=(box,),
            reference={"phrases": [phrase]},
        )


class BoxHead(TaskHead):
    """The token's state asks the picture's patches where the object is; what they answer becomes a box."""

    weight = 2.0

    def __init__(self, hidden: int, width: int, dim: int = 128) -> None:
        super().__init__()
        self.query, self.key = CastLinear(hidden, dim), CastLinear(width, dim)
        self.first, self.last = CastLinear(hidden + width + 2, dim), CastLinear(dim, 4)

    def forward(self, features: VisionFeatures, states_ND: Tensor) -> Tensor:
        patches_NPC = features.tokens[:, 1:]
        query_ND, keys_NPD = self.query(states_ND), self.key(patches_NPC)
        found_NP = (torch.einsum("nd,npd->np", query_ND, keys_NPD) / query_ND.shape[-1] ** 0.5).softmax(-1)
        side = math.isqrt(patches_NPC.shape[1])
        steps = (torch.arange(side, device=found_NP.device, dtype=found_NP.dtype) + 0.5) / side
        places_P2 = torch.cartesian_prod(steps, steps).flip(-1)
        seen_NC = torch.einsum("np,npc->nc", found_NP, patches_NPC.to(found_NP.dtype))
        middle_N2 = found_NP @ places_P2
        joined = torch.cat([states_ND.to(seen_NC.dtype), seen_NC, middle_N2], dim=-1)
        moved_N4 = self.last(F.gelu(self.first(joined))).float()
        centre = (middle_N2.float() + 0.5 * moved_N4[:, :2].tanh()).clamp(0, 1)
        half = 0.5 * moved_N4[:, 2:].sigmoid()
        return torch.cat([centre - half, centre + half], dim=-1)

    def losses(self, values_NW: Tensor, targets_NW: Tensor) -> Tensor:
        return (values_NW - targets_NW).abs().mean(-1) + generalized_box_iou_loss(values_NW, targets_NW)


SCORES = {
    "grounding_box_iou": Score("grounding", "box IoU", 3, "mean IoU of the boxes; an answer without a box counts 0"),
    "grounding_hits": Score("grounding", "box IoU >= .5", 3, "share of boxes with IoU of at least .5"),
}


def score_boxes(some: list[Prediction], rules: Rules, _: PictureFeatures | None, condition: str) -> Scored:
    """Box IoU of each answer's <OBJ-1>."""
    ious = []
    for p in some:
        given = p.values[0] if p.values else None
        pair = [torch.tensor([box], dtype=torch.float64) for box in (given, p.reference["values"][0]) if box]
        ious.append(float(box_iou(*pair)) if len(pair) == 2 else 0.0)
    hits = [float(iou >= 0.5) for iou in ious]
    scored = Scored(details={"without a box": sum(not p.values or p.values[0] is None for p in some)})
    scored.put("grounding_box_iou", math.fsum(ious) / len(ious), rules.bootstrap.of_mean(ious))
    scored.put("grounding_hits", math.fsum(hits) / len(hits), rules.bootstrap.of_mean(hits))
    return scored


register(Grounding(), head=BoxHead, scores=SCORES, scorer=score_boxes)
