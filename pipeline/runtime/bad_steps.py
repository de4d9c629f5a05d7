"""Steps without finite loss or gradients: skipped, counted, named, and too many in a row stop the run.

DeepSpeed leaves out the update of a step whose gradients are not finite on any rank (Engine makes a loss that is not
finite such a step). Such a step is a step all the same: weights and Adam's moments and count stay, the order of
samples and the learning rate's schedule go on, so that both depend on the number of the step alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.data.batch import TrainingBatch
from pipeline.runtime.ranks import Ranks

FILE = "bad_steps.jsonl"
"""In the run's folder: {"step", "micro_batches": [{"rank", "loss", "keys", "tasks"}]} per skipped step."""


class BadSteps:
    """Counts skipped steps; `limit` in a row raise. `state`: what `state()` gave before a resume."""

    def __init__(self, ranks: Ranks, folder: str | Path, *, limit: int, state: Mapping[str, int] | None = None) -> None:
        self.ranks, self.path, self.limit = ranks, Path(folder) / FILE, limit
        self.total = (state or {}).get("total", 0)
        self.in_a_row = (state or {}).get("in_a_row", 0)

    def state(self) -> dict[str, int]:
        """For the checkpoint: Adam has made `step - total` updates."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def good(self) -> None:
        """A step that moved the weights."""
        self.in_a_row = 0

    def bad(self, step: int, batches: Sequence[TrainingBatch], losses: Sequence[float]) -> None:
        """A step (counted from 0) that did not. Collective: every rank calls it with its micro-batches.

        Raises FloatingPointError naming the samples when it is the `limit`-th in a row.
        """
        self.total += 1
        self.in_a_row += 1
        own = [
            {"rank": self.ranks.rank, "loss": str(loss), "keys": list(batch.keys), "tasks": list(batch.tasks)}
            for batch, loss in zip(batches, losses, strict=True)
        ]
        found = [record for records in self.ranks.gather(own) for record in records]
        # With finite losses it is the gradients that are not: any of the micro-batches may be the cause.
        named = [record for record in found if not math.isfinite(float(record["loss"]))] or found
        text = (
            f"step {step} has no finite {'loss' if named is not found else 'gradients'} and is skipped "
            f"({self.in_a_row} in a row, {self.total} in all): {'; '.join(map(_name, named))}"
        )
        if self.ranks.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "micro_batches": named}) + "\n")
            tqdm.write(text)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{text}. That is --max_bad_steps {self.limit} in a row; the weights are those of step "
                f"{step - self.in_a_row}. The samples are listed in {self.path}. A lower --lr, or leaving them out, "
                "may help"
            )


def _name(record: Mapping[str, Any]) -> str:
    return f"{', '.join(record['keys'])} (loss {record['loss']} on rank {record['rank']})"
