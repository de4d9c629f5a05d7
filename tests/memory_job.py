"""Bytes that a real DeepSpeed engine holds, for test_plan.py: `deepspeed --num_gpus 2 tests/memory_job.py OUT.json`.

One scaled model (the real classes, 4 layers 256 wide) under ZeRO-1, 2 and 3 one after another, two steps each. OUT gets
{stage: {part: bytes on this rank}} and what the plan says, of the rank where they differ most.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import tiny_tuner
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from pipeline.planning import counting, memory
from pipeline.runtime import ds_config
from pipeline.runtime import engine as runtime
from pipeline.runtime.ranks import Ranks, detect

REPO = Path(__file__).resolve().parent.parent
HIDDEN = 256
tiny_tuner.HIDDEN = HIDDEN
tiny_tuner.CONFIGS["scaled"] = LlamaConfig(
    **{**tiny_tuner.SIZES, "hidden_size": HIDDEN, "intermediate_size": 688, "num_hidden_layers": 4}
)
PARTS = ("base_weights", "trained_weights", "gradients", "optimizer")


def size(tensors: list[Any]) -> int:
    """Bytes behind the tensors, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(found.values())


def weights(engine: runtime.Engine, trained: bool) -> int:
    """Bytes of whole weights and of this rank's pieces."""
    wanted: list[nn.Parameter] = [p for p in engine.module.parameters() if p.requires_grad == trained]
    return size([p.data for p in wanted] + [getattr(p, "ds_tensor", None) for p in wanted])


def gradients(engine: runtime.Engine) -> int:
    """Bytes of gradients between the backward and the step."""
    zero: Any = engine._zero
    kept: list[Any] = [p.grad for p in engine.module.parameters()]
    for held in getattr(zero, "averaged_gradients", {}).values():
        kept += held if isinstance(held, list) else [held]
    for held in getattr(zero, "all_grad_tensors", {}).values():
        kept += held or []
    return size([*kept, getattr(zero, "grad_partitions_flat_buffer", None)])


def optimizer(engine: runtime.Engine) -> int:
    """Bytes of the fp32 master weights and of Adam's moments."""
    state = [value for held in engine._adam.state.values() for value in held.values() if torch.is_tensor(value)]
    return size([*engine._flat_groups(), *(value for value in state if value.numel() > 1)])


def measure(stage: int, accumulation: int, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Two steps as training does them; what the engine holds before the second and what the plan says it does."""
    tuner = tiny_tuner.build("scaled").train()
    count = counting.count_parameters(tuner, nn.Module())
    settings = ds_config.OptimizerSettings(lr=1e-3, total_steps=4)
    config = ds_config.resolve(
        ds_config.read_json(REPO / f"ds_configs/z{stage}.json"),
        plan=ds_config.plan_batch(4 * accumulation * ranks.world_size, ranks.world_size, micro_batch=4),
        optimizer=settings,
        bf16=True,
        hidden_size=HIDDEN,
        on_cpu=True,
    )
    engine = runtime.Engine(tuner, tuner.parameter_groups(1e-3), config, ranks, optimizer=settings)
    for turn in range(2 * accumulation):
        loss, _ = engine(tiny_tuner.batch(), tiny_tuner.features(4), tiny_tuner.NORMS)
        engine.backward(loss)
        if turn == accumulation:
            # With accumulation: between two passes of one step.
            held = {
                "base_weights": weights(engine, False),
                "trained_weights": weights(engine, True),
                "gradients": gradients(engine),
                "optimizer": optimizer(engine),
            }
        assert engine.step() == ((turn + 1) % accumulation == 0)
    engine.shut()
    planned = memory.states(count, memory.Zero.of(config, ranks.world_size))
    return {"held": held, "planned": {part: getattr(planned, part) for part in PARTS}}


def main() -> None:
    """Measures every stage."""
    torch.set_num_threads(1)
    ranks = detect()
    runtime.start(ranks)
    try:
        found = {
            f"ZeRO-{stage}, {passes} passes": [*itertools.chain(*ranks.gather([measure(stage, passes, ranks)]))]
            for stage, passes in ((1, 1), (1, 2), (2, 1), (3, 1))
        }
        if ranks.is_main:
            Path(sys.argv[-1]).write_text(json.dumps(found))
    finally:
        runtime.close()


if __name__ == "__main__":
    main()
