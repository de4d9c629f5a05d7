"""A training run of the toy by the Trainer, for test_engine.py: `python tests/trainer_job.py OPTIONS.json`.

OPTIONS: output_dir, last_step, file (of ds_configs), save_steps, signal_at (step at which rank 0 alone gets SIGUSR2).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engine_job import ToyVision, build, toy_loader

from pipeline.data.batch import Batch
from pipeline.runtime import checkpoint
from pipeline.runtime import engine as runtime
from pipeline.runtime.ranks import Ranks, detect
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.trainer import Trainer


def batches(options: dict[str, Any], ranks: Ranks, first: int) -> Iterator[list[Batch]]:
    """The toy's steps, with what the options do to them."""
    for step, micro in enumerate(toy_loader(ranks, 2, first, options["last_step"]), first):
        if step == options.get("signal_at") and ranks.is_main:
            os.kill(os.getpid(), signal.SIGUSR2)
        yield micro


def main() -> None:
    """Trains, resuming from the output folder."""
    options = json.loads(Path(sys.argv[-1]).read_text())
    torch.set_num_threads(1)
    ranks = detect()
    runtime.start(ranks)
    try:
        _, engine = build(options, ranks)
        found = ranks.from_main(checkpoint.find_latest(options["output_dir"]) if ranks.is_main else None)
        state = checkpoint.load_checkpoint(engine, found) if found else {}
        first = state.get("step", 0)
        tracker = Tracker(
            options["output_dir"],
            experiment="toy",
            run_name="toy",
            resume_step=first,
            run_id=state.get("mlflow_run_id"),
            enabled=ranks.is_main,
            system_metrics=False,
        )
        trainer = Trainer(
            engine,
            batches(options, ranks, first),
            ToyVision(),
            tracker,
            output_dir=options["output_dir"],
            first_step=first,
            last_step=options["last_step"],
            logging_steps=1,
            save_steps=options.get("save_steps", 0),
            keep=2,
            eval_steps=3,
            on_validate=lambda step: {"score": step / 10},
            state={"reader": {"seed": 0}},
        )
        ended = "FAILED"
        try:
            ended = {"DONE": "FINISHED", "REQUEUE": "KILLED"}[trainer.train()]
        finally:
            tracker.close(ended)
    finally:
        runtime.close()
    runtime.leave(0)


if __name__ == "__main__":
    main()
