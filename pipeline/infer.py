"""Asks a tuned model: one picture, a folder of them, or a JSONL file of requests.

    python pipeline/infer.py --task reason --image scene.jpg --text "Which object is highest?"
    python pipeline/infer.py --task segment --image pictures/ --text "the red circle" --out runs/circles
    python pipeline/infer.py --input requests.jsonl --batch_size 16 --checkpoint runs/7b
    python pipeline/infer.py --task generate --text "A small red star at the top left." --n 4 --seed 1

Writes answers.jsonl with the masks as COCO RLE, masks and overlays as PNG, and drawn pictures into --out; the same
command goes on where it was stopped. Exit status 1: some requests could not be answered (errors.jsonl). --help lists
the flags.
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from pipeline.config import InferArguments, LoadArguments, parse
from pipeline.inference.api import NeuralTuner
from pipeline.inference.batches import Output, answer_all, describe
from pipeline.inference.jobs import read_requests


def main() -> int:
    """Parse, read the requests, load, answer; what a user can mend is one line."""
    where, asked = parse(LoadArguments, InferArguments, description=__doc__)
    try:
        requests = read_requests(task=asked.task, image=asked.image, text=asked.text, input=asked.input)
        model = NeuralTuner.from_pretrained(**where.model, dtype=getattr(torch, where.dtype, None))
        settings = dataclasses.asdict(asked) | {"checkpoint": str(model.loaded.trained.folder), "dtype": where.dtype}
        ignored = ("image", "input", "out", "overwrite", "batch_size")
        output = Output(
            asked.out,
            {name: value for name, value in settings.items() if name not in ignored},
            overwrite=asked.overwrite,
        )
        last, failures = answer_all(
            model,
            requests,
            output,
            batch_size=asked.batch_size,
            seed=asked.seed,
            min_score=asked.min_score,
            words=asked.words,
            pictures=asked.pictures,
        )
    except ValueError as error:
        print(f"infer.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on.", file=sys.stderr)
        return 130
    for _, result in last if len(requests) == 1 else ():
        print(describe(result))
    print(f"{len(requests) - failures} of {len(requests)} answered: {output.folder / 'answers.jsonl'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
