"""One rank of a run that only reads: for test_resume.py, which kills it.

    RANK=0 WORLD_SIZE=1 MEETING=file DATA=shards python tests/reader_job.py FOLDER WORKERS GLOBAL_BATCH STEPS EVERY

Each step, the ranks' keys are gathered, and rank 0 appends them to FOLDER/log. Every EVERY steps it writes the trained
step into FOLDER/state, as a checkpoint does. A start goes on from there, after cutting from the log what came later.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.data.loader import build_loader
from pipeline.data.manifest import write_atomic
from pipeline.data.mixture import make_order, open_data


class Lines:
    """Stands for the collator: `key/epoch/task` of each sample that was read."""

    def __call__(self, good: Any, bad: Any) -> Any:
        made = Lines()
        made.keys, made.skipped = [f"{sample.key}/{item.epoch}/{item.task}" for sample, item in good], list(bad)
        return made

    keys: list[str]
    skipped: list[str]


def main() -> None:
    """Read, log, and end after the last step."""
    folder = Path(sys.argv[1])
    workers, batch, steps, every = map(int, sys.argv[2:6])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=rank, world_size=world)
    first = int((folder / "state").read_text()) if (folder / "state").exists() else 0
    log = folder / "log"
    if rank == 0:
        lines = log.read_text().splitlines(keepends=True)[:first] if log.exists() else []
        write_atomic(log, "".join(lines).encode())
    dist.barrier()
    data = open_data(os.environ["DATA"], "train")
    order = make_order(
        data, seed=1, global_batch=batch, tasks=("caption", "referring"), task_mix=(1, 1), weights=(2.0, 1.0), window=40
    )
    loader = build_loader(
        data, order, Lines(), rank=rank, world=world, micro_batch=1, first_step=first, last_step=steps,
        num_workers=workers,
    )  # type: ignore[arg-type]  # fmt: skip
    with log.open("a") as file:
        for step, micros in loader:
            mine = [line for micro in micros for line in micro.keys]
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, mine)
            if rank == 0:
                file.write(f"{step} " + " ".join(line for part in everyone for line in part) + "\n")
                file.flush()
                if (step + 1) % every == 0 or step + 1 == steps:
                    write_atomic(folder / "state", str(step + 1).encode())
            time.sleep(0.02)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
