"""Checkpoints written while training goes on.

The ranks gather the trained state at a step's end, which is all that training waits for; a thread of rank 0 then
writes, syncs and renames (checkpoint.write). One is written at a time: the next save, the end of the run and a stop
wait for it. Older checkpoints are removed only after the new one is whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.runtime import checkpoint, elastic, faults
from pipeline.runtime.elastic import TrainedState
from pipeline.runtime.engine import Engine
from pipeline.runtime.faults import Fault


class Saver:
    """Saves an engine's trained state into `output_dir`, keeping the `keep` newest checkpoints (0: all)."""

    def __init__(
        self, engine: Engine, output_dir: str | Path, *, keep: int = 2, notify: Callable[[str], None] = tqdm.write
    ) -> None:
        self.engine, self.ranks, self.folder, self.keep = engine, engine.ranks, Path(output_dir), keep
        self._notify = notify
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._figures: list[tuple[int, dict[str, float]]] = []

    @property
    def failed(self) -> bool:
        """Whether the writing of the last checkpoint failed; known on rank 0 alone. `wait` then raises."""
        return self._error is not None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begins `checkpoint-<step>`. state: JSON-able facts besides the tensors. Collective: every rank calls it.

        Raises Fault, on every rank, if the checkpoint before could not be written.
        """
        began = time.perf_counter()
        self.wait()
        tensors = elastic.gather(self.engine)
        if not self.ranks.is_main:
            return
        facts = {"format": checkpoint.FORMAT, "step": step, "schedule": self.engine.schedule_state()}
        facts |= {"zero_stage": self.engine.stage, "world_size": self.ranks.world_size, **state}
        waited = time.perf_counter() - began
        self._thread = threading.Thread(target=self._write, args=(step, tensors, facts, waited), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Collective. Raises Fault, on every rank, if the writing failed."""
        self.join()
        text = self.ranks.from_main(self._explain(self._error) if self._error else None)
        self._error = None
        if text:
            raise Fault(text)

    def join(self) -> None:
        """The same for this rank alone, and without raising: for the way out of a run that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def figures(self) -> list[tuple[int, dict[str, float]]]:
        """(step, figures) of each checkpoint that has become whole since the last call; on rank 0."""
        found, self._figures = self._figures, []
        return found

    def _write(self, step: int, tensors: TrainedState, facts: dict[str, Any], waited: float) -> None:
        began = time.perf_counter()
        final = self.folder / f"checkpoint-{step}"
        try:
            if not self.folder.is_dir():
                self._notify(f"{self.folder} has vanished, and the checkpoints in it: it is made anew")
            size = checkpoint.write(final, tensors, facts)
            checkpoint.prune(self.folder, keep=self.keep, newest=final)
        except Exception as error:
            self._error = error
            return
        seconds = time.perf_counter() - began
        self._notify(f"{final} saved: {size / 1e6:.1f} MB in {seconds:.1f} s; training waited {waited:.1f} s")
        figures = {"save/bytes": float(size), "save/seconds": seconds, "save/waited_seconds": waited}
        self._figures.append((step, figures))

    def _explain(self, error: Exception) -> str:
        left = [path.name for _, path in checkpoint.list_checkpoints(self.folder)]
        kept = f"{self.folder} still holds {', '.join(left)}" if left else f"{self.folder} holds no checkpoint"
        if faults.is_full_disk(error):
            return f"the checkpoint was not written: {faults.full_disk(error)}. {kept}"
        return (
            f"the checkpoint was not written ({type(error).__name__}: {error}). {kept}. See that {self.folder} is "
            "there and can be written to, and give the same command again"
        )
