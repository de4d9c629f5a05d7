"""Examines a source before it is packed: what would be left out, and what is suspicious though it can be used.

A *fault* makes packing leave out the sample, or the object. A *note* does not. Every row of every split is read as
packing would read it, with the same code.
"""

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from pipeline.data import rle
from pipeline.data.manifest import canonical
from pipeline.data.parallel import Count, run_jobs
from pipeline.data.schema import OBJECT_TAG, Sample
from pipeline.data.writer import Rows, Source, portion_of, split_up

REPORT = "doctor.json"
EXAMPLES = 10
"""Examples of each finding in the report; all of them are counted."""
_ROWS_PER_JOB = 200
_BESIDE = 0.5
"""Intersection over union below which a box is said not to be the mask's."""
_SPECK = 0.01
"""Share of an object's pixels that a part must have to count as one: outlines leave specks where they touch."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: what is counted, the sample's key, the particulars. `fault`: it will be left out."""

    what: str
    key: str
    detail: str
    fault: bool


@dataclass(frozen=True, slots=True)
class _Job:
    rows: Rows
    split: str
    places: tuple[int, ...]
    longest_text: int
    path: Path


def examine(
    source: Source, splits: Sequence[str], *, workers: int = 1, longest_text: int = 180, progress: bool = True
) -> dict[str, Any]:
    """The report on `splits` of `source`, plain JSON values:

    {"source": fingerprint, "splits": {split: {"rows", "good", "faults": {what: {"count", "examples": [{"key",
    "detail"}]}}, "notes": likewise}}}

    longest_text: words of question and answer, or of the caption, above which a note is made.
    """
    findings: dict[str, list[Finding]] = {split: [] for split in splits}
    pictures: dict[str, list[tuple[str, str]]] = defaultdict(list)
    rows: dict[str, int] = {}
    good: dict[str, int] = dict.fromkeys(splits, 0)
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[_Job] = []
        for split in splits:
            rows[split] = len(source.keys(split))
            for first in range(0, rows[split], _ROWS_PER_JOB):
                places = tuple(range(first, min(first + _ROWS_PER_JOB, rows[split])))
                jobs.append(_Job(source, split, places, longest_text, Path(folder) / f"{len(jobs)}.json"))
        with tqdm(total=sum(rows.values()), desc="examining", unit=" samples", disable=not progress) as bar:
            if workers == 1 or len(jobs) <= 1:
                for job in jobs:
                    _examine(job, bar.update)
            else:
                run_jobs(_examine, (_portioned(job, source) for job in jobs), workers=workers, bar=bar)
        for job in jobs:
            found = json.loads(job.path.read_bytes())
            findings[job.split] += [Finding(*each) for each in found["findings"]]
            good[job.split] += len(found["pictures"])
            for key, sha256 in found["pictures"]:
                pictures[sha256].append((job.split, key))
    for finding, split in _duplicates(pictures):
        findings[split].append(finding)
    return {
        "source": source.fingerprint(),
        "splits": {
            split: {
                "rows": rows[split],
                "good": good[split],
                "faults": _counted(each for each in findings[split] if each.fault),
                "notes": _counted(each for each in findings[split] if not each.fault),
            }
            for split in splits
        },
    }


def _counted(findings: Iterator[Finding]) -> dict[str, Any]:
    by_name: dict[str, list[Finding]] = defaultdict(list)
    for each in findings:
        by_name[each.what].append(each)
    return {
        what: {"count": len(all_), "examples": [{"key": e.key, "detail": e.detail} for e in all_[:EXAMPLES]]}
        for what, all_ in sorted(by_name.items())
    }


def _portioned(job: _Job, source: Source) -> _Job:
    return _Job(portion_of(source, job.split, job.places), job.split, job.places, job.longest_text, job.path)


def _examine(job: _Job, count: Count) -> None:
    findings: list[Finding] = []
    pictures = []
    for place in job.places:
        sample, left_out = split_up(job.rows.load(job.split, place))
        if sample:
            pictures.append([sample.key, hashlib.sha256(sample.image).hexdigest()])
            findings += [Finding(what, sample.key, detail, False) for what, detail in _notes(sample, job.longest_text)]
        findings += [Finding(each.reason, each.key, each.detail, True) for each in left_out]
        count(1)
    lines = [[each.what, each.key, each.detail, each.fault] for each in findings]
    job.path.write_bytes(canonical({"findings": lines, "pictures": pictures}))


def _notes(sample: Sample, longest_text: int) -> Iterator[tuple[str, str]]:
    """(what, detail) of everything suspicious about a sample that can be used."""
    tags = Counter(int(tag[1]) for tag in OBJECT_TAG.finditer(sample.answer))
    for number in range(1, len(sample.objects) + 1):
        if sample.answer and not tags[number]:
            yield "object without tag", f"the answer never names object {number} of {len(sample.objects)}"
        if tags[number] > 1:
            yield "tag repeated", f"<OBJ-{number}> comes {tags[number]} times"
    texts = (("caption", sample.caption), ("question and answer", f"{sample.question} {sample.answer}"))
    for name, text in texts:
        if (words := len(text.split())) > longest_text:
            yield "text too long", f"{name}: {words} words, more than {longest_text}; training will cut it"
    for number, each in enumerate(sample.objects, start=1):
        parts = _parts(rle.decode(each.mask))
        if parts > 1:
            yield "object in several parts", f"object {number} ({each.category}): {parts} parts"
        if (overlap := _box_iou(each.box, rle.bounding_box(each.mask))) < _BESIDE:
            yield "box beside mask", f"object {number} ({each.category}): box {each.box}, overlap {overlap:.2f}"


def _parts(mask_HW: np.ndarray) -> int:
    """Parts of a mask that do not touch, also not by a corner; specks do not count."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    inside = mask_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels, number = ndimage.label(inside, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    return int((sizes >= _SPECK * sizes.sum()).sum())


def _box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both
    return both / either if either > 0 else 0.0


def _duplicates(pictures: dict[str, list[tuple[str, str]]]) -> Iterator[tuple[Finding, str]]:
    """(finding, split) of each picture that stands in an earlier split too: a score on it would be too good."""
    for places in pictures.values():
        first_split, first_key = places[0]
        for split, key in places[1:]:
            if split != first_split:
                detail = f"the same bytes as {first_key} of the split '{first_split}'"
                yield Finding("picture in several splits", key, detail, False), split


def describe(report: dict[str, Any]) -> str:
    """The report as lines for people, the first example of each finding with it."""
    lines = []
    for split, found in report["splits"].items():
        lines.append(f"{split}: {found['rows']} rows, {found['good']} can be packed")
        for kind, title in (("faults", "left out"), ("notes", "note")):
            for what, each in found[kind].items():
                example = each["examples"][0]
                such_as = f"such as {example['key']}: {example['detail'][:150]}"
                lines.append(f"  {title:8}  {what}: {each['count']}, {such_as}")
        if not found["faults"] and not found["notes"]:
            lines.append("  nothing found")
    return "\n".join(lines)


def has_faults(report: dict[str, Any]) -> bool:
    """Whether packing would leave anything out."""
    return any(found["faults"] for found in report["splits"].values())
