"""Caption scores against the published values of COCO's example, tokenizers, and what happens without java. CPU only.

With java (CI installs it) this starts the PTB tokenizer and METEOR; without it those tests are skipped.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path

import pycocoevalcap
import pytest

from pipeline.scoring import captions
from pipeline.scoring.captions import java_command, score_captions, tokenize_ptb, tokenize_simple

needs_java = pytest.mark.skipif(java_command() is None, reason="needs java")
SMALL = {"a": ["A dog runs."], "b": ["A cat sits, there."], "c": ["Two birds fly over the sea."]}
GUESSES = {"a": "a dog runs", "b": "the cat sits here", "c": ""}


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def coco_example(data_dir: Path) -> tuple[dict, dict, dict]:
    folder = data_dir / "caption_scores"
    truths, guesses, expected = (json.loads((folder / f"{n}.json").read_text()) for n in ("gts", "res", "expected"))
    return truths, {key: text for key, (text,) in guesses.items()}, expected["scores"]


def test_published_scores(data_dir: Path) -> None:
    truths, guesses, expected = coco_example(data_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score_captions(truths, guesses, tokenizer="none")
    names = {"bleu1": "Bleu_1", "bleu2": "Bleu_2", "bleu3": "Bleu_3", "bleu4": "Bleu_4"}
    names |= {"rouge_l": "ROUGE_L", "cider": "CIDEr"} | ({"meteor": "METEOR"} if java_command() else {})
    # The notebook prints three decimals.
    assert {ours: round(scores[ours], 3) for ours in names} == {
        ours: expected[theirs] for ours, theirs in names.items()
    }
    assert scores["samples"] == 1000


@needs_java
def test_ptb_tokens_and_aligned_lines() -> None:
    texts = ["A dog's ball, isn't it?  It's 3.5 m (long)...", "one\u2028two\x0bthree\nfour", "", 'naïve – "é" 50%']
    assert tokenize_ptb(texts) == [
        "a dog 's ball is n't it it 's 3.5 m long",
        "one two three four",
        "",
        "naïve é 50 %",
    ]


@needs_java
def test_package_folder_is_not_written_to() -> None:
    folder = Path(pycocoevalcap.__path__[0]) / "tokenizer"
    before = folder.stat().st_mtime_ns
    assert tokenize_ptb(["A dog."]) == ["a dog"]
    assert folder.stat().st_mtime_ns == before, "nothing was made or removed there"


def test_simple_tokens() -> None:
    assert tokenize_simple(["A dog's ball, isn't it? 3.5 m (long)...", "a well-known man", "", "can't"]) == [
        "a dog 's ball is n't it 3.5 m long",
        "a well-known man",
        "",
        "ca n't",
    ]


@needs_java
def test_with_java_everything_is_there() -> None:
    scores = score_captions(SMALL, GUESSES)
    assert scores["tokenizer"] == "ptb"
    assert scores["missing"] == {}
    assert 0 < scores["meteor"] < 1


@pytest.mark.usefixtures("no_java")
def test_without_java_meteor_is_named_as_missing() -> None:
    with pytest.warns(UserWarning, match="METEOR is missing"):
        scores = score_captions(SMALL, GUESSES)
    assert scores["tokenizer"] == "simple"
    assert scores["meteor"] is None
    assert "java" in scores["missing"]["meteor"]
    assert scores["cider"] > 0
    with pytest.raises(RuntimeError, match="needs java"):
        tokenize_ptb(["a"])


def test_java_that_dies_does_not_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.warns(UserWarning, match="ended early"):
        scores = score_captions(SMALL, GUESSES, tokenizer="simple")
    assert scores["meteor"] is None
    assert scores["bleu1"] > 0
    with pytest.raises(RuntimeError, match="0 lines for 1 captions"):
        tokenize_ptb(["a"])


def test_java_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexec sleep 60\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.warns(UserWarning, match="ended early"):
        assert score_captions(SMALL, GUESSES, tokenizer="simple", meteor_timeout=0.5)["meteor"] is None


def test_perfect_and_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "java_command", lambda: None)
    long = {str(i): [f"picture {i} shows thing number {i} on a table"] for i in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perfect = score_captions(long, {key: texts[0] for key, texts in long.items()})
        hopeless = score_captions(long, dict.fromkeys(long, ""))
    assert perfect["bleu4"] == pytest.approx(1)
    assert perfect["rouge_l"] == pytest.approx(1)
    assert perfect["cider"] > 5
    assert hopeless["bleu4"] == pytest.approx(0, abs=1e-6)
    assert hopeless["cider"] == 0


def test_refusals_and_the_empty_set() -> None:
    with pytest.raises(ValueError, match="1 pictures have only references or only a candidate"):
        score_captions({"a": ["x"]}, {})
    with pytest.raises(ValueError, match="no reference caption"):
        score_captions({"a": []}, {"a": "x"})
    with pytest.raises(ValueError, match="choose auto, ptb, simple or none"):
        score_captions({}, {}, tokenizer="spacy")
    empty = score_captions({}, {})
    assert empty["cider"] is None
    assert set(empty["missing"]) == set(captions.METRICS)
