"""Checkpoints on disk: whole or not taken, old ones removed only after the new one is whole. No DeepSpeed here."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.runtime import checkpoint
from pipeline.runtime.elastic import TrainedState


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.trained = nn.Linear(3, 5)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def state_of(model: Model) -> TrainedState:
    weights = {"trained.weight": model.trained.weight, "trained.bias": model.trained.bias, "kept": model.kept}
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return TrainedState(weights=weights, moments={"exp_avg/trained.bias": torch.zeros(5)})


def save(folder: Path, step: int, **facts: object) -> Path:
    path = folder / f"checkpoint-{step}"
    checkpoint.write(path, state_of(Model()), {"format": checkpoint.FORMAT, "step": step, **facts})
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights cut": lambda path: cut(path / checkpoint.WEIGHTS),
    "weights flipped": lambda path: flip(path / checkpoint.WEIGHTS),
    "moments cut": lambda path: cut(path / checkpoint.MOMENTS),
    "moments gone": lambda path: (path / checkpoint.MOMENTS).unlink(),
    "state cut": lambda path: cut(path / checkpoint.STATE),
    "manifest cut": lambda path: cut(path / checkpoint.MANIFEST) or cut(path / checkpoint.MANIFEST),
    "manifest gone": lambda path: (path / checkpoint.MANIFEST).unlink(),
    "empty": lambda path: [file.unlink() for file in path.iterdir()] and None,
    "unrenamed": lambda path: os.replace(path, f"{path}.tmp"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_broken_checkpoint_is_never_taken(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 9), save(tmp_path, 10)
    assert checkpoint.find_latest(tmp_path) == bad
    damage(bad)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find_latest(tmp_path) == good
    assert ("checkpoint-10" in caplog.text) == bad.exists()
    if bad.exists():
        with pytest.raises(ValueError, match="no whole checkpoint"):
            checkpoint.load_trained(Model(), bad)
    shutil.rmtree(good)
    assert checkpoint.find_latest(tmp_path) is None


@pytest.mark.parametrize("at", range(8))
def test_a_kill_at_any_write_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Each call that touches the disk is made to be the last one."""
    older = save(tmp_path, 1)
    calls = 0

    def dying(real: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((checkpoint, "save_file"), (checkpoint, "_sync"), (os, "replace")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    # Eight points: two tensor files, four syncs, the folder's sync, the rename.
    assert calls == at + 1
    assert checkpoint.find_latest(tmp_path) == older
    newer = save(tmp_path, 2)
    assert checkpoint.find_latest(tmp_path) == newer
    assert not list(tmp_path.glob("*.tmp"))


def test_replacing_a_step_never_leaves_it_without_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3, note="old")
    real, moves = os.replace, []

    def replace(a: Path, b: Path) -> None:
        moves.append(b)
        if len(moves) == 2:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3, note="new")
    found = checkpoint.find_latest(tmp_path)
    assert found is not None
    assert checkpoint.read_state(found)["note"] == "old"
    save(tmp_path, 3, note="new")
    assert checkpoint.read_state(tmp_path / "checkpoint-3")["note"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_pruning(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (2, 10, 30)]
    checkpoint.prune(tmp_path, keep=0, newest=paths[-1])
    assert all(path.exists() for path in paths)
    (paths[1] / checkpoint.MANIFEST).unlink()
    checkpoint.prune(tmp_path, keep=2, newest=paths[-1])
    # A broken one is no substitute for an older whole one.
    assert [path.exists() for path in paths] == [True, False, True]
    checkpoint.prune(tmp_path, keep=1, newest=paths[-1])
    assert [path.exists() for path in paths] == [False, False, True]


def test_killed_while_pruning_no_torn_checkpoint_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(tmp_path, step) for step in (2, 10)]

    def remove_one(path: Path, **options: bool) -> None:
        if Path(path).exists():
            next(iter(sorted(Path(path).iterdir(), reverse=True))).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", remove_one)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, keep=1, newest=paths[-1])
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [10]
    save(tmp_path, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]


def test_newest_is_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [100, 20, 9]


def test_what_resume_means(tmp_path: Path) -> None:
    assert checkpoint.find_resume("auto", tmp_path / "nowhere") is None
    first, last = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.find_resume("auto", tmp_path) == last
    assert checkpoint.find_resume("never", tmp_path) is None
    assert checkpoint.find_resume(str(first), "elsewhere") == first
    assert checkpoint.find_resume(str(tmp_path), "elsewhere") == last
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.find_resume(str(tmp_path / "nowhere"), tmp_path)


def test_weights_come_back_without_deepspeed(tmp_path: Path) -> None:
    model, other = Model(), Model()
    model.kept.fill_(3.0)
    path = tmp_path / "checkpoint-1"
    checkpoint.write(path, state_of(model), {"format": checkpoint.FORMAT, "step": 1})
    frozen = other.frozen.weight.clone()
    assert checkpoint.load_trained(other, path)["step"] == 1
    assert torch.equal(other.trained.weight, model.trained.weight)
    assert torch.equal(other.kept, model.kept)
    assert torch.equal(other.frozen.weight, frozen)
    other.trained = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"of another shape: .*trained\.bias \(5,\) instead of \(4,\)"):
        checkpoint.load_trained(other, path)
    other.trained = nn.Linear(3, 5, bias=False)
    other.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"missing: extra; unexpected: trained\.bias"):
        checkpoint.load_trained(other, path)


def test_another_order_of_samples_is_refused() -> None:
    reader = {"digest": "ab", "seed": 0, "tasks": ["caption"]}
    checkpoint.check_reader(reader, {"digest": "ab", "seed": 0, "tasks": ("caption",)})
    with pytest.raises(ValueError, match=r"digest: 'ab' -> 'cd'; seed: 0 -> 1.*--resume never"):
        checkpoint.check_reader(reader, reader | {"digest": "cd", "seed": 1})


def test_starting_anew_sets_the_earlier_run_aside(tmp_path: Path) -> None:
    assert checkpoint.set_aside(tmp_path / "nowhere") is None
    for number in (1, 2):
        save(tmp_path, 5)
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        (tmp_path / "my_notes.txt").write_text("mine")
        assert checkpoint.set_aside(tmp_path) == tmp_path / f"earlier-{number}"
    assert checkpoint.set_aside(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2", "my_notes.txt"]
    assert (tmp_path / "earlier-2/checkpoint-5").exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    facts = json.loads((path / checkpoint.STATE).read_text())
    (path / checkpoint.STATE).write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.read_state(path)


@pytest.mark.parametrize(
    "text, wanted",
    [("[]", "must be a JSON object, found list"), ('{"format": 1}', "lacks its step"), ("{", "cannot be read")],
)
def test_a_state_of_something_else_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / checkpoint.STATE).write_text(text)
    with pytest.raises(ValueError, match=wanted):
        checkpoint.read_state(tmp_path)
