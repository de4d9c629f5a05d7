"""A training run of the toy by the Trainer, for test_engine.py and test_faults.py: `trainer_job.py OPTIONS.json`.

OPTIONS: output_dir, last_step, file (of ds_configs), save_steps; signal_at (step at which rank 0 alone gets SIGUSR2),
nan_at (steps whose pixels are not numbers on the last rank), hang_at, slow (seconds per step), limit_at (step from
which rank 0 may write no file above 100 kB), vanish_at (step at which the output folder goes), and of the Trainer
max_bad_steps, hang_timeout.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engine_job import ToyVision, build, toy_loader

from pipeline.data.batch import Batch
from pipeline.runtime import checkpoint
from pipeline.runtime import engine as runtime
from pipeline.runtime.entry import run_ranks
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.trainer import Trainer


def batches(options: dict[str, Any], ranks: Ranks, first: int) -> Iterator[list[Batch]]:
    """The toy's steps, with what the options do to them."""
    last = ranks.rank == ranks.world_size - 1
    for step, micro in enumerate(toy_loader(ranks, 2, first, options["last_step"]), first):
        if step == options.get("signal_at") and ranks.is_main:
            os.kill(os.getpid(), signal.SIGUSR2)
        if step in options.get("nan_at", ()) and last:
            for batch in micro:
                batch.pixel_values[:] = float("nan")
        if step == options.get("limit_at") and ranks.is_main:
            # The limit stands for the disk: the kernel refuses the write in the same way.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        if step == options.get("vanish_at") and ranks.is_main:
            for thread in threading.enumerate():
                # What is being written when its folder goes is another fault.
                if thread.name == "checkpoint":
                    thread.join()
            shutil.rmtree(options["output_dir"])
            if options.get("in_its_place"):
                Path(options["output_dir"]).write_text("")
        if step == options.get("hang_at") and last:
            stuck_in_the_loader()
        time.sleep(options.get("slow", 0.0))
        yield micro


def stuck_in_the_loader() -> None:
    """What a file system that has gone does to a rank."""
    time.sleep(600)


def train(options: dict[str, Any], ranks: Ranks) -> None:
    """Trains, resuming from the output folder."""
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
        # Larger than what a run that meets the limit writes beside it.
        state={"reader": {"seed": 0}, "padding": "x" * 200_000 if "limit_at" in options else ""},
        max_bad_steps=options.get("max_bad_steps", 3),
        bad_steps=state.get("bad_steps"),
        hang_timeout=options.get("hang_timeout", 0.0),
    )
    ended = "FAILED"
    try:
        ended = {"DONE": "FINISHED", "REQUEUE": "KILLED"}[trainer.train()]
    finally:
        tracker.close(ended)


def main() -> int:
    """As train.py's."""
    options = json.loads(Path(sys.argv[-1]).read_text())
    torch.set_num_threads(1)
    return run_ranks("trainer_job.py", lambda ranks: train(options, ranks), hang_timeout=0.0)


if __name__ == "__main__":
    runtime.leave(main())
