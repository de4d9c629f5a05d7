"""A job of a few toy training runs for test_engine.py: `deepspeed --num_gpus N tests/engine_job.py PLAN.json OUT.json`.

PLAN is a list of cases that run one after another in these ranks; OUT gets {name: facts} from rank 0. The toy has the
call shape of the real model, two optimizer groups, odd sizes, a (1,) parameter, a buffer and a frozen part.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import IGNORE, Batch, VisionFeatures
from pipeline.model.losses import LossWeights, Norms, share
from pipeline.runtime import checkpoint, ds_config
from pipeline.runtime import engine as runtime
from pipeline.runtime.ranks import Ranks, detect
from pipeline.runtime.saver import Saver

REPO = Path(__file__).resolve().parent.parent
GLOBAL_BATCH, WIDTH, VOCABULARY = 8, 24, 13


class Toy(nn.Module):
    """An embedding (frozen), a mixer and a head of odd sizes; every forward uses every part."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.base = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.mixer = nn.Linear(WIDTH, 17)
        self.norm = nn.LayerNorm(17)
        self.head = nn.Linear(17, VOCABULARY, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.arange(3.0))
        with torch.no_grad():
            for parameter in [self.base.weight, self.mixer.weight, self.mixer.bias, self.head.weight]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.step = -1

    def set_step(self, step: int) -> None:
        self.step = step

    def groups(self) -> list[dict[str, Any]]:
        fast = [self.mixer.weight, self.head.weight]
        slow = [self.mixer.bias, self.norm.weight, self.norm.bias, self.scale]
        return [
            {"name": "fast", "params": fast, "lr": 2e-2, "weight_decay": 0.1},
            {"name": "slow", "params": slow, "lr": 5e-3, "weight_decay": 0.0},
        ]

    def forward(
        self, batch: Batch, features: VisionFeatures, norms: Norms, weights: LossWeights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        states = self.norm(torch.tanh(self.mixer(self.base(batch.input_ids)))) * self.scale
        logits = self.head(states).float()
        ce = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        rows = states.float().mean((1, 2))
        dice = (rows[batch.mask_rows] - batch.masks.mean((1, 2))).square().sum()
        mse = (rows[batch.gen_rows] - features.embedding.float().mean(1)[batch.gen_rows]).square().sum()
        loss = share(ce, norms.tokens) + weights.seg * share(dice, norms.masks)
        loss = loss + weights.gen * share(mse, norms.pictures)
        counts = {"tokens": batch.counts().tokens, "masks": len(batch.masks), "pictures": len(batch.gen_rows)}
        sums = {"ce": ce.detach(), "dice": dice.detach(), "mse": mse.detach()}
        return loss, sums | {name: torch.tensor(float(count)) for name, count in counts.items()}


class ToyVision(nn.Module):
    """Stands where the CLIP tower stands."""

    def forward(self, pixels: Tensor) -> VisionFeatures:
        return VisionFeatures(tokens=pixels.flatten(1)[:, None], taps=(), embedding=pixels.flatten(2).mean(2))


def toy_batch(samples: list[int]) -> Batch:
    """Rows of unequal length, so that means over ranks would differ from the mean over the global batch."""
    ids, labels = torch.zeros(2, len(samples), 9, dtype=torch.long)
    labels[:] = IGNORE
    pixels, masks, mask_rows, gen_rows = [], [], [], []
    for row, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(1000 + sample)
        length = 2 + sample * 5 % 8
        ids[row] = torch.randint(VOCABULARY, (9,), generator=generator)
        labels[row, :length] = torch.randint(VOCABULARY, (length,), generator=generator)
        pixels.append(torch.rand(3, 4, 4, generator=generator))
        for _ in range(sample % 3):
            masks.append((torch.rand(2, 2, generator=generator) > 0.5).float())
            mask_rows.append(row)
        if sample % 4 == 0:
            gen_rows.append(row)
    return Batch(
        keys=[f"sample-{sample}" for sample in samples],
        tasks=["caption"] * len(samples),
        input_ids=ids,
        segment_ids=torch.arange(len(samples)).unsqueeze(1).expand_as(ids),
        position_ids=torch.arange(ids.shape[1]).expand_as(ids),
        labels=labels,
        pixel_values=torch.stack(pixels),
        mask_rows=torch.tensor(mask_rows, dtype=torch.long),
        mask_positions=torch.ones(len(mask_rows), dtype=torch.long),
        masks=torch.stack(masks) if masks else torch.zeros(0, 2, 2),
        gen_rows=torch.tensor(gen_rows, dtype=torch.long),
        gen_positions=torch.ones(len(gen_rows), dtype=torch.long),
    )


def toy_loader(ranks: Ranks, micro: int, first: int, last: int) -> list[list[Batch]]:
    """This rank's micro-batches of the steps first..last-1."""
    own = GLOBAL_BATCH // ranks.world_size
    steps = []
    for step in range(first, last):
        start = step * GLOBAL_BATCH + ranks.rank * own
        steps.append([toy_batch(list(range(at, at + micro))) for at in range(start, start + own, micro)])
    return steps


def build(case: dict[str, Any], ranks: Ranks) -> tuple[Toy, runtime.Engine]:
    """The toy under DeepSpeed as the case asks: stage (or a file of ds_configs), bf16, micro-batch."""
    model = Toy()
    plan = ds_config.plan_batch(GLOBAL_BATCH, ranks.world_size, micro_batch=case.get("micro", 2))
    settings = ds_config.OptimizerSettings(lr=1e-2, total_steps=12, warmup_steps=2, max_grad_norm=case.get("clip", 0.5))
    raw = ds_config.read_json(REPO / f"ds_configs/{case.get('file', 'z2')}.json") | case.get("extra", {})
    config = ds_config.resolve(
        raw,
        plan=plan,
        optimizer=settings,
        bf16=case.get("bf16", False),
        hidden_size=case.get("hidden"),
        on_cpu=ranks.device.type == "cpu",
    )
    return model, runtime.Engine(model, model.groups(), config, ranks, optimizer=settings)


def frozen_hash(engine: runtime.Engine) -> str:
    """sha256 of the frozen weights, gathered under ZeRO-3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([engine.module.base.weight]):
        weight = engine.module.base.weight.detach().float().cpu()
        return hashlib.sha256(weight.numpy().tobytes()).hexdigest()


def run_case(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Trains steps first..last-1 by the plain loop; saves at `save_at`, starts from `load`."""
    _, engine = build(case, ranks)
    facts: dict[str, Any] = {"losses": [], "norms": [], "before": frozen_hash(engine)}
    first = 0
    if case.get("load"):
        if case.get("dirty"):
            # A load must also replace moments that are there already.
            train_steps(engine, ranks, case, 9, 10, facts)
            facts["losses"].clear(), facts["norms"].clear()
        first = checkpoint.load_checkpoint(engine, case["load"])["step"]
        facts["lr"] = engine.learning_rates
        facts["steps"] = engine.steps
        if case.get("resave"):
            save(engine, case["resave"], first)
    for step in range(first, case["last"]):
        train_steps(engine, ranks, case, step, step + 1, facts)
        if case.get("save_at") == step + 1:
            save(engine, case["save_to"], step + 1)
    facts["after"] = frozen_hash(engine)
    facts["final_lr"] = engine.learning_rates
    engine.shut()
    return facts


def save(engine: runtime.Engine, folder: str, step: int) -> None:
    """A checkpoint, on disk when this returns."""
    saver = Saver(engine, folder)
    saver.save(step, {"reader": {"seed": 0}})
    saver.wait()


def train_steps(
    engine: runtime.Engine, ranks: Ranks, case: dict[str, Any], first: int, last: int, facts: dict[str, Any]
) -> None:
    """The loop of trainer.py in its barest form, so that the engine is tested alone."""
    vision, weights = ToyVision(), LossWeights()
    for batches in toy_loader(ranks, case.get("micro", 2), first, last):
        counts = ranks.sum(
            [float(sum(column)) for column in zip(*(batch.counts()[:3] for batch in batches), strict=True)]
        )
        scale = 1.0 / (ranks.world_size * len(batches))
        norms = Norms(tokens=counts[0] * scale, masks=counts[1] * scale, pictures=counts[2] * scale)
        total = 0.0
        for batch in batches:
            loss, _ = engine(batch, vision(batch.pixel_values), norms, weights)
            engine.backward(loss)
            moved = engine.step()
            total += loss.item() * scale
        assert moved
        facts["losses"].append(ranks.sum([total])[0])
        facts["norms"].append(engine.grad_norm)


def main() -> None:
    """Runs the plan."""
    plan, out = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    torch.set_num_threads(1)
    ranks = detect()
    runtime.start(ranks)
    try:
        results = {case["name"]: run_case(case, ranks) for case in plan}
        if ranks.is_main:
            out.write_text(json.dumps(results))
    finally:
        runtime.close()
    runtime.leave(0)


if __name__ == "__main__":
    main()
