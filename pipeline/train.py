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

from pipeline.assembly import parts, preflight
from pipeline.assembly import training as assembly
from pipeline.assembly.validation import make_validation, sheet_painter
from pipeline.config import DataArguments, ModelArguments, TrainArguments, parse
from pipeline.runtime import engine as runtime
from pipeline.runtime.checkpoint import agree_on_resume, load_checkpoint, read_state, set_aside
from pipeline.runtime.entry import run_ranks
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.stopping import DONE
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.trainer import Trainer


def run(model: ModelArguments, data: DataArguments, train: TrainArguments, ranks: Ranks) -> str:
    """Cheap checks first, then trains; returns how the run ended (DONE or REQUEUE).

    The process group must have been started.
    """
    preflight.check(model, data, train, ranks)
    if train.preflight:
        return DONE
    plan = assembly.plan_run(model, data, train, ranks)
    resume = agree_on_resume(train.resume, train.output_dir, ranks)
    if resume is not None:
        plan.check_resume(read_state(resume))
    with plan.explaining_memory():
        return tune(plan, resume)


def tune(plan: assembly.RunPlan, resume: Path | None) -> str:
    """Builds the parts in order and trains; returns how the run ended."""
    model, data, train, ranks = plan.model, plan.data, plan.train, plan.ranks
    began = time.perf_counter()
    vision = parts.load_vision(model, ranks.device)
    painter = sheet_painter(plan, vision)
    token_map = parts.load_token_map(model)
    collator = parts.make_collator(model, data, token_map, vision, train.seed)
    if train.resume == "never" and ranks.is_main and (earlier := set_aside(train.output_dir)):
        print(f"Starting anew; the earlier run's files are now in {earlier}.")
    if ranks.is_main:
        print(plan.describe(resume))

    tuner = assembly.prepare_tuner(plan, vision)
    groups = tuner.parameter_groups(train.lr, weight_decay=train.weight_decay, lrs=train.learning_rates)
    engine = runtime.Engine(tuner, groups, plan.deepspeed, ranks, optimizer=plan.optimizer)
    state = load_checkpoint(engine, resume) if resume is not None else {}
    first = state.get("step", 0)

    record = plan.record(tuner, token_map)
    tracker = Tracker(
        train.output_dir,
        experiment=train.mlflow_experiment,
        run_name=train.run_name or Path(train.output_dir).name,
        resume_step=first,
        run_id=state.get("mlflow_run_id"),
        enabled=ranks.is_main,
    )
    ended = "FAILED"
    try:
        assembly.log_record(tracker, record, train.output_dir, ranks, first)
        trainer = Trainer(
            engine,
            plan.batches(collator, first),
            vision,
            tracker,
            output_dir=train.output_dir,
            first_step=first,
            last_step=plan.steps,
            weights=plan.weights,
            seed=train.seed,
            logging_steps=train.logging_steps,
            save_steps=train.save_steps,
            keep=train.save_total_limit,
            eval_steps=train.eval_steps,
            on_validate=make_validation(
                plan, engine, tracker, vision=vision, token_map=token_map, collator=collator, painter=painter
            ),
            state=record,
            max_bad_share=data.max_bad_share,
            max_bad_steps=train.max_bad_steps,
            bad_steps=state.get("bad_steps"),
            hang_timeout=train.hang_timeout,
            flops_per_token=assembly.flops_per_token(tuner),
        )
        loaded = time.perf_counter()
        marker = trainer.train()
        ended = "FINISHED" if marker == DONE else "KILLED"
        assembly.log_seconds(train.output_dir, ranks, load=loaded - began, tune=time.perf_counter() - loaded)
        if marker == DONE:
            assembly.register(tracker, train.register_model, record, train.output_dir, plan.steps, ranks)
        if ranks.is_main and marker == DONE:
            print(plan.closing())
        return marker
    finally:
        tracker.close(ended)


def main() -> int:
    """Parse and run; returns the exit status."""
    model, data, train = parse(ModelArguments, DataArguments, TrainArguments, description=__doc__)
    return run_ranks("train.py", lambda ranks: run(model, data, train, ranks), hang_timeout=train.hang_timeout)


if __name__ == "__main__":
    runtime.leave(main())
