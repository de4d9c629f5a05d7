"""infer.py's run: requests in batches through the model, answers to a folder, resumable at any moment.

    answers.jsonl        one line per request, in the order of completion; the truth of what is done
    errors.jsonl         requests that could not be answered, and why; they are tried again by the next run
    overlays/<id>.png    the picture with its masks
    masks/<id>-<i>.png   the mask of <OBJ-i>, white on black, at the picture's own resolution
    pictures/<id>-<k>.png  what was drawn
    run.json             the settings; answers of other settings are not mixed in

An answer's files are written before its line, so a line never names a file that is missing.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.data.brief import brief
from pipeline.data.images import load
from pipeline.inference.api import NeuralTuner
from pipeline.inference.jobs import Request
from pipeline.inference.overlay import overlay
from pipeline.inference.results import Answer, Drawing
from pipeline.runtime.provenance import write_json

ANSWERS, ERRORS, RUN = "answers.jsonl", "errors.jsonl", "run.json"
FOLDERS = ("overlays", "masks", "pictures")


class Output:
    """The folder of the answers.

    Args:
        settings: what the answers depend on, JSON-able.
        overwrite: remove the answers of an earlier run instead of going on.

    Raises:
        ValueError: the folder holds answers of other settings, a damaged answers.jsonl, or files of something else.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        record = self.folder / RUN
        if self.folder.exists() and not record.is_file() and any(self.folder.iterdir()):
            raise ValueError(f"--out {self.folder} holds other files: give a folder of its own")
        wanted = json.loads(json.dumps(settings))
        if overwrite and record.is_file():
            for name in FOLDERS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in (ANSWERS, ERRORS, RUN):
                (self.folder / name).unlink(missing_ok=True)
        if record.is_file() and (before := json.loads(record.read_text(encoding="utf-8"))) != wanted:
            other = sorted(name for name in set(before) | set(wanted) if before.get(name) != wanted.get(name))
            raise ValueError(
                f"--out {self.folder} holds answers of other settings ({', '.join(other)}): "
                "give another folder, or --overwrite"
            )
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        write_json(record, wanted)
        self.done = self._read_done()
        (self.folder / ERRORS).unlink(missing_ok=True)

    def _read_done(self) -> dict[str, Any]:
        """Id -> what was asked, of whole lines; a last line that a kill cut off is taken away."""
        path = self.folder / ANSWERS
        if not path.is_file():
            return {}
        whole, end = {}, 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    found = json.loads(line)
                    whole[str(found["id"])] = found["asked"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number} is no answer of infer.py ({error!r}): give another --out, or "
                        "--overwrite"
                    ) from error
                end += len(line)
        with path.open("r+b") as file:
            file.truncate(end)
        return whole

    def left(self, requests: Sequence[Request]) -> list[Request]:
        """The requests that are not answered yet. Raises ValueError if an id was answered for another request."""
        for request in requests:
            if request.id in self.done and self.done[request.id] != _asked(request):
                before = ", ".join(f"{name} {brief(value)}" for name, value in sorted(self.done[request.id].items()))
                raise ValueError(
                    f"--out {self.folder} holds the answer to another request of the id {request.id!r} ({before}): "
                    "give another folder, or --overwrite"
                )
        return [request for request in requests if request.id not in self.done]

    def write(self, request: Request, result: Answer | Drawing) -> None:
        """One answer: its files, then its line."""
        line = {"id": request.id, "asked": _asked(request), **result.to_json()}
        if isinstance(result, Drawing):
            names = [f"pictures/{request.id}-{k}.png" for k in range(len(result.pictures))]
            for name, data in zip(names, result.pictures, strict=True):
                (self.folder / name).write_bytes(data)
            line["pictures"] = names
        else:
            line["image"] = str(request.image)
            for each, record in zip(result.objects, line["objects"], strict=True):
                record["mask"] = f"masks/{request.id}-{each.number}.png"
                Image.fromarray(each.mask.astype(np.uint8) * 255).save(self.folder / record["mask"])
            if result.task != "caption":
                assert request.image is not None
                line["overlay"] = f"overlays/{request.id}.png"
                overlay(load(request.image.read_bytes()), result.objects).save(self.folder / line["overlay"])
        self._append(ANSWERS, line)

    def fail(self, request: Request, error: Exception) -> None:
        """One request that could not be answered."""
        self._append(ERRORS, {"id": request.id, "image": request.image and str(request.image), "error": str(error)})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _asked(request: Request) -> dict[str, Any]:
    """The request as an answer's line remembers it."""
    return {
        "task": request.task,
        "image": request.image and str(request.image.absolute()),
        "text": request.text,
    }


def answer_all(
    model: NeuralTuner,
    requests: Sequence[Request],
    output: Output,
    *,
    batch_size: int,
    seed: int,
    min_score: float = 0.0,
    words: Mapping[str, Any],
    pictures: Mapping[str, Any],
) -> tuple[list[tuple[Request, Answer | Drawing]], int]:
    """Answers what is not answered yet; ((request, answer) of this run's last batch, number of failures)."""
    left = output.left(requests)
    last: list[tuple[Request, Answer | Drawing]] = []
    failures = 0
    with tqdm(total=len(requests), initial=len(requests) - len(left), unit="answer", disable=len(requests) < 2) as bar:
        for task, run in itertools.groupby(left, key=lambda request: request.task):
            same = list(run)
            for start in range(0, len(same), batch_size):
                last = []
                part = same[start : start + batch_size]
                for request, result in _batch(
                    model, task, part, seed=seed, least=min_score, words=words, more=pictures
                ):
                    if isinstance(result, ValueError):
                        failures += 1
                        output.fail(request, result)
                        tqdm.write(f"{request.id}: {result}")
                    else:
                        output.write(request, result)
                        last.append((request, result))
                    bar.update()
    return last, failures


def _batch(
    model: NeuralTuner,
    task: str,
    requests: Sequence[Request],
    *,
    seed: int,
    least: float,
    words: Mapping[str, Any],
    more: Mapping[str, Any],
) -> list[tuple[Request, Answer | Drawing | ValueError]]:
    """The answers to one batch of one task. A request that cannot be used is found before the model runs or, where
    its text is at fault, by asking one by one."""
    looks: dict[Path, Any] = {}
    results: dict[str, Answer | Drawing | ValueError] = {}
    for request in requests:
        if request.image is not None and request.image not in looks:
            try:
                looks[request.image] = model.look(request.image)
            except ValueError as error:
                looks[request.image] = error
        if request.image is not None and isinstance(looks[request.image], ValueError):
            results[request.id] = looks[request.image]

    def ask(some: Sequence[Request]) -> list[Answer | Drawing]:
        texts = [request.text for request in some]
        if task == "generate":
            return model.generate(texts, seed=seed, batch_size=len(some), **words, **more)
        pictures = [looks[request.image] for request in some if request.image is not None]
        options = {"seed": seed, "batch_size": len(some), "min_score": least, **words}
        if task == "caption":
            return model.caption(pictures, **options)
        return (model.reason if task == "reason" else model.segment)(pictures, texts, **options)

    good = [request for request in requests if request.id not in results]
    try:
        results |= {request.id: answer for request, answer in zip(good, ask(good) if good else [], strict=True)}
    except ValueError:
        for request in good:
            try:
                results[request.id] = ask([request])[0]
            except ValueError as error:
                results[request.id] = error
    return [(request, results[request.id]) for request in requests]


def describe(result: Answer | Drawing) -> str:
    """An answer for the terminal."""
    if isinstance(result, Drawing):
        return (
            f"{len(result.pictures)} pictures" if result.pictures else f"no picture; the model wrote: {result.answer}"
        )
    lines = [result.text]
    for each in result.objects:
        box = ", ".join(f"{edge:.0f}" for edge in each.box or ())
        lines.append(f"  {each.number}  {each.phrase or '(no phrase)'}  box {box}  score {each.score:.2f}")
    if result.nothing_found:
        lines.append("  no such object" + (": all scores are too low" if result.left_out else ""))
    return "\n".join(lines)
