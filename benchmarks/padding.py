"""How much of a training batch is padding, padded and packed, at MMUD's lengths.

    python benchmarks/padding.py                             # the table, of the lengths in benchmarks/mmud_lengths.json
    python benchmarks/padding.py --data shards/mmud --tokenizer /models/Llama-2-7b-hf --out lengths.json

With --data the lengths are those of the training split's samples as our loader gives them: 257 image tokens, prompts
and answers of all four tasks, in the order of a run. --out keeps them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
from transformers import AutoTokenizer

from pipeline.data import prompts
from pipeline.data.batch import IGNORE, Batch
from pipeline.data.collate import Collator
from pipeline.data.loader import build_loader
from pipeline.data.mixture import make_order, open_data
from pipeline.data.rows import lay_out
from pipeline.data.tasks import TASKS
from pipeline.data.tokens import TokenMap

LENGTHS = Path(__file__).with_name("mmud_lengths.json")
IMAGE_TOKENS, MAX_LENGTH, GLOBAL_BATCH = 257, 512, 12


def read_lengths(data: str, tokenizer: str, steps: int) -> list[dict[str, Any]]:
    """What each sample of the first `steps` global batches holds: task, prompt and answer tokens, masks."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    collator = Collator(
        TokenMap(words, len(words), 8),
        image_size=224,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        mask_size=16,
        image_prefix=prompts.image_prefix("", IMAGE_TOKENS),
        max_length=MAX_LENGTH,
    )
    found = open_data(data, "train")
    order = make_order(
        found, seed=0, global_batch=GLOBAL_BATCH, tasks=tuple(TASKS), task_mix=(1.0,) * len(TASKS), window=16384
    )
    loader = build_loader(found, order, collator, micro_batch=GLOBAL_BATCH, last_step=steps)
    return [sample for _, batches in loader for batch in batches for sample in describe(batch)]


def describe(batch: Batch) -> list[dict[str, Any]]:
    """The samples of a padded batch by their lengths in tokens."""
    lengths, answers = batch.attention_mask.sum(1), (batch.labels != IGNORE).sum(1)
    masks = batch.mask_rows.bincount(minlength=len(batch.keys))
    return [
        {"task": task, "prompt": int(length - answer), "answer": int(answer), "masks": int(n)}
        for task, length, answer, n in zip(batch.tasks, lengths, answers, masks, strict=True)
    ]


def padding_share(lengths: Sequence[int], micro_batch: int, budget: int | None) -> tuple[float, float]:
    """(share of padding, mean row length) over micro-batches of consecutive samples; budget as in `lay_out`."""
    tokens, slots, rows = 0, 0, 0
    for first in range(0, len(lengths) - micro_batch + 1, micro_batch):
        part = lengths[first : first + micro_batch]
        shape = lay_out([[0] * length for length in part], pad_id=0, budget=budget).input_ids.shape
        tokens, slots, rows = tokens + sum(part), slots + shape.numel(), rows + shape[0]
    return 1.0 - tokens / slots, slots / rows


def table(lengths: Sequence[int]) -> str:
    """Markdown: share of padding (mean row length) by samples per pass and layout."""
    layouts = [("padded", None), ("packed, 512", 512), ("packed, 1024", 1024), ("packed, 2048", 2048)]
    layouts.append(("packed, one row", sum(lengths)))
    lines = ["| samples per pass | " + " | ".join(name for name, _ in layouts) + " |", "|---|" + "---:|" * len(layouts)]
    for micro_batch in (2, 4, 8, 12, 16):
        cells = [padding_share(lengths, micro_batch, budget) for _, budget in layouts]
        lines.append(f"| {micro_batch} | " + " | ".join(f"{share:.1%} ({row:.0f})" for share, row in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder of packed shards to take the lengths from")
    parser.add_argument("--tokenizer", default="", help="folder of a tokenizer; with --data")
    parser.add_argument("--steps", type=int, default=40, help="global batches of 12 samples to read (default: 40)")
    parser.add_argument("--out", default="", help="JSON file that the lengths are written to")
    arguments = parser.parse_args()
    if bool(arguments.data) != bool(arguments.tokenizer):
        parser.error("--data and --tokenizer go together")
    if arguments.data:
        samples = read_lengths(arguments.data, arguments.tokenizer, arguments.steps)
    else:
        samples = json.loads(LENGTHS.read_text())["samples"]
    if arguments.out:
        lines = ",\n".join(json.dumps(sample) for sample in samples)
        Path(arguments.out).write_text(f'{{"samples": [\n{lines}\n]}}\n')
    lengths = [sample["prompt"] + sample["answer"] for sample in samples]
    print(f"{len(lengths)} samples of {sum(lengths) / len(lengths):.0f} tokens in the mean, {max(lengths)} at most\n")
    print(table(lengths))


if __name__ == "__main__":
    main()
