"""Speed of reading: our loader beside loose files as the authors read them and beside plain webdataset.

    python benchmarks/loader.py
    python benchmarks/loader.py --rows MMUD/train.pkl --images MMUD/MergedImages --samples 4000 --workers 4
    python benchmarks/loader.py --csv benchmarks/results.csv

MMUD rows are repeated, each with a picture file of its own, until there are --samples of them. The cases:

    loose files          a map-style Dataset over the pickle and the picture files that does what the released one does:
                         each picture opened by PIL and put through CLIP's preprocessing from its full size, each mask
                         of the sample rasterised at full size and resized to 224 pixels. The preprocessing is
                         open_clip's, squashing as that code does; the Hugging Face processor it calls takes longer
    webdataset           plain webdataset over our shards, then our transforms
    ours                 our loader over the same shards
    webdataset, resized  as above, over shards whose pictures were resized once at packing (--resize 224)
    ours, resized        as above, over these

All make batches of CLIP pixels [3,224,224], masks, token ids and labels of the four tasks, a quarter each; of every
sample webdataset and ours make the same. The cases take turns, --rounds times, every second time in reverse, so that a
busy machine is busy for all of them, each time in a new process. CPU time is of all processes; it says more than
samples per second on such a machine. Packing and opening the index of 36,000 samples are measured too.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import multiprocessing
import operator
import os
import pickle
import platform
import resource
import shutil
import subprocess
import sys
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
from pycocotools import mask as coco_masks
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from pipeline.data import manifest, prompts
from pipeline.data.batch import Batch
from pipeline.data.collate import Collator
from pipeline.data.files import find_image
from pipeline.data.loader import build_loader
from pipeline.data.mixture import MixedDataset, make_order, open_data
from pipeline.data.mmud import MmudSource
from pipeline.data.mmud_rows import parse_dialogue
from pipeline.data.order import Item, SampleOrder
from pipeline.data.schema import OBJECT_TAG, SCHEMA_VERSION, Sample
from pipeline.data.tasks import TASKS
from pipeline.data.tokens import TokenMap
from pipeline.data.unpickle import load_pickle
from pipeline.data.writer import pack

REPO = Path(__file__).resolve().parents[1]
SIDE, MASK_SIDE, BATCH = 224, 144, 16
INDEX_SAMPLES, INDEX_SHARD = 36_000, 1000
_OPEN_INDEX = """
import psutil, sys, time
from pipeline.data.reader import ShardDataset
me = psutil.Process()
before, began = me.memory_info().rss, time.process_time()
data = ShardDataset(sys.argv[1], "train")
print(len(data), time.process_time() - began, (me.memory_info().rss - before) / 1e6)
"""


@dataclass(frozen=True)
class Measured:
    """One case: samples, wall seconds, CPU seconds of all processes."""

    case: str
    samples: int
    wall: float
    cpu: float

    def __add__(self, other: Measured) -> Measured:
        assert self.case == other.case
        return Measured(self.case, self.samples + other.samples, self.wall + other.wall, self.cpu + other.cpu)

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per sample."""
        return 1000 * self.cpu / self.samples


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(case: str, make: Callable[[], Iterable[int]]) -> Measured:
    """`make()` gives an iterable of numbers of samples; it is gone through once, in a process of its own.

    As loaders' workers are: in one process for all, the state in which a case left the heap made for 27 to 99 page
    faults in each sample of the next, a difference of 4 % of its time.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(sum(make())))
    wall, cpu = time.perf_counter(), cpu_seconds()
    process.start()
    process.join()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    if process.exitcode:
        raise SystemExit(f"the case '{case}' ended with exit status {process.exitcode}")
    return Measured(case, receiver.recv(), wall, cpu)


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
    )


class LooseFiles(Dataset[dict[str, Any]]):
    """What the released code's Dataset does for a row: the picture and all of its masks at full size, then resized."""

    def __init__(self, rows: list[Any], images: Path, collator: Collator) -> None:
        self.rows, self.images, self.token_map = rows, images, collator.token_map
        self.transform = open_clip.image_transform(SIDE, is_train=False, resize_mode="squash")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, caption, enriched, phrases, masks, _, height, width, *_ = self.rows[i]
        pixels = self.transform(Image.open(self.images / path))
        targets = [self._mask(mask, height, width) for mask in masks]
        task = tuple(TASKS)[i % 4]
        if task == "reasoning":
            question, answer = parse_dialogue(enriched)
            targets = [targets[int(tag[1]) - 1] for tag in OBJECT_TAG.finditer(answer)]
        elif task == "referring":
            question = f"Segment {', '.join(each[0] for each in phrases)}."
            answer = ", ".join(f"<OBJ-{n}>" for n in range(1, len(masks) + 1))
        else:
            question, answer = ("Describe the picture.", caption) if task == "caption" else (f"Draw {caption}", "<GEN>")
            targets = []
        ids = self.token_map.encode(prompts.dialogue(question)) + self.token_map.encode(" " + answer, continued=True)
        return {"pixels": pixels, "masks": targets, "ids": ids}

    @staticmethod
    def _mask(mask: Any, height: int, width: int) -> torch.Tensor:
        rles = mask if isinstance(mask[0], dict) else coco_masks.frPyObjects([mask], height, width)
        full_HW = coco_masks.decode(rles).sum(axis=2) == 1
        small = Image.fromarray(full_HW.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(small)).long()

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


def plain_webdataset(folder: Path, places: dict[str, Item], collator: Collator, workers: int) -> Iterator[Batch]:
    """Batches. `places` from places_of: so each sample has the task, and the task's draws, that it has with ours."""

    def to_sample(found: dict[str, Any]) -> Sample:
        return Sample.from_json(found["json"], image=found["jpg"], image_format="jpg")

    def collate(part: list[Sample]) -> Batch:
        return collator([(sample, places[sample.key]) for sample in part])

    urls = sorted(str(path) for path in folder.glob("train-*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(500).map(to_sample)
    yield from DataLoader(data.batched(BATCH, collation_fn=collate), batch_size=None, num_workers=workers)


def open_ours(folder: Path) -> tuple[MixedDataset, SampleOrder]:
    """The packed data set, and the order in which ours reads it."""
    data = open_data(str(folder), "train")
    order = make_order(data, seed=0, global_batch=BATCH, tasks=tuple(TASKS), task_mix=(1.0,) * 4, window=16384)
    return data, order


def places_of(folder: Path) -> dict[str, Item]:
    """Each sample's place in the first epoch of ours, by its key."""
    data, order = open_ours(folder)
    items = (item for step in range(len(order)) for item in order.items(step) if item.epoch == 0)
    return {data.key(item.sample): item for item in items}


def ours(folder: Path, collator: Collator, workers: int) -> Iterator[Batch]:
    """The first epoch's whole batches."""
    data, order = open_ours(folder)
    loader = build_loader(data, order, collator, micro_batch=BATCH, last_step=len(data) // BATCH, num_workers=workers)
    yield from (batch for _, batches in loader for batch in batches)


def sizes(batches: Iterable[Batch]) -> Iterator[int]:
    """Samples of each batch."""
    return (len(batch.keys) for batch in batches)


def tiled(pickles: list[Path], images: Path, samples: int, folder: Path) -> list[Any]:
    """`samples` rows, each with a picture file of its own, and `folder`/train.pkl of them."""
    rows = [row for path in pickles for row in load_pickle(path)]
    made = []
    for number in range(samples):
        row = rows[number % len(rows)]
        found = find_image(images, row[0])
        if found is None:
            raise SystemExit(f"{row[0]} is not under {images}: point --images to the rows' pictures")
        name = f"{number:012d}.jpg"
        shutil.copyfile(found, folder / name)
        made.append((name, *row[1:]))
    (folder / "train.pkl").write_bytes(pickle.dumps(made))
    return made


def packing(loose: Path, out: Path, workers: int, resize: int | None) -> Iterator[int]:
    """Samples packed."""
    source = MmudSource(loose, loose)
    yield pack(source, "train", out, workers=workers, samples_per_shard=250, resize=resize, progress=False).samples


def run(arguments: argparse.Namespace) -> tuple[list[Measured], int]:
    """Make the data, measure packing, and each case --rounds times in turn; (results, bytes of the pictures)."""
    torch.set_num_threads(1)
    collator, samples, workers = make_collator(), arguments.samples, arguments.workers
    with tempfile.TemporaryDirectory(dir=arguments.scratch or None) as scratch:
        loose, plain, small = (Path(scratch) / name for name in ("loose", "plain", "small"))
        loose.mkdir()
        rows = tiled([Path(path) for path in arguments.rows], Path(arguments.images), samples, loose)
        size = sum(path.stat().st_size for path in loose.glob("*.jpg"))
        results = [
            measure("packing", lambda: packing(loose, plain, max(workers, 1), None)),
            measure("packing, resized", lambda: packing(loose, small, max(workers, 1), SIDE)),
        ]
        places = places_of(plain)
        cases: dict[str, Callable[[], Iterable[int]]] = {
            "loose files": lambda: loose_files(rows, loose, collator, workers),
            "webdataset": lambda: sizes(plain_webdataset(plain, places, collator, workers)),
            "ours": lambda: sizes(ours(plain, collator, workers)),
            "webdataset, resized": lambda: sizes(plain_webdataset(small, places, collator, workers)),
            "ours, resized": lambda: sizes(ours(small, collator, workers)),
        }
        found: dict[str, list[Measured]] = {case: [] for case in cases}
        for number in range(arguments.rounds):
            for case in list(cases)[:: -1 if number % 2 else 1]:
                found[case].append(measure(case, cases[case]))
        return results + [functools.reduce(operator.add, each) for each in found.values()], size


def open_index() -> tuple[float, float]:
    """(CPU seconds, megabytes) that opening a data set of INDEX_SAMPLES takes, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        shards, indexes = [], []
        for first in range(0, INDEX_SAMPLES, INDEX_SHARD):
            name = manifest.shard_name("train", first // INDEX_SHARD)
            where = {"jpg": [0, 150_000, 123456789], "json": [150_528, 2000, 987654321]}
            keys = [f"{number:012d}" for number in range(first, first + INDEX_SHARD)]
            entry = {"name": name, "samples": len(keys), "bytes": 10**9, "sha256": "0" * 64}
            index = {"shard": name, "bytes": 10**9, "sha256": "0" * 64, "job": "", "left_out": []}
            index["samples"] = [{"key": key, "files": where} for key in keys]
            (root / manifest.index_name(name)).write_bytes(manifest.canonical(index))
            with (root / name).open("wb") as file:
                file.truncate(10**9)
            indexes.append(index)
            shards.append(entry)
        split = {"samples": INDEX_SAMPLES, "shards": shards, "digest": manifest.splits_digest(indexes)}
        whole = {"format": manifest.FORMAT, "schema_version": SCHEMA_VERSION, "splits": {"train": split}}
        manifest.write_json(root / manifest.MANIFEST, whole)
        command = [sys.executable, "-c", _OPEN_INDEX, str(root)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found, seconds, megabytes = map(float, told.split())
    assert found == INDEX_SAMPLES
    return seconds, megabytes


def table(results: list[Measured], size: int) -> str:
    """Markdown; the loose files are what the others are measured against."""
    base = next(each for each in results if each.case == "loose files")
    lines = ["| case | samples/s | CPU ms/sample | per CPU-second, loose files = 1 |", "|---|---:|---:|---:|"]
    lines += [
        f"| {each.case} | {each.samples / each.wall:.0f} | {each.cpu_ms:.2f} | {base.cpu_ms / each.cpu_ms:.2f} |"
        for each in results
        if not each.case.startswith("packing")
    ]
    lines += [
        "",
        "| packing | samples/s | MB/s | samples per CPU-second | MB per CPU-second |",
        "|---|---:|---:|---:|---:|",
    ]
    for each in results:
        if each.case.startswith("packing"):
            rates = [amount / time for time in (each.wall, each.cpu) for amount in (each.samples, size / 1e6)]
            name = "as they came" if each.case == "packing" else "resized"
            lines.append(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in rates) + " |")
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
    mmud = REPO / "tests" / "data" / "mmud"
    default = [str(mmud / f"{name}.pkl") for name in ("train", "valid_withlength", "test")]
    parser.add_argument("--rows", nargs="+", default=default, help="pickles of MMUD rows")
    parser.add_argument("--images", default=str(mmud / "images"), help="folder with their pictures")
    parser.add_argument("--samples", type=int, default=2000, help="rows after repeating")
    parser.add_argument("--rounds", type=int, default=2, help="how often each case is measured, in turn")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0: the case's own process reads")
    parser.add_argument("--scratch", default="", help="folder for the data that is made; default: the system's")
    parser.add_argument("--csv", default="", help="file that the results are appended to")
    arguments = parser.parse_args()
    results, size = run(arguments)
    print(table(results, size))
    seconds, megabytes = open_index()
    print(f"\nIndex of {INDEX_SAMPLES:,} samples: opened in {seconds:.2f} CPU-seconds, {megabytes:.0f} MB")
    if arguments.csv:
        append_csv(Path(arguments.csv), results, arguments.workers)


if __name__ == "__main__":
    main()
