r"""Tunes a frozen LLaMA on a packed data set with DeepSpeed: four tasks together.

    deepspeed pipeline/train.py --deepspeed ds_configs/z2.json                  # the embedded mini world
    deepspeed --num_gpus 2 pipeline/train.py --deepspeed ds_configs/z3.json     # two ranks, also without a GPU
    deepspeed pipeline/train.py --deepspeed ds_configs/z2.json \
        --preset 7b --base LLAMA --clip_weights CLIP --data SHARDS

Runs under the deepspeed launcher, torchrun, srun with one task per rank, or alone; slurm/ has scripts for clusters. It
goes on from the newest whole checkpoint of --output_dir; --resume never starts anew. Before any model is loaded all
that is missing or does not fit is listed; with --preflight that is all it does. --help lists every flag.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.assembly import parts, preflight, running
from pipeline.assembly.training import RunPlan, finish, flops_per_token, plan_run, prepare_tuner
from pipeline.assembly.validation import make_validation, sheet_painter
from pipeline.config import DataArguments, ModelArguments, TrainArguments, parse
from pipeline.runtime import engine as runtime
from pipeline.runtime.checkpoint import agree_on_resume, read_state
from pipeline.runtime.entry import run_ranks
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.stopping import DONE


def run(model: ModelArguments, data: DataArguments, train: TrainArguments, ranks: Ranks) -> str:
    """Cheap checks first, then trains; returns how the run ended (DONE or REQUEUE).

    The process group must have been started.
    """
    preflight.check(model, data, train, ranks)
    if train.preflight:
        return DONE
    plan = plan_run(model, data, train, ranks)
    resume = agree_on_resume(train.resume, train.output_dir, ranks)
    if resume is not None:
        plan.check_resume(read_state(resume))
    with plan.explaining_memory():
        return tune(plan, resume)


def tune(plan: RunPlan, resume: Path | None) -> str:
    """Builds the parts in order and trains; returns how the run ended."""
    model, data, train = plan.model, plan.data, plan.train
    began = time.perf_counter()
    vision = parts.load_vision(model, plan.ranks.device)
    painter = sheet_painter(plan, vision)
    token_map = parts.load_token_map(model)
    collator = parts.make_collator(model, data, token_map, vision, train.seed)
    running.announce(plan.schedule, plan.describe(), resume)
    tuner = prepare_tuner(plan, vision)
    record = plan.record(tuner, token_map)
    return running.train(
        plan.schedule,
        tuner,
        tuner.parameter_groups(train.lr, weight_decay=train.weight_decay, lrs=train.learning_rates),
        resume=resume,
        collator=collator,
        features=vision,
        record=record,
        make_validation=lambda engine, tracker: make_validation(
            plan, engine, tracker, vision=vision, token_map=token_map, collator=collator, painter=painter
        ),
        flops_per_token=flops_per_token(tuner),
        finish=lambda tracker: finish(plan, tracker, record),
        began=began,
        weights=plan.weights,
    )


def main() -> int:
    """Parse and run; returns the exit status."""
    model, data, train = parse(ModelArguments, DataArguments, TrainArguments, description=__doc__)
    return run_ranks("train.py", lambda ranks: run(model, data, train, ranks), hang_timeout=train.hang_timeout)


if __name__ == "__main__":
    runtime.leave(main())
