"""What a model answered, in memory and on disk: all that scoring needs, so that no model is needed to score again.

    predictions/about.json        what was answered: split, protocol, seed, tasks, conditions, the run's facts
    predictions/<condition>.jsonl one answer a line: key, task, question, text, masks (COCO RLE), values, reference
    predictions/<condition>/<key>.png  the drawn pictures
    predictions/<condition>.npz   features of the drawn and the true pictures, by which pictures are scored

about.json is written last: predictions without it are of an evaluation that did not end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.scoring.report import replace_text

ABOUT = "about.json"


@dataclass(kw_only=True)
class Prediction:
    """What the model answered to one prompt, beside what it should have.

    masks: full-resolution COCO RLE by token number (the i-th is that of <OBJ-i>), None where the answer lacks the
    number. values: the same for what a task's own decoder says of <OBJ-i> (a list of numbers each). picture: PNG bytes
    of the picture made for <GEN>, None without. reference: see `PromptBatch.references`.
    """

    key: str
    task: str
    text: str
    masks: list[dict[str, Any] | None]
    reference: dict[str, Any]
    picture: bytes | None = None
    values: list[list[float] | None] = dataclasses.field(default_factory=list)


@dataclass(kw_only=True)
class PictureFeatures:
    """Features of the drawn pictures, row by row with the predictions of picture generation, and of what they are
    compared with.

    clip_pictures, clip_texts, clip_true [n,E]: CLIP embeddings of the drawn picture, of its text, of the true picture.
    pool, pool_true [n,2048], logits [n,1008]: Inception's, None where there were no weights.
    """

    clip_pictures: np.ndarray
    clip_texts: np.ndarray
    clip_true: np.ndarray
    pool: np.ndarray | None = None
    pool_true: np.ndarray | None = None
    logits: np.ndarray | None = None


def save_predictions(
    predictions: Sequence[Prediction], features: PictureFeatures | None, folder: Path, condition: str
) -> None:
    """Writes one condition's answers into `folder` (predictions/)."""
    pictures = folder / condition
    pictures.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    lines = []
    for p in predictions:
        reference = dict(p.reference)
        line = {"key": p.key, "task": p.task, "question": reference.pop("question", ""), "text": p.text}
        line |= {"masks": p.masks} | ({"values": p.values} if p.values else {})
        if p.picture is not None:
            (pictures / f"{p.key}.png").write_bytes(p.picture)
            line["picture"] = f"{condition}/{p.key}.png"
        lines.append(json.dumps({**line, "reference": reference}, ensure_ascii=False))
    replace_text(folder / f"{condition}.jsonl", "".join(f"{line}\n" for line in lines))
    stored = folder / f"{condition}.npz"
    stored.unlink(missing_ok=True)
    if features is not None:
        np.savez(stored, **{name: rows for name, rows in vars(features).items() if rows is not None})


def save_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes about.json, after all conditions."""
    replace_text(folder / ABOUT, json.dumps(about, indent=1, allow_nan=False) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """about.json of saved predictions. Raises ValueError if there is none."""
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(
            f"--from {folder}: {ABOUT} is missing, so these are no whole predictions; evaluate_mmud.py --checkpoint "
            "writes them into the run's predictions/"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("conditions", "tasks", "task_module", "vocabulary", "run") if name not in about]
    except (TypeError, ValueError) as error:
        raise ValueError(f"--from {folder}: {ABOUT} is damaged: {error}") from error
    if missing:
        raise ValueError(f"--from {folder}: {ABOUT} lacks {', '.join(missing)}")
    return about


def load_predictions(folder: Path, condition: str) -> tuple[list[Prediction], PictureFeatures | None]:
    """One condition's answers and features. Raises ValueError naming the file and line that cannot be read."""
    path = folder / f"{condition}.jsonl"
    predictions: list[Prediction] = []
    try:
        # Not splitlines: texts may hold line ends of Unicode's own.
        for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
            line = json.loads(text)
            picture = (folder / line["picture"]).read_bytes() if "picture" in line else None
            predictions.append(
                Prediction(
                    key=line["key"],
                    task=line["task"],
                    text=line["text"],
                    masks=line["masks"],
                    values=line.get("values", []),
                    reference={"question": line["question"], **line["reference"]},
                    picture=picture,
                )
            )
    except OSError as error:
        raise ValueError(f"--from {folder}: {error.filename} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--from {folder}: line {len(predictions) + 1} of {path.name} is damaged ({error!r})"
        ) from error
    stored = folder / f"{condition}.npz"
    if not stored.is_file():
        return predictions, None
    with np.load(stored, allow_pickle=False) as arrays:
        return predictions, PictureFeatures(**{name: arrays[name] for name in arrays.files})
