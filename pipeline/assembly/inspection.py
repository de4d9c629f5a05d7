"""One run of look_inside.py: which units of a checkpoint fire for which task, as figures, tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.assembly import parts
from pipeline.assembly.loading import check_base, default_dtype, open_checkpoint, untrained_tuner
from pipeline.config import InspectArguments
from pipeline.data.batch import Batch, VisionFeatures
from pipeline.data.loader import build_loader
from pipeline.data.order import SampleOrder
from pipeline.model.firing import Firing, record
from pipeline.runtime.checkpoint import load_trained
from pipeline.scoring.overlap import format_overlap, frequency, mean_chance, overlap_table
from pipeline.scoring.overlap_figures import draw_firing, draw_overlap
from pipeline.scoring.report import replace_text


class Inspection:
    """Loads what a checkpoint names. Raises ValueError for a path or file that does not fit."""

    def __init__(self, args: InspectArguments, device: torch.device) -> None:
        self.args, self.device = args, device
        self.trained = trained = open_checkpoint(args.checkpoint, args.replaced)
        self.folder = Path(args.output_dir or trained.folder.parent / "units")
        check_base(trained)
        self.dataset = parts.open_split(trained.data.data, args.split)
        self.tasks = list(trained.data.task_names)
        token_map = parts.load_token_map(trained.model)
        self.vision = parts.load_vision(trained.model, device)
        self.collator = parts.make_collator(trained.model, trained.data, token_map, self.vision, trained.seed)
        self.tuner = untrained_tuner(trained, self.vision, device, default_dtype(device))

    def run(self) -> str:
        """The model as it started and as it was tuned, on the same samples; writes the files and returns the table."""
        untuned = self._record("untuned")
        load_trained(self.tuner, self.trained.folder)
        tuned = self._record("tuned")
        found = {"tuned": overlap_table(tuned, self.args.seed), "untuned": overlap_table(untuned, self.args.seed)}
        by_chance = mean_chance(found["tuned"])
        self.folder.mkdir(parents=True, exist_ok=True)
        rates = {task: frequency(firing.fired) for task, firing in tuned.items()}
        firing = draw_firing(rates, self.folder / "firing.png")
        matrices = draw_overlap(found, self.tasks, by_chance, self.folder / "overlap.png")
        table = format_overlap(found, by_chance)
        places = ", ".join(f"{len(one.tokens):,} of {task}" for task, one in tuned.items())
        folder = self.trained.folder
        note = f"{folder.parent.name}/{folder.name} on {self.args.split}; answer tokens: {places}."
        replace_text(
            self.folder / "units.md",
            f"# Which units fire for which task\n\n![]({firing.name})\n\n![]({matrices.name})\n\n{table}\n{note}\n",
        )
        data = {
            "checkpoint": str(self.trained.folder),
            "split": self.args.split,
            "chance": by_chance,
            "overlap": found,
            "rates": {task: values.round(4).tolist() for task, values in rates.items()},
        }
        replace_text(self.folder / "units.json", json.dumps(data) + "\n")
        return f"{table}\n{note}\nFigures and tables: {self.folder}"

    def _record(self, name: str) -> dict[str, Firing]:
        samples = min(self.args.samples, len(self.dataset))
        size = min(self.args.batch, samples)
        count = samples // size

        def watched(task: str) -> Iterator[tuple[Batch, VisionFeatures]]:
            batches = self._batches(task, size, count)
            return iter(tqdm(batches, desc=f"{name} {task}", total=count, unit="batch", leave=False))

        return {task: record(self.tuner, watched(task), task) for task in self.tasks}

    def _batches(self, task: str, size: int, count: int) -> Iterator[tuple[Batch, VisionFeatures]]:
        """The first `count` batches of `size` samples of the split, each asked for this task."""
        order = SampleOrder(len(self.dataset), 0, size, (task,), (1.0,))
        loader = build_loader(
            self.dataset,
            order,
            self.collator,
            rank=0,
            world=1,
            micro_batch=size,
            last_step=count,
            max_bad_share=1.0,
        )
        with torch.no_grad():
            for _, batches in loader:
                for batch in batches:
                    moved = batch.to(self.device)
                    yield moved, self.vision(moved.pixel_values)
