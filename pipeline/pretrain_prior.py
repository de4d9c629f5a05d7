r"""Trains the image prior: the transformer that draws a picture's codes, given its CLIP embedding.

    python pipeline/pretrain_prior.py                                            # of the embedded mini world
    deepspeed pipeline/pretrain_prior.py --deepspeed ds_configs/z2.json --preset clipgen \
        --data shards/coco --vqgan models/vqgan --clip_weights vit_b_32_openai.safetensors

Language-free (CLIP-GEN): the condition is the CLIP embedding of the picture itself, so captions play no part. Runs
under the deepspeed launcher, torchrun, srun with one task per rank, or alone, and goes on from the newest whole
checkpoint of --output_dir on any number of ranks. Ends in <output_dir>/prior, a folder for --prior. --help lists every
flag.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.assembly import parts
from pipeline.assembly.prior import plan_prior
from pipeline.assembly.training import log_record
from pipeline.config import PriorArguments, RunArguments, parse
from pipeline.model.prior_training import PictureCoder
from pipeline.runtime import engine as runtime
from pipeline.runtime.checkpoint import agree_on_resume, load_checkpoint, read_state, set_aside
from pipeline.runtime.entry import run_ranks
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.stopping import DONE
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.trainer import Trainer


def run(args: PriorArguments, settings: RunArguments, ranks: Ranks) -> str:
    """Builds the parts in order, cheap checks first, and trains; returns how the run ended (DONE or REQUEUE)."""
    plan = plan_prior(args, settings, ranks)
    resume = agree_on_resume(settings.resume, settings.output_dir, ranks)
    vision = parts.load_tower(args.clip, args.clip_weights, ranks.device)
    config = plan.prior_config(vision)
    if resume is not None:
        plan.check_resume(read_state(resume), config)
    if settings.resume == "never" and ranks.is_main and (earlier := set_aside(settings.output_dir)):
        print(f"Starting anew; the earlier run's files are now in {earlier}.")
    if ranks.is_main:
        print(plan.describe(resume, config))

    model = plan.make_model(config)
    groups = model.parameter_groups(settings.lr, settings.weight_decay)
    engine = runtime.Engine(model, groups, plan.deepspeed, ranks, optimizer=plan.optimizer)
    state = load_checkpoint(engine, resume) if resume is not None else {}
    first = state.get("step", 0)

    record = plan.record(config, model)
    collator, coder = plan.make_collator(vision), PictureCoder(vision, plan.decoder)
    tracker = Tracker(
        settings.output_dir,
        experiment=settings.mlflow_experiment,
        run_name=settings.run_name or Path(settings.output_dir).name,
        resume_step=first,
        run_id=state.get("mlflow_run_id"),
        enabled=ranks.is_main,
    )
    ended = "FAILED"
    try:
        log_record(tracker, record, settings.output_dir, ranks, first)
        trainer = Trainer(
            engine,
            plan.batches(collator, first),
            coder,
            tracker,
            output_dir=settings.output_dir,
            first_step=first,
            last_step=plan.steps,
            seed=settings.seed,
            logging_steps=settings.logging_steps,
            save_steps=settings.save_steps,
            keep=settings.save_total_limit,
            eval_steps=settings.eval_steps,
            on_validate=plan.validation(collator, engine, coder) if settings.eval_steps else None,
            state=record,
            max_bad_share=args.max_bad_share,
            max_bad_steps=settings.max_bad_steps,
            bad_steps=state.get("bad_steps"),
            hang_timeout=settings.hang_timeout,
            flops_per_token=6.0 * record["parameters"]["trained"],
        )
        marker = trainer.train()
        ended = "FINISHED" if marker == DONE else "KILLED"
        if ranks.is_main and marker == DONE:
            print(plan.write_prior(config))
        return marker
    finally:
        tracker.close(ended)


def main() -> int:
    """Parse and run; returns the exit status."""
    args, settings = parse(PriorArguments, RunArguments, description=__doc__)
    return run_ranks("pretrain_prior.py", lambda ranks: run(args, settings, ranks), hang_timeout=settings.hang_timeout)


if __name__ == "__main__":
    runtime.leave(main())
