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

import time

from pipeline.assembly import parts, running
from pipeline.assembly.prior import plan_prior
from pipeline.config import PriorArguments, RunArguments, parse
from pipeline.model.prior_training import PictureCoder
from pipeline.runtime import engine as runtime
from pipeline.runtime.checkpoint import agree_on_resume, read_state
from pipeline.runtime.entry import run_ranks
from pipeline.runtime.ranks import Ranks


def run(args: PriorArguments, settings: RunArguments, ranks: Ranks) -> str:
    """Builds the parts in order, cheap checks first, and trains; returns how the run ended (DONE or REQUEUE)."""
    began = time.perf_counter()
    plan = plan_prior(args, settings, ranks)
    resume = agree_on_resume(settings.resume, settings.output_dir, ranks)
    vision = parts.load_tower(args.clip, args.clip_weights, ranks.device)
    config = plan.prior_config(vision)
    if resume is not None:
        plan.check_resume(read_state(resume), config)
    running.announce(plan.schedule, plan.describe(config), resume)
    model = plan.make_model(config)
    record = plan.record(config, model)
    collator, coder = plan.make_collator(vision), PictureCoder(vision, plan.decoder)
    return running.train(
        plan.schedule,
        model,
        model.parameter_groups(settings.lr, settings.weight_decay),
        resume=resume,
        collator=collator,
        features=coder,
        record=record,
        make_validation=lambda engine, tracker: plan.validation(collator, engine, coder),
        flops_per_token=6.0 * record["parameters"]["trained"],
        finish=lambda tracker: plan.write_prior(config) if ranks.is_main else "",
        began=began,
    )


def main() -> int:
    """Parse and run; returns the exit status."""
    args, settings = parse(PriorArguments, RunArguments, description=__doc__)
    return run_ranks("pretrain_prior.py", lambda ranks: run(args, settings, ranks), hang_timeout=settings.hang_timeout)


if __name__ == "__main__":
    runtime.leave(main())
