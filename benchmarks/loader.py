"""Speed of reading: our loader beside loose files as the authors read them and beside plain webdataset.

    python benchmarks/loader.py
    python benchmarks/loader.py --rows MMUD/train.pkl --images MMUD/MergedImages --samples 4000 --workers 4
    python benchmarks/loader.py --csv benchmarks/results.csv

MMUD rows are repeated, each with a picture file of its own, until there are --samples of them. The cases:

    loose files       a map-style Dataset over the pickle and the picture files, as the released code reads: each
                      picture decoded and put through open_clip's preprocessing at full size, each polygon rasterised at
                      full size and shrunk to 224 pixels
    webdataset        plain webdataset over our shards, then our transforms
    ours              our loader over the same shards
    ours, resized     our loader over shards whose pictures were resized once at packing (--resize 256)

All make the same: batches of CLIP pixels [3,224,224], masks, token ids and labels of the caption and reasoning tasks in
turn. CPU time is of all processes; it says more than samples per second on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import pickle
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from pipeline.data import prompts, rle
from pipeline.data.collate import Collator
from pipeline.data.loader import build_loader
from pipeline.data.mixture import make_order, open_data
from pipeline.data.mmud import MmudSource
from pipeline.data.mmud_rows import parse_dialogue
from pipeline.data.order import Item
from pipeline.data.schema import Sample
from pipeline.data.tokens import TokenMap
from pipeline.data.writer import pack

REPO = Path(__file__).resolve().parents[1]
SIDE, MASK_SIDE, BATCH = 224, 144, 16
TASKS = ("reasoning", "caption")


@dataclass(frozen=True)
class Measured:
    """One case: samples, wall seconds, CPU seconds of all processes."""

    case: str
    samples: int
    wall: float
    cpu: float

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per sample."""
        return 1000 * self.cpu / self.samples


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(case: str, make: Callable[[], Iterable[int]]) -> Measured:
    """`make()` gives an iterable of numbers of samples; it is gone through once."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    samples = sum(make())
    return Measured(case, samples, time.perf_counter() - wall, cpu_seconds() - cpu)


def make_collator() -> Collator:
    """As for LLaMA with CLIP ViT-L/14 at 224 pixels, with the mini world's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(REPO / "models" / "mini" / "llm")
    token_map = TokenMap(tokenizer, len(tokenizer), 8)
    return Collator(
        token_map,
        image_size=SIDE,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        mask_size=MASK_SIDE,
        image_prefix=prompts.image_prefix("", 257),
        max_length=768,
        tasks=TASKS,
    )


class LooseFiles(Dataset[dict[str, Any]]):
    """What the released code's Dataset does for a row: pictures and polygons at full size, then shrunk."""

    def __init__(self, rows: list[Any], images: Path, collator: Collator) -> None:
        self.rows, self.images, self.token_map = rows, images, collator.token_map
        self.transform = open_clip.image_transform(SIDE, is_train=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, caption, enriched, _, masks, *_ = self.rows[i]
        picture = Image.open(self.images / path).convert("RGB")
        question, answer = parse_dialogue(enriched)
        targets = []
        if i % 2 == 0:
            question, answer = "Describe the picture.", caption
        else:
            for mask in masks:
                flat = rle.from_annotation(mask[0]) if isinstance(mask[0], dict) else None
                full = rle.decode(flat or rle.from_polygons([mask], picture.height, picture.width))
                half = torch.from_numpy(np.ascontiguousarray(full))[None, None].float()
                targets.append(torch.nn.functional.interpolate(half, (SIDE, SIDE), mode="nearest")[0, 0])
        ids = self.token_map.encode(prompts.dialogue(question)) + self.token_map.encode(" " + answer, continued=True)
        return {"pixels": self.transform(picture), "masks": targets, "ids": ids}

    @staticmethod
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad, stack."""
        ids = [torch.tensor(row["ids"]) for row in rows]
        return {
            "pixels": torch.stack([row["pixels"] for row in rows]),
            "masks": [mask for row in rows for mask in row["masks"]],
            "ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        }


def loose_files(rows: list[Any], images: Path, collator: Collator, workers: int) -> Iterator[int]:
    """Samples of each batch."""
    dataset = LooseFiles(rows, images, collator)
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, collate_fn=dataset.collate)
    yield from (len(batch["ids"]) for batch in loader)


def plain_webdataset(folder: Path, samples: int, collator: Collator, workers: int) -> Iterator[int]:
    """Samples of each batch."""

    def to_sample(found: dict[str, Any]) -> Sample:
        return Sample.from_json(found["json"], image=found["jpg"], image_format="jpg")

    def collate(part: list[Sample]) -> Any:
        return collator([(sample, Item(i, 0, TASKS[i % 2])) for i, sample in enumerate(part)])

    urls = sorted(str(path) for path in folder.glob("train-*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(500).map(to_sample)
    loader = DataLoader(data.batched(BATCH, collation_fn=collate), batch_size=None, num_workers=workers)
    yield from (len(batch.keys) for batch in loader)


def ours(folder: Path, samples: int, collator: Collator, workers: int) -> Iterator[int]:
    """Samples of each batch."""
    data = open_data(str(folder), "train")
    order = make_order(data, seed=0, global_batch=BATCH, tasks=TASKS, task_mix=(1.0, 1.0), window=16384)
    loader = build_loader(
        data, order, collator, micro_batch=BATCH, last_step=samples // BATCH, num_workers=workers
    )  # fmt: skip
    yield from (len(batch.keys) for _, batches in loader for batch in batches)


def tiled(rows_path: Path, images: Path, samples: int, folder: Path) -> list[Any]:
    """`samples` rows, each with a picture file of its own, and `folder`/train.pkl of them."""
    rows = pickle.loads(rows_path.read_bytes())
    made = []
    for number in range(samples):
        row = rows[number % len(rows)]
        found = images / row[0].replace("\\", "/").split("/")[-1]
        if not found.exists():
            found = images / found.name.rsplit("_", 1)[-1]
        name = f"{number:012d}.jpg"
        shutil.copyfile(found, folder / name)
        made.append((name, *row[1:]))
    (folder / "train.pkl").write_bytes(pickle.dumps(made))
    return made


def run(arguments: argparse.Namespace) -> list[Measured]:
    """Make the data, measure each case once, and packing too."""
    torch.set_num_threads(1)
    collator, results = make_collator(), []
    with tempfile.TemporaryDirectory(dir=arguments.scratch or None) as scratch:
        loose, plain, small = (Path(scratch) / name for name in ("loose", "plain", "small"))
        loose.mkdir()
        rows = tiled(Path(arguments.rows), Path(arguments.images), arguments.samples, loose)
        size = sum(path.stat().st_size for path in loose.glob("*.jpg"))
        for case, out, resize in (("packing", plain, None), ("packing, resized", small, 256)):
            source = MmudSource(loose, loose)
            how = {"workers": max(arguments.workers, 1), "samples_per_shard": 250, "resize": resize}
            packed = measure(case, lambda out=out, how=how, source=source: _pack(source, out, how))
            results.append(packed)
            print(
                f"{case}: {packed.samples / packed.wall:.0f} samples/s, {size / packed.wall / 1e6:.0f} MB/s", flush=True
            )
        cases: list[tuple[str, Callable[[], Iterable[int]]]] = [
            ("loose files", lambda: loose_files(rows, loose, collator, arguments.workers)),
            ("webdataset", lambda: plain_webdataset(plain, arguments.samples, collator, arguments.workers)),
            ("ours", lambda: ours(plain, arguments.samples, collator, arguments.workers)),
            ("webdataset, resized", lambda: plain_webdataset(small, arguments.samples, collator, arguments.workers)),
            ("ours, resized", lambda: ours(small, arguments.samples, collator, arguments.workers)),
        ]
        results += [measure(case, make) for case, make in cases]
    return results


def _pack(source: MmudSource, out: Path, how: dict[str, Any]) -> Iterator[int]:
    yield pack(source, "train", out, progress=False, **how).samples


def table(results: list[Measured]) -> str:
    """Markdown; the loose files are what the others are measured against."""
    base = next(each for each in results if each.case == "loose files")
    lines = ["| case | samples/s | CPU ms/sample | per CPU-second, loose files = 1 |", "|---|---|---|---|"]
    lines += [
        f"| {each.case} | {each.samples / each.wall:.0f} | {each.cpu_ms:.2f} | {base.cpu_ms / each.cpu_ms:.2f} |"
        for each in results
    ]
    return "\n".join(lines)


def append_csv(path: Path, results: list[Measured], workers: int) -> None:
    """One line per case: date, benchmark, case, metric, value, and where it was measured."""
    new = not path.exists()
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {workers} workers"
    with path.open("a", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        if new:
            lines.writerow(["date", "benchmark", "case", "metric", "value", "where"])
        today = datetime.date.today().isoformat()
        for each in results:
            lines.writerow([today, "loader", each.case, "cpu_ms_per_sample", f"{each.cpu_ms:.3f}", where])
            lines.writerow([today, "loader", each.case, "samples_per_s", f"{each.samples / each.wall:.1f}", where])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=str(REPO / "tests/data/mmud/train.pkl"), help="pickle of MMUD rows")
    parser.add_argument("--images", default=str(REPO / "tests/data/mmud/images"), help="folder with their pictures")
    parser.add_argument("--samples", type=int, default=2000, help="rows after repeating")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0: the main process reads")
    parser.add_argument("--scratch", default="", help="folder for the data that is made; default: the system's")
    parser.add_argument("--csv", default="", help="file that the results are appended to")
    arguments = parser.parse_args()
    results = run(arguments)
    print(table(results))
    if arguments.csv:
        append_csv(Path(arguments.csv), results, arguments.workers)


if __name__ == "__main__":
    main()
