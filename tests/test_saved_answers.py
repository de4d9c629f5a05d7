"""Answers on disk: they come back as they were, and what is cut, foreign or hostile is one message. CPU only."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.assembly.evaluation import score_saved
from pipeline.config import EvalArguments
from pipeline.data import rle
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.distributions import frechet_distance
from pipeline.scoring.predictions import (
    PictureFeatures,
    Prediction,
    load_predictions,
    read_about,
    save_about,
    save_predictions,
)
from pipeline.scoring.scores import SCORES
from pipeline.scoring.suite import CUT, Rules, score_predictions

H, W = 12, 16


def box(x1: int, y1: int, x2: int, y2: int, side: int = W) -> dict[str, Any]:
    mask = np.zeros((H, side), dtype=np.uint8)
    mask[y1:y2, x1:x2] = 1
    return rle.encode(mask)


LEFT, HALF, OTHER_HALF = box(0, 0, 4, 4), box(0, 0, 2, 4), box(2, 0, 4, 4)


def answers() -> list[Prediction]:
    text = "two lines\u2028and “quotes”"
    told = {"question": text, "caption": "a dog", "names": ["dog"], "masks": [LEFT], "size": [H, W], "values": [[0.5]]}
    return [
        Prediction(
            key="a",
            task="referring",
            text="the dog <OBJ-1>",
            masks=[HALF, None],
            reference={**told, "index": 0},
            cut=True,
        ),
        Prediction(
            key="b",
            task="generation",
            text="<GEN>",
            masks=[],
            values=[[0.5, 1.0], None],
            picture=b"png",
            reference={**told, "masks": [], "index": 0},
        ),
        Prediction(key="b", task="generation", text="<GEN>", masks=[], picture=b"two", reference={**told, "index": 1}),
    ]


def features(rng: np.random.Generator, n: int = 2) -> PictureFeatures:
    a, b, c = rng.normal(size=(3, n, 6)).astype(np.float32)
    return PictureFeatures(clip_pictures=a, clip_texts=b, clip_true=c)


def about(saved: dict[str, Any], **more: Any) -> dict[str, Any]:
    run = {"seconds": {"load": 1.5}, "versions": {}, "commit": None, "protocol": "free-running", "split": "test"}
    made = {
        "conditions": ["tuned"],
        "tasks": ["referring", "generation"],
        "task_module": "",
        "vocabulary": "",
        "run": run,
    }
    return {**made, "saved": {"tuned": saved}, **more}


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Whole predictions of one condition."""
    folder = tmp_path / "predictions"
    save_about(folder, about(save_predictions(answers(), features(rng), folder, "tuned")))
    return folder


def test_predictions_come_back_as_they_were(tmp_path: Path, rng: np.random.Generator) -> None:
    some, rows = answers(), features(rng)
    saved = save_predictions(some, rows, tmp_path, "tuned")
    assert saved == {"answers": 3, "features": True}
    with pytest.raises(ValueError, match=r"about.json is missing"):
        read_about(tmp_path)
    save_about(tmp_path, about(saved))
    known = read_about(tmp_path)
    read, found = load_predictions(tmp_path, known, "tuned")
    # Two samples of one key have a picture each.
    assert read == some and [p.picture for p in read] == [None, b"png", b"two"]
    assert found is not None and np.array_equal(found.clip_true, rows.clip_true) and found.pool is None
    # Predictions of before answers were counted.
    assert load_predictions(tmp_path, {**known, "saved": None}, "tuned")[0] == some
    # Of pictures that are not drawn any more, neither features nor files stay behind.
    save_about(tmp_path, about(save_predictions(some[:1], None, tmp_path, "tuned")))
    assert load_predictions(tmp_path, read_about(tmp_path), "tuned") == (some[:1], None)
    assert not list((tmp_path / "tuned").iterdir())


def cut_lines(n: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "tuned.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().split("\n")[:n]))

    return damage


def cut_bytes(name: str, n: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-n]) and None


def arrays(**changed: Any) -> Callable[[Path], None]:
    """Other arrays in the condition's features; None takes one out."""

    def damage(folder: Path) -> None:
        with np.load(folder / "tuned.npz") as stored:
            kept = {name: stored[name] for name in stored.files} | changed
        np.savez(folder / "tuned.npz", **{name: rows for name, rows in kept.items() if rows is not None})

    return damage


def row(number: int = 1, **changed: Any) -> Callable[[Path], None]:
    """Other fields in a line; reference__masks is that of its reference."""

    def damage(folder: Path) -> None:
        path = folder / "tuned.jsonl"
        lines = path.read_text().split("\n")
        line = json.loads(lines[number - 1])
        for name, value in changed.items():
            *outer, last = name.split("__")
            (line[outer[0]] if outer else line)[last] = value
        lines[number - 1] = json.dumps(line)
        path.write_text("\n".join(lines))

    return damage


def facts(**changed: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "about.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return damage


RUN = about({})["run"]
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "last line cut": (cut_bytes("tuned.jsonl", 9), ["tuned.jsonl was cut within line 3"]),
    "rows cut": (cut_lines(1), ["tuned.npz", "'clip_pictures'", "0 rows"]),
    "rows of no pictures cut": (
        lambda folder: (cut_lines(1)(folder), (folder / "tuned.npz").unlink()),
        ["tuned.jsonl", "'answers': 1", "about.json says {'answers': 3"],
    ),
    "features gone": (lambda folder: (folder / "tuned.npz").unlink(), ["'features': False", "about.json says"]),
    "no rows": (lambda folder: (folder / "tuned.jsonl").unlink(), ["tuned.jsonl cannot be read"]),
    "picture gone": (lambda folder: (folder / "tuned/1-b.png").unlink(), ["line 3", "'picture'", "1-b.png"]),
    "features cut": (cut_bytes("tuned.npz", 99), ["tuned.npz is cut or damaged"]),
    "no features": (lambda folder: (folder / "tuned.npz").write_bytes(b"PK"), ["tuned.npz cannot be read"]),
    "foreign features": (arrays(weights=np.zeros(3)), ["tuned.npz must hold clip_pictures", "weights"]),
    "half of Inception's": (arrays(pool=np.zeros((2, 3))), ["and pool, pool_true, logits or none"]),
    "too few features": (arrays(clip_true=np.zeros((1, 6))), ["'clip_true'", "2 rows", "[1, 6]"]),
    "words for features": (arrays(clip_true=np.array(["a", "b"])), ["'clip_true'", "rows of finite numbers"]),
    "objects for features": (arrays(clip_true=np.array([{}, {}])), ["tuned.npz cannot be read"]),
    "NaN in features": (arrays(clip_texts=np.full((2, 6), np.nan)), ["'clip_texts'", "finite"]),
    "narrow features": (arrays(clip_texts=np.zeros((2, 5))), ["one width", "[5, 6]"]),
    "masks are a number": (row(masks=5), ["line 1", "'masks'", "a list of masks", "5"]),
    "a mask without counts": (row(masks=[{"size": [H, W]}]), ["line 1", "'masks'", "counts"]),
    "a mask of other runs": (row(masks=[{"size": [H, W], "counts": "0"}]), ["line 1", "do not add up"]),
    "a mask of another size": (row(masks=[box(0, 0, 2, 2, 9)]), ["line 1", "'masks'", "reference.size", "[12, 9]"]),
    "no true masks": (row(reference={"index": 0, "size": [H, W]}), ["line 1", "'reference.caption'"]),
    "a hole in the true masks": (row(reference__masks=[None]), ["line 1", "'reference.masks'"]),
    "no reference": (row(reference=None), ["line 1", "'reference'", "an object"]),
    "a number for a text": (row(2, text=3), ["line 2", "'text'", "a text", "3"]),
    "values are words": (row(2, values=[["x"]]), ["line 2", "'values'", "numbers"]),
    "NaN in values": (row(2, values=[[float("nan")]]), ["line 2", "is damaged"]),
    "half a character": (row(2, text="\ud800"), ["line 2", "is damaged"]),
    "the same twice": (row(3, reference__index=0), ["line 3", "'reference.index'", "line 2"]),
    "another task": (row(task="caption"), ["line 1", "'task'", "caption"]),
    "a picture elsewhere": (row(2, picture="../secret.png"), ["line 2", "'picture'", "a file of tuned/"]),
    "a list for a row": (lambda folder: (folder / "tuned.jsonl").write_text("[]\n"), ["line 1", "a JSON object"]),
    "deep brackets": (lambda folder: (folder / "tuned.jsonl").write_text("[" * 10**6 + "\n"), ["line 1", "damaged"]),
    "about.json is a list": (lambda folder: (folder / "about.json").write_text("[1]"), ["about.json", "a JSON object"]),
    "about.json is cut": (cut_bytes("about.json", 5), ["about.json is damaged"]),
    "conditions are a number": (facts(conditions=3), ["about.json", "'conditions'", "tuned, untuned"]),
    "a condition elsewhere": (facts(conditions=["../tuned"]), ["about.json", "'conditions'"]),
    "run is a list": (facts(run=[1]), ["about.json", "'run'", "an object"]),
    "run is empty": (facts(run={}), ["about.json", "'run.protocol'"]),
    "no protocol": (facts(run={**RUN, "protocol": None}), ["about.json", "'run.protocol'", "a text"]),
    "seconds are words": (facts(run={**RUN, "seconds": {"load": "long"}}), ["'run.seconds'", "numbers"]),
    "tasks are a text": (facts(tasks="caption"), ["about.json", "'tasks'", "a list of names"]),
    "counts of others": (facts(saved={"untuned": {}}), ["about.json", "'saved'", "each of conditions"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_cut_or_foreign_is_one_message(folder: Path, name: str) -> None:
    damage, wanted = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError, match=r"^--from ") as caught:
        score_saved(folder, folder.parent, EvalArguments(from_predictions=str(folder), bootstrap=0))
    said = str(caught.value)
    assert said.startswith(f"--from {folder}: ") and "evaluate again" in said and "\n" not in said
    assert all(text in said for text in wanted), said
    assert not (folder.parent / "report.json").exists()


def test_whole_answers_are_scored_with_their_settings(folder: Path) -> None:
    facts(run={**RUN, "settings": {"limit": 7}})(folder)
    score_saved(folder, folder.parent, EvalArguments(from_predictions=str(folder), bootstrap=0, seed=3))
    report = json.loads((folder.parent / "report.json").read_text())
    assert report["tuned"]["referring_miou"] == 0.5
    assert report["run"]["settings"] == {"limit": 7, "bootstrap": 0, "scoring seed": 3}
    assert "- settings: limit 7, bootstrap 0, scoring seed 3" in (folder.parent / "report.md").read_text()
    details = json.loads((folder.parent / "details.json").read_text())["tuned"]
    # It is known of one answer that it met the limit, and not known of the others.
    assert (details["referring"][CUT], details["generation"][CUT]) == (1, None)


def test_captions_of_one_key_in_two_data_sets_count_each() -> None:
    told = answers()[0].reference
    some = [
        Prediction(
            key="k", task="caption", text=text, masks=[], reference={**told, "caption": "a dog runs", "index": i}
        )
        for i, text in enumerate(["a dog runs", "no"])
    ]
    scored = score_predictions(some, None, Rules(tasks=("caption",), bootstrap=Bootstrap(0)), "tuned")
    assert scored.details["caption"]["samples"] == 2
    assert scored.figures["caption_rouge_l"] == pytest.approx(0.5)


def test_a_phrase_alone_has_one_mask() -> None:
    (one, *_), rules = answers(), Rules(tasks=("referring",), bootstrap=Bootstrap(0))
    some = [dataclasses.replace(one, masks=[HALF, None, OTHER_HALF]), dataclasses.replace(one, masks=[None])]
    apart = score_predictions(some, None, rules, "tuned").figures
    merged = score_predictions(some, None, dataclasses.replace(rules, one_mask=True), "tuned").figures
    assert apart["referring_miou"] == pytest.approx((0.5 + 0 + 0) / 3)
    assert (merged["referring_miou"], merged["referring_oiou"]) == (0.5, 0.5)


def test_the_phrases_of_saved_answers_decide_on_merging(folder: Path) -> None:
    row(masks=[HALF, OTHER_HALF])(folder)
    wanted = {"drawn": 0.25, "each alone": 1.0}
    for phrases, figure in wanted.items():
        facts(run={**RUN, "phrases": phrases})(folder)
        score_saved(folder, folder.parent, EvalArguments(from_predictions=str(folder), bootstrap=0))
        assert json.loads((folder.parent / "report.json").read_text())["tuned"]["referring_miou"] == figure


def test_a_task_module_runs_only_if_the_user_names_it(folder: Path, tmp_path: Path) -> None:
    module, ran = tmp_path / "theirs.py", tmp_path / "ran"
    module.write_text(f"open({str(ran)!r}, 'a').write('x')\n")

    def score(given: str = "") -> str:
        return score_saved(
            folder, tmp_path, EvalArguments(from_predictions=str(folder), task_module=given, bootstrap=0)
        )

    with pytest.raises(ValueError, match="name no task module; leave the flag out"):
        score(str(module))
    facts(task_module=str(module))(folder)
    for other in ("", str(tmp_path / "other.py")):
        with pytest.raises(ValueError, match=f"give --task_module {module} if you trust that file"):
            score(other)
    assert not ran.exists()
    assert "Report:" in score(os.path.relpath(module)) and ran.read_text() == "x"


@pytest.mark.parametrize(
    "changed",
    [{"inception_weights": "w.pth"}, {"limit": 5}, {"split": "valid"}, {"condition": "all"}, {"candidates": 1}],
)
def test_flags_without_effect_on_saved_answers_are_refused(changed: dict[str, Any]) -> None:
    (name,) = changed
    with pytest.raises(ValueError, match=f"--from scores answers as they were given.*--{name}"):
        EvalArguments(from_predictions="x", **changed)
    EvalArguments(from_predictions="x", report_dir="y", bootstrap=5, seed=1, local_rank=0, task_module="z.py")
    with pytest.raises(ValueError, match="--task_module goes with --from"):
        EvalArguments(task_module="z.py")


def test_every_picture_score_where_there_are_features(rng: np.random.Generator) -> None:
    one = answers()[1]
    some = [one] * 60
    rows = features(rng, 60)
    rules = Rules(tasks=("generation",), bootstrap=Bootstrap(50))
    without = score_predictions(some, rows, rules, "tuned")
    assert without.figures["picture_fid"] is None and "inception_weights" in without.details["generation"]["missing"]
    assert without.figures["picture_clip_frechet"] is not None
    rows.pool, rows.pool_true = rng.normal(size=(2, 60, 8)).astype(np.float32)
    rows.logits = rng.normal(size=(60, 5)).astype(np.float32)
    scored = score_predictions(some, rows, rules, "tuned")
    names = {name for name in SCORES if name.startswith("picture_")}
    assert all(scored.figures[name] is not None for name in names)
    assert scored.figures["picture_fid"] == frechet_distance(rows.pool_true, rows.pool)
    assert set(scored.intervals) == {"picture_text_r1_of_50", "picture_clip_cosine"}
    assert scored.details["generation"]["KID"]["subset_size"] == 60
    shuffled = score_predictions(some, rows, rules, "shuffled")
    assert shuffled.figures["picture_fid"] is None and shuffled.figures["picture_clip_cosine"] is not None
    # With one picture there is no other to show.
    alone = score_predictions(some[:1], features(rng, 1), rules, "shuffled")
    assert alone.figures["picture_clip_cosine"] is None
    assert score_predictions(some[:1], features(rng, 1), rules, "tuned").figures["picture_clip_cosine"] is not None
