"""What a model answered, in memory and on disk: all that scoring needs, so that no model is needed to score again.

    predictions/about.json        what was answered: split, protocol, seed, tasks, conditions, the run's facts
    predictions/<condition>.jsonl one answer a line: key, task, question, text, masks (COCO RLE), values, reference
    predictions/<condition>/<index>-<key>.png  the drawn pictures
    predictions/<condition>.npz   features of the drawn and the true pictures, by which pictures are scored

about.json is written last: predictions without it are of an evaluation that did not end. It counts the answers of each
condition, so that a folder that was cut is not scored. Predictions may come from strangers: nothing in them is believed
before it is checked, and what is wrong is told with its file, line and field.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.data import rle
from pipeline.data.brief import brief
from pipeline.scoring.report import replace_text
from pipeline.scoring.scores import CONDITIONS

ABOUT = "about.json"
_AGAIN = "evaluate again (evaluate_mmud.py --checkpoint)"
_CLIP = ("clip_pictures", "clip_texts", "clip_true")
_INCEPTION = ("pool", "pool_true", "logits")


@dataclass(kw_only=True)
class Prediction:
    """What the model answered to one prompt, beside what it should have.

    masks: full-resolution COCO RLE by token number (the i-th is that of <OBJ-i>), None where the answer lacks the
    number. values: the same for what a task's own decoder says of <OBJ-i> (a list of numbers each). picture: PNG bytes
    of the picture made for <GEN>, None without. reference: see `PromptBatch.references`. cut: whether the answer met
    the most tokens that it may have before it ended; None where that is not known.
    """

    key: str
    task: str
    text: str
    masks: list[dict[str, Any] | None]
    reference: dict[str, Any]
    picture: bytes | None = None
    values: list[list[float] | None] = dataclasses.field(default_factory=list)
    cut: bool | None = None


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
) -> dict[str, Any]:
    """Writes one condition's answers into `folder` (predictions/).

    Returns {"answers": how many, "features": whether there are any}, what about.json holds of the condition as "saved".
    """
    pictures = folder / condition
    pictures.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    for earlier in pictures.glob("*.png"):
        earlier.unlink()
    lines = []
    for p in predictions:
        reference = dict(p.reference)
        line = {"key": p.key, "task": p.task, "question": reference.pop("question", ""), "text": p.text}
        line |= {"masks": p.masks} | ({"values": p.values} if p.values else {})
        line |= {} if p.cut is None else {"cut": p.cut}
        if p.picture is not None:
            # Keys are unique within one data set only, and a split may be of several.
            name = f"{reference['index']}-{p.key}.png"
            (pictures / name).write_bytes(p.picture)
            line["picture"] = f"{condition}/{name}"
        lines.append(json.dumps({**line, "reference": reference}, ensure_ascii=False))
    replace_text(folder / f"{condition}.jsonl", "".join(f"{line}\n" for line in lines))
    stored = folder / f"{condition}.npz"
    stored.unlink(missing_ok=True)
    if features is not None:
        np.savez(stored, **{name: rows for name, rows in vars(features).items() if rows is not None})
    return {"answers": len(predictions), "features": features is not None}


def save_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes about.json, after all conditions."""
    replace_text(folder / ABOUT, json.dumps(about, indent=1, allow_nan=False) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """about.json of saved predictions, checked. Raises ValueError if there is none or it is damaged."""
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(
            f"--from {folder}: {ABOUT} is missing, so these are no whole predictions; evaluate_mmud.py --checkpoint "
            "writes them into the run's predictions/"
        )
    where = f"--from {folder}: {ABOUT}"
    about = _parse(_read(path, where), where)
    missing = [name for name in ("conditions", "tasks", "task_module", "vocabulary", "run") if name not in about]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: {_AGAIN}")
    conditions, run, saved = about["conditions"], about["run"], about.get("saved")
    known = _texts(conditions) and bool(conditions) and set(conditions) <= set(CONDITIONS)
    _need(known, where, "conditions", f"a list of {', '.join(CONDITIONS)}", conditions)
    _need(_texts(about["tasks"]), where, "tasks", "a list of names", about["tasks"])
    for name in ("task_module", "vocabulary"):
        _need(isinstance(about[name], str), where, name, "a text", about[name])
    _need(isinstance(run, dict), where, "run", "an object", run)
    for name in ("protocol", "split"):
        _need(isinstance(run.get(name), str), where, f"run.{name}", "a text", run.get(name))
    for name in ("data", "phrases"):
        _need(isinstance(run.get(name, ""), str), where, f"run.{name}", "a text", run.get(name))
    _need(isinstance(run.get("commit"), str | None), where, "run.commit", "a text or null", run.get("commit"))
    for name in ("seconds", "versions"):
        _need(isinstance(run.get(name), dict), where, f"run.{name}", "an object", run.get(name))
    seconds = run["seconds"]
    _need(all(map(_is_number, seconds.values())), where, "run.seconds", "numbers by stage", seconds)
    _need(isinstance(run.get("settings", {}), dict), where, "run.settings", "an object", run.get("settings"))
    # Older predictions were not counted.
    if saved is not None:
        counted = isinstance(saved, dict) and set(saved) == set(conditions)
        _need(counted, where, "saved", "an object with each of conditions", saved)
    return about


def load_predictions(
    folder: Path, about: Mapping[str, Any], condition: str
) -> tuple[list[Prediction], PictureFeatures | None]:
    """One condition's answers and features, as many as `about` (from `read_about`) says.

    Raises ValueError naming the file, line and field that is damaged or missing.
    """
    path = folder / f"{condition}.jsonl"
    where = f"--from {folder}: {path.name}"
    # Not splitlines: texts may hold line ends of Unicode's own.
    *lines, rest = _read(path, where).split("\n")
    if rest:
        raise ValueError(f"{where} was cut within line {len(lines) + 1}: {_AGAIN}")
    predictions: list[Prediction] = []
    places: dict[tuple[str, int], int] = {}
    for number, line in enumerate(lines, start=1):
        here = f"{where}, line {number}"
        made = _prediction(folder, condition, line, here)
        _need(made.task in about["tasks"], here, "task", f"one of {ABOUT}'s tasks", made.task)
        first = places.setdefault((made.task, made.reference["index"]), number)
        _need(first == number, here, "reference.index", f"another than that of line {first}", made.reference["index"])
        predictions.append(made)
    drawn = sum(p.task == "generation" for p in predictions)
    features = _load_features(folder / f"{condition}.npz", drawn, f"--from {folder}: {condition}.npz")
    if about.get("saved") is not None:
        said, found = about["saved"][condition], {"answers": len(predictions), "features": features is not None}
        if said != found:
            raise ValueError(f"{where} and {condition}.npz hold {found}, {ABOUT} says {brief(said)}: {_AGAIN}")
    return predictions, features


def _prediction(folder: Path, condition: str, text: str, where: str) -> Prediction:
    """One line of a condition's answers, checked."""

    def need(good: bool, field: str, wanted: str, found: Any) -> None:
        _need(good, where, field, wanted, found)

    line = _parse(text, where)
    for name in ("key", "task", "text", "question"):
        need(isinstance(line.get(name), str), name, "a text", line.get(name))
    reference: Any = line.get("reference")
    picture, values, masks = line.get("picture"), line.get("values", []), line.get("masks")
    need(isinstance(reference, dict), "reference", "an object", reference)
    index, size = reference.get("index"), reference.get("size")
    need(type(index) is int and index >= 0, "reference.index", "a whole number from 0 up", index)
    good = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    need(good, "reference.size", "two positive whole numbers (height, width)", size)
    need(isinstance(reference.get("caption"), str), "reference.caption", "a text", reference.get("caption"))
    need(_texts(reference.get("names")), "reference.names", "a list of texts", reference.get("names"))
    for field, rows in (("values", values), ("reference.values", reference.get("values", []))):
        good = isinstance(rows, list) and all(row is None or _numbers(row) for row in rows)
        need(good, field, "a list of lists of numbers", rows)
    need(isinstance(masks, list), "masks", "a list of masks", masks)
    _check_masks([mask for mask in masks or [] if mask is not None], size, where, "masks")
    need(isinstance(reference.get("masks"), list), "reference.masks", "a list of masks", reference.get("masks"))
    _check_masks(reference["masks"], size, where, "reference.masks")
    need(isinstance(line.get("cut"), bool | None), "cut", "true or false", line.get("cut"))
    if picture is not None:
        parts = PurePosixPath(picture).parts if isinstance(picture, str) else ()
        inside = len(parts) == 2 and parts[0] == condition and parts[1] != ".."
        need(inside, "picture", f"a file of {condition}/", picture)
        try:
            picture = (folder / picture).read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: field 'picture' cannot be read ({error}): {_AGAIN}") from error
    return Prediction(
        key=line["key"],
        task=line["task"],
        text=line["text"],
        masks=line["masks"],
        values=values,
        reference={"question": line["question"], **reference},
        picture=picture,
        cut=line.get("cut"),
    )


def _check_masks(masks: list[Any], size: list[int], where: str, field: str) -> None:
    for mask in masks:
        try:
            rle.check(mask)
        except ValueError as error:
            raise ValueError(f"{where}: field '{field}': {error}: {_AGAIN}") from error
        _need(mask["size"] == size, where, field, f"masks of {size} pixels, as reference.size says", mask["size"])


def _load_features(path: Path, drawn: int, where: str) -> PictureFeatures | None:
    """Features of `drawn` answers of picture generation, checked; None if there is no such file."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{where} cannot be read ({error}): {_AGAIN}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{where} is cut or damaged ({error}): {_AGAIN}") from error
    if set(arrays) not in (set(_CLIP), {*_CLIP, *_INCEPTION}):
        wanted = f"{', '.join(_CLIP)}, and {', '.join(_INCEPTION)} or none of these"
        raise ValueError(f"{where} must hold {wanted}, found {brief(sorted(arrays))}: {_AGAIN}")
    for name, rows in arrays.items():
        good = rows.ndim == 2 and rows.dtype.kind == "f" and len(rows) == drawn and bool(np.isfinite(rows).all())
        wanted = f"{drawn} rows of finite numbers, one for each answer of picture generation"
        _need(good, where, name, wanted, f"{rows.dtype} {list(rows.shape)}")
    for names in (_CLIP, _INCEPTION[:2]):
        widths = {arrays[name].shape[1] for name in names if name in arrays}
        _need(len(widths) < 2, where, ", ".join(names), "of one width", sorted(widths))
    return PictureFeatures(**arrays)


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read ({error}): {_AGAIN}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    """A JSON object without NaN, infinity and halves of characters, none of which a report could hold."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where} is damaged ({error}): {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, found {brief(found)}: {_AGAIN}")
    return found


def _need(good: bool, where: str, field: str, wanted: str, found: Any) -> None:
    if not good:
        raise ValueError(f"{where}: field '{field}' must be {wanted}, found {brief(found)}: {_AGAIN}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))
