"""The report's keys, its table and files, and the contact sheet's drawing. CPU only."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import rle
from pipeline.runtime.provenance import git_state, package_versions
from pipeline.runtime.reporting import contact_sections
from pipeline.scoring.contact_sheet import CaptionCard, MaskCard, PictureCard, Section, _word_width, draw_sheet, wrap
from pipeline.scoring.predictions import Prediction
from pipeline.scoring.records import read_report
from pipeline.scoring.report import build_report, format_markdown, format_table, tokenizer_note, write_report
from pipeline.scoring.scores import CONDITIONS, SCORES
from pipeline.scoring.seeds import summarise, write_summary

# As the users' scripts read them; there are more.
KEYS = {
    "referring_miou",
    "referring_oiou",
    "reasoning_miou",
    "reasoning_oiou",
    "caption_bleu4",
    "caption_cider",
    "caption_object_f1",
    "referring_object_accuracy",
    "reasoning_object_accuracy",
    "picture_text_r1_of_50",
    "picture_clip_cosine",
}
RUN = {"samples": 500, "seconds": {"tuned": 12.3}, "versions": {"python": "3.11"}, "commit": "abc", "preset": "mini"}


def example() -> dict:
    return build_report({"tuned": dict.fromkeys(KEYS, 0.5), "untuned": {"caption_cider": np.float32(0.25)}}, RUN)


def test_keys_are_exact() -> None:
    report = example()
    assert set(SCORES) >= KEYS
    assert set(report) == {"tuned", "untuned", "shuffled", "teacher_forced", "intervals", "run"}
    assert set(report) == {*CONDITIONS, "intervals", "run"}
    assert all(set(report[condition]) == set(SCORES) for condition in CONDITIONS)
    assert {"samples", "seconds", "versions", "commit"} <= set(report["run"])
    assert report["untuned"]["caption_cider"] == 0.25
    assert report["shuffled"]["caption_cider"] is None


def test_files(tmp_path: Path) -> None:
    path = write_report(
        example(), tmp_path / "new", sheet="sheet.png", notes="Seed 0.", details={"p_at_0.5": [0.7, float("nan")]}
    )
    assert json.loads(path.read_text()) == example()
    assert json.loads((tmp_path / "new/details.json").read_text()) == {"p_at_0.5": [0.7, None]}
    text = (tmp_path / "new/report.md").read_text()
    assert "| referring segmentation | mIoU | 0.500 | – | – |" in text
    assert "![contact sheet](sheet.png)" in text
    assert "preset: mini" in text
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["details.json", "report.json", "report.md"]


def test_captions_split_without_java_are_said_to_be() -> None:
    found = example()
    for tokenizer, said in (("ptb", False), ("simple", True)):
        found["run"]["settings"] = {"limit": 0, "base_quant": "", "caption tokenizer": tokenizer}
        text = format_markdown(found)
        assert f"- settings: limit 0, base_quant none, caption tokenizer {tokenizer}" in text
        assert ("a tokenizer of our own" in text) == said == bool(tokenizer_note(found))


def test_table_has_a_row_per_score() -> None:
    lines = format_table(example()).splitlines()
    assert lines[0].split() == ["tuned", "untuned", "shuffled"]
    forced = build_report({"teacher_forced": {"caption_cider": 0.5}}, RUN, {"tuned": {"caption_cider": (0.25, 1)}})
    assert format_table(forced).splitlines()[0].split() == list(CONDITIONS)
    assert len([line for line in lines[2:] if line]) == len(SCORES)
    assert len({len(line) for line in lines if line}) == 1, "columns line up"


def test_report_refusals() -> None:
    with pytest.raises(ValueError, match=r"tuned\.caption_cider is nan"):
        build_report({"tuned": {"caption_cider": float("nan")}}, RUN)
    with pytest.raises(ValueError, match="unknown scores"):
        build_report({"tuned": {"fid": 1.0}}, RUN)
    with pytest.raises(ValueError, match=r"an end of tuned.caption_cider is inf"):
        build_report({}, RUN, {"tuned": {"caption_cider": (0.0, float("inf"))}})
    with pytest.raises(ValueError, match="unknown conditions"):
        build_report({"best": {}}, RUN)
    with pytest.raises(ValueError, match="lacks"):
        build_report({}, {"samples": 1})


def test_facts_of_the_run(repo: Path, tmp_path: Path) -> None:
    assert {"python", "torch", "numpy"} <= set(package_versions())
    assert git_state(tmp_path)["commit"] is None
    found = git_state(repo)["commit"]
    assert found is None or len(found) == 40


def scene(rng: np.random.Generator, side: int = 64) -> tuple[np.ndarray, list[np.ndarray]]:
    """A picture [S,S,3] with two discs, and their masks."""
    y, x = np.mgrid[:side, :side]
    picture = np.full((side, side, 3), 225, dtype=np.uint8)
    masks = []
    for _ in range(2):
        cx, cy, radius = rng.integers(14, side - 14), rng.integers(14, side - 14), rng.integers(7, 13)
        masks.append((x - cx) ** 2 + (y - cy) ** 2 < radius**2)
        picture[masks[-1]] = rng.integers(0, 200, size=3)
    return picture, masks


def cards(rng: np.random.Generator, n: int) -> list[Section]:
    """Sections as an evaluation makes them, on drawn scenes."""
    scenes = [scene(rng) for _ in range(n)]
    answer = "The one you ask for is the small red circle <OBJ-1>, and the blue star <OBJ-2> is at its left."
    return [
        Section(
            "Reasoning segmentation",
            "Left: the picture. Right: predicted masks, true outlines in white.",
            [
                MaskCard(
                    p,
                    [np.roll(m[0], 2, 0), m[1]],
                    m,
                    "Which thing would roll away, and what is beside it?",
                    answer,
                    0.81,
                )
                for p, m in scenes
            ],
        ),
        Section(
            "Captioning",
            "",
            [
                CaptionCard(p, "a small red circle above a large blue star", "a red circle and a star")
                for p, _ in scenes
            ],
        ),
        Section(
            "Picture generation",
            "",
            [PictureCard(p, "a small red circle above a large blue star", scenes[-1][0], 0.42) for p, _ in scenes],
        ),
    ]


def test_contact_sheet_is_drawn(rng: np.random.Generator, tmp_path: Path) -> None:
    path = draw_sheet(cards(rng, 5), tmp_path / "sheet.png", title="Neural tuning, mini world", subtitle="500 scenes")
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == 1640
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    assert (pixels[-8:] == pixels[-1, -1]).all(), "nothing is cut at the foot"
    again = draw_sheet(
        cards(np.random.default_rng(0), 5), tmp_path / "b.png", title="Neural tuning, mini world", subtitle="500 scenes"
    )
    assert path.read_bytes() == again.read_bytes()


def test_contact_sheet_takes_odd_cards(tmp_path: Path) -> None:
    wide, tall = np.zeros((30, 90, 3), np.uint8), np.zeros((90, 30, 3), np.uint8)
    sections = [
        Section(
            "Masks",
            "",
            [
                MaskCard(wide, [], [], "", "", None),
                MaskCard(tall, [None, np.zeros((90, 30), bool)], [], "q" * 300, "a " * 400, 0.0),
            ],
        ),
        Section("Nothing", "", []),
        Section("Pictures", "", [PictureCard(None, "no picture was drawn", None, None)]),
    ]
    assert draw_sheet(sections, tmp_path / "odd.png", title="Odd").exists()
    with pytest.raises(ValueError, match="mask of shape"):
        draw_sheet(
            [Section("x", "", [MaskCard(wide, [np.ones((3, 3), bool)], [], "", "", None)])],
            tmp_path / "x.png",
            title="",
        )


def test_masks_over_a_picture_that_was_shrunk_at_packing(tmp_path: Path) -> None:
    side, mask = 10, np.zeros((40, 80), bool)
    mask[:20] = True
    buffer = io.BytesIO()
    Image.new("RGB", (2 * side, side)).save(buffer, "PNG")
    found = Prediction(
        key="a",
        task="referring",
        text="the top",
        masks=[rle.encode(mask)],
        reference={"index": 0, "size": (40, 80), "masks": [rle.encode(mask)], "question": "the top"},
    )
    (section,) = contact_sections([found], [SimpleNamespace(image=buffer.getvalue())])  # type: ignore[arg-type]
    (card,) = section.cards
    assert isinstance(card, MaskCard) and card.iou == 1.0
    assert card.picture.shape == (40, 80, 3)
    assert draw_sheet([section], tmp_path / "sheet.png", title="Shrunk").exists()


def test_wrap_cuts_with_an_ellipsis() -> None:
    lines = wrap("one two three four five six seven", size=13, width=60, most=2)
    assert len(lines) == 2
    assert lines[-1][-1].endswith("…")
    (broken,) = wrap("q" * 400, size=13, width=60, most=1)
    assert _word_width(broken[0], 13) <= 60


def seed_run(seed: int, **facts: Any) -> dict[str, Any]:
    """What the report of a run of that seed says of it."""
    own = {"seed": seed, "checkpoint": f"runs/{seed}/checkpoint-9", "samples": {"caption": 4}}
    return RUN | own | {"split": "test", "protocol": "free-running"} | facts


def test_summary_over_seeds(tmp_path: Path) -> None:
    for seed, value in enumerate((0.5, 0.7, 0.9)):
        scores = {"tuned": dict.fromkeys(KEYS, value), "untuned": {"caption_cider": value} if seed else {}}
        write_report(build_report(scores, seed_run(seed)), tmp_path / str(seed))
    text = write_summary([tmp_path / str(seed) for seed in range(3)], tmp_path / "out", "Three seeds")
    assert "| referring segmentation | mIoU | 0.700 ± 0.200 | – | – |" in text
    assert (tmp_path / "out/summary.md").read_text() == text
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["tuned"]["caption_cider"] == {
        "mean": pytest.approx(0.7),
        "std": pytest.approx(0.2),
        "values": [0.5, 0.7, 0.9],
    }
    assert summary["untuned"]["caption_cider"]["mean"] is None, "one run lacks it"
    assert [run["seed"] for run in summary["runs"]] == [0, 1, 2]


def test_a_summary_compares_like_with_like(tmp_path: Path) -> None:
    one, other = example(), example()
    with pytest.raises(ValueError, match="at least two reports, found 1"):
        summarise([one])
    for facts, message in (
        ({"samples": 499}, 'differ in samples: 499, {"caption": 4}'),
        ({"data": "shards/b"}, 'differ in data: "shards/b", null'),
        ({"phrases": "each alone"}, 'differ in phrases: "each alone", null'),
        ({"settings": {"seed": 1, "limit": 9}}, "differ in settings.limit: 0, 9"),
        ({"checkpoint": "runs/0/checkpoint-9", "seed": 0}, "two reports are of one run, runs/0/checkpoint-9 of seed 0"),
    ):
        one["run"], other["run"] = seed_run(0, settings={"seed": 0, "limit": 0}), seed_run(1) | facts
        with pytest.raises(ValueError, match=re.escape(message)):
            summarise([one, other])
    # The evaluation's seed may differ, and older reports have no settings.
    one["run"], other["run"] = seed_run(0, settings={"seed": 0}), seed_run(1, settings={"seed": 1})
    summarise([one, other, one | {"run": seed_run(2)}])
    with pytest.raises(ValueError, match="evaluate that run first"):
        write_summary([tmp_path / "none"], tmp_path, "x")
    write_report(one, tmp_path / "one")
    with pytest.raises(ValueError, match="is named twice"):
        write_summary([tmp_path / "one", tmp_path / "one/../one"], tmp_path, "x")
    write_report(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"report.json cannot be made a folder \(File exists\)"):
        write_summary([tmp_path / "one", tmp_path / "other"], tmp_path / "one/report.json", "x")


def test_a_summary_of_counts_that_are_one_number(tmp_path: Path) -> None:
    for seed in range(2):
        write_report(build_report({}, seed_run(seed, samples=500)), tmp_path / str(seed))
    assert "| checkpoint-9 | 500 |" in write_summary([tmp_path / "0", tmp_path / "1"], tmp_path, "x")


def test_what_is_no_report_is_named_by_file_and_field(tmp_path: Path) -> None:
    whole = json.loads(json.dumps(build_report({"tuned": dict.fromkeys(KEYS, 0.5)}, seed_run(0))))
    path = tmp_path / "report.json"
    path.write_text(json.dumps(whole))
    assert read_report(tmp_path) == whole
    run = whole["run"]
    for content, message in (
        (json.dumps(whole)[:-9], "is damaged ("),
        ("[]", "is damaged (it holds no JSON object)"),
        ('{"a": 1}', "(run is no object)"),
        (json.dumps({"run": run}), "(tuned is no object)"),
        (json.dumps(whole | {"run": {k: v for k, v in run.items() if k != "seconds"}}), "(run.seconds is missing)"),
        (json.dumps(whole | {"run": run | {"seconds": {"tune": "long"}}}), "(run.seconds holds something other"),
        (json.dumps(whole | {"run": run | {"samples": "many"}}), "(run.samples is of another kind)"),
        (json.dumps(whole | {"untuned": []}), "(untuned is no object)"),
        (json.dumps(whole | {"tuned": {"caption_cider": "high"}}), "(tuned.caption_cider is no number)"),
        (json.dumps(whole | {"tuned": {"caption_cider": float("nan")}}), "(tuned.caption_cider is no number)"),
        (json.dumps(whole | {"intervals": 3}), "(intervals is no object)"),
        (
            json.dumps(whole | {"intervals": {"tuned": {"caption_cider": [1]}}}),
            "(intervals.tuned.caption_cider is no pair of numbers)",
        ),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read_report(tmp_path)
        assert str(path) in str(error.value) and "evaluate that run again" in str(error.value)
