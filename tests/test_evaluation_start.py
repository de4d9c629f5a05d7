"""What an evaluation looks at before it loads and answers, and what must not end it: a damaged sample, an export."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_answers import mini_checkpoint

from pipeline.assembly import evaluation
from pipeline.assembly.evaluation import Evaluation
from pipeline.config import EvalArguments
from pipeline.data.mixture import MixedDataset
from pipeline.data.writer import pack
from pipeline.inference.export import save_pretrained
from pipeline.mini.source import MiniSource
from pipeline.runtime.ranks import Ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of a few scenes, run/checkpoint-3 without training."""
    root = tmp_path_factory.mktemp("start")
    pack(MiniSource({"train": 1, "test": 3}), "test", root / "shards", progress=False)
    mini_checkpoint(root / "run", data=str(root / "shards"))
    return root


@pytest.fixture
def checkpoint(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in a run of its own, of which nothing large may be loaded."""

    def load(*args: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(evaluation.parts, "load_vision", load)
    return shutil.copytree(world / "run/checkpoint-3", tmp_path / "run/checkpoint-3")


def refused(checkpoint: Path, wanted: str, **flags: Any) -> None:
    with pytest.raises(ValueError, match=wanted):
        Evaluation(EvalArguments(checkpoint=str(checkpoint), **flags), ALONE)


def test_a_damaged_checkpoint_is_told_first(checkpoint: Path) -> None:
    weights = checkpoint / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(checkpoint, "no whole checkpoint: trained.safetensors has .* bytes instead of")


@pytest.mark.parametrize("state", ['{"format": 1, "step": 3}', '{"format": 1, "step": 3, "config": {}, "base": {}}'])
def test_a_state_without_settings_is_no_checkpoint(checkpoint: Path, state: str) -> None:
    (checkpoint / "state.json").write_text(state)
    refused(checkpoint, "does not say its settings")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"seconds": 5}', '{"seconds": {"load": "x"}}', '{"seconds": {"load": NaN}}']
)
def test_a_damaged_record_of_the_run_is_told_first(checkpoint: Path, text: str) -> None:
    (checkpoint.parent / "run.json").write_text(text)
    refused(checkpoint, "run.json is damaged")


def test_phrases_want_the_referring_task(world: Path, checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["DataArguments"] |= {"tasks": "caption,generation", "task_mix": ""}
    (checkpoint / "state.json").write_text(json.dumps(state))
    refused(checkpoint, r"--each_phrase .*its tasks: caption, generation\): leave the flag out", each_phrase=True)


def test_a_split_of_which_nothing_can_be_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: MixedDataset, i: int) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr(MixedDataset, "__getitem__", broken)
    refused(checkpoint, "--split test holds nothing that can be asked .*no picture")
    refused(checkpoint, "--split test holds nothing that can be asked", each_phrase=True)


@pytest.mark.parametrize("command", ["--checkpoint", "--summarise"])
def test_a_report_folder_that_is_a_file_is_one_message(
    checkpoint: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repo: Path
) -> None:
    file = checkpoint.parent / "file"
    file.write_text("mine")
    sums = repo / "docs/results/mini"
    runs = []
    for seed in range(2):
        folder = checkpoint.parent / str(seed)
        folder.mkdir()
        summary = json.loads((sums / "summary.json").read_text())
        report = {name: {} for name in summary if name != "runs"} | {"intervals": {}, "run": summary["runs"][seed]}
        (folder / "report.json").write_text(json.dumps(report))
        runs.append(str(folder))
    value = str(checkpoint) if command == "--checkpoint" else ",".join(runs)
    monkeypatch.setattr(sys, "argv", ["evaluate_mmud.py", command, value, "--report_dir", str(file)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(repo / "pipeline/evaluate_mmud.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert said.startswith("evaluate_mmud.py: error: ") and str(file) in said and said.count("\n") == 1


def test_an_export_in_a_runs_folder_and_an_unreadable_sample(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MixedDataset.__getitem__

    def broken(self: MixedDataset, i: int) -> Any:
        if i == 0:
            raise ValueError("no picture")
        return read(self, i)

    monkeypatch.setattr(MixedDataset, "__getitem__", broken)
    export = save_pretrained(world / "run/checkpoint-3", tmp_path / "run/export")
    # As if the run had been tracked.
    (tmp_path / "run/metrics.jsonl").write_text("")
    flags = {"candidates": 1, "bootstrap": 0, "max_new_tokens": 3, "data": str(world / "shards")}
    said = Evaluation(EvalArguments(checkpoint=str(export), report_dir=str(tmp_path / "out"), **flags), ALONE).run()
    assert "1 samples could not be read" in said and "no picture" in said
    run = json.loads((tmp_path / "out/report.json").read_text())["run"]
    assert (run["skipped samples"], run["samples"]["caption"]) == (1, 2)
    about = json.loads((tmp_path / "out/predictions/about.json").read_text())
    assert about["vocabulary"] == "mini" and about["saved"]["tuned"]["answers"] == 8
    details = json.loads((tmp_path / "out/details.json").read_text())["tuned"]
    assert details["caption"]["answers that met max_new_tokens"] == 2
    assert not (tmp_path / "run/mlflow.json").exists()


@pytest.mark.parametrize("asked, preset, most", [(0, "mini", 64), (0, "", 128), (0, "7b", 128), (5, "mini", 5)])
def test_answers_may_be_longer_than_those_of_the_mini_world(asked: int, preset: str, most: int) -> None:
    assert evaluation.most_tokens(asked, preset) == most
