"""The example task beside the other four: tuned, answered and scored; and reports that do not depend on how they came.

One process trains two steps of five tasks on a few mini scenes and scores them one prompt and sixteen at a time, and
from what was saved; two ranks score them again. Without java, whose starts would cost more than all the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.batch import VisionFeatures
from pipeline.data.task_module import load_task_module
from pipeline.data.tasks import TASKS, TaskOptions, add_task
from pipeline.data.writer import pack
from pipeline.mini.source import MiniSource
from pipeline.model.heads import HEADS
from pipeline.model.initialise import initialise
from pipeline.runtime.ranks import free_port
from pipeline.scoring.predictions import Prediction
from pipeline.scoring.scores import SCORES, Score, add_scores
from pipeline.scoring.suite import SCORERS, Rules

REPO = Path(__file__).resolve().parent.parent
EXAMPLE = REPO / "examples" / "grounding.py"
FIVE = "reasoning,referring,caption,generation,grounding"
Facts = dict[str, dict[str, Any]]


@pytest.fixture
def grounding() -> Iterator[None]:
    """The example's registrations, taken back after the test."""
    registries: list[dict[str, Any]] = [TASKS, HEADS, SCORES, SCORERS]  # type: ignore[list-item]
    before = [dict(registry) for registry in registries]
    load_task_module(str(EXAMPLE))
    yield
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)
    for name in [name for name in sys.modules if name.startswith("task_module_")]:
        del sys.modules[name]


@pytest.mark.usefixtures("grounding")
def test_the_example_asks_for_a_box_and_scores_it() -> None:
    sample = MiniSource({"test": 1}).load("test", 0)
    text = TASKS["grounding"].build(sample, np.random.default_rng(0), TaskOptions())
    (index,), (box,) = text.object_indices, text.values
    chosen = sample.objects[index]
    assert text.prompt == f"Where is {text.reference['phrases'][0]}?" and text.reference["phrases"][0] in chosen.phrases
    assert text.answer == f"the {chosen.category} <OBJ-1>."
    assert [share * sample.width for share in box] == pytest.approx(chosen.box)

    def answer(*values: list[float] | None) -> Prediction:
        wanted = {"values": [[0.0, 0.0, 0.5, 1.0]]}
        return Prediction(key="k", task="grounding", text="", masks=[], values=list(values), reference=wanted)

    # Right, half of it, without a box (the token was not written, or not the first).
    some = [answer([0.0, 0.0, 0.5, 1.0]), answer([0.0, 0.0, 0.25, 1.0]), answer(), answer(None, [0.0, 0.0, 0.5, 1.0])]
    scored = SCORERS["grounding"](some, Rules(tasks=("grounding",)), None, "tuned")
    assert scored.figures == {"grounding_box_iou": 1.5 / 4, "grounding_hits": 2 / 4}
    assert scored.details["without a box"] == 2


@pytest.mark.usefixtures("grounding")
def test_the_examples_decoder_learns_where_a_state_points() -> None:
    torch.manual_seed(0)
    head = HEADS["grounding"](8, 6)
    initialise(head, 0)
    tokens, states = torch.randn(12, 17, 6), torch.randn(12, 8)
    features = VisionFeatures(tokens=tokens, taps=(), embedding=tokens[:, 0])
    corner = torch.rand(12, 2) * 0.5
    targets = torch.cat([corner, corner + 0.4], dim=1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    first = None
    for _ in range(150):
        loss = head.losses(head(features, states), targets).mean()
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


@pytest.mark.usefixtures("grounding")
def test_names_that_are_taken_are_refused() -> None:
    with pytest.raises(ValueError, match="a task named caption already"):
        add_task(type("Caption", (), {"name": "caption", "needs_image": True, "values": 0})())
    with pytest.raises(ValueError, match="scores named caption_cider already"):
        add_scores({"caption_cider": Score("x", "y", 1, "z")})
    with pytest.raises(ValueError, match="there is no such file"):
        load_task_module("nowhere.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports one, sixteen, again (from sixteen's answers) and ranks, of one checkpoint, with facts.json."""
    root = tmp_path_factory.mktemp("five")
    source = MiniSource({"train": 10, "test": 3})
    for split in source.splits():
        pack(source, split, root / "shards", progress=False)
    tools = root / "bin"
    tools.mkdir()
    (tools / "git").symlink_to(shutil.which("git") or "git")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"PATH": f"{Path(sys.executable).parent}:{tools}", "OMP_NUM_THREADS": "1"}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    run, module = str(root / "run"), str(EXAMPLE)
    sizes = ["--max_steps", "2", "--global_batch", "10", "--num_workers", "0", "--logging_steps", "1"]
    train = ["--output_dir", run, "--data", str(root / "shards"), *sizes, "--task_module", module, "--tasks", FIVE]

    def evaluate(name: str, batch: str) -> list[str]:
        where = ["--checkpoint", run, "--report_dir", str(root / name)]
        how = ["--protocol", "both", "--max_new_tokens", "16", "--bootstrap", "50", "--candidates", "2"]
        return [*where, *how, "--eval_batch", batch]

    unnamed = ["--from", str(root / "sixteen/predictions"), "--report_dir", str(root / "again"), "--bootstrap", "50"]
    saved = [*unnamed, "--task_module", module]
    plan = [
        {"name": "train", "script": "train.py", "args": train},
        {"name": "one", "script": "evaluate_mmud.py", "args": evaluate("one", "1")},
        {"name": "sixteen", "script": "evaluate_mmud.py", "args": evaluate("sixteen", "16")},
        {"name": "again", "script": "evaluate_mmud.py", "args": saved},
        {"name": "unnamed module", "script": "evaluate_mmud.py", "args": unnamed},
        {"name": "no answers", "script": "evaluate_mmud.py", "args": ["--from", str(root / "shards")]},
    ]
    (root / "plan.json").write_text(json.dumps(plan))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    for command in (
        [sys.executable, "tests/scripts_job.py", str(root / "plan.json"), str(root / "facts.json")],
        [*torchrun, str(free_port()), "pipeline/evaluate_mmud.py", *evaluate("ranks", "4")],
    ):
        done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=550, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return root


@pytest.fixture(scope="module")
def facts(root: Path) -> Facts:
    return json.loads((root / "facts.json").read_text())


def report(root: Path, name: str) -> dict[str, Any]:
    """A report without what its making took."""
    found = json.loads((root / name / "report.json").read_text())
    for key in ("seconds", "seconds per pair"):
        assert found["run"].pop(key)
    return found


def test_five_tasks_are_tuned_together(root: Path, facts: Facts) -> None:
    assert facts["train"]["code"] == 0, facts["train"]["err"]
    lines = [json.loads(line)["metrics"] for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    for step in (line for line in lines if "loss" in line):
        assert {"loss/value/grounding", "loss/ce/grounding", "loss/ce/caption", "loss/dice/grounding"} <= set(step)
    weights = load_file(root / "run/checkpoint-2/trained.safetensors")
    assert weights["heads.grounding.last.weight"].shape == (4, 128)
    config = json.loads((root / "run/checkpoint-2/state.json").read_text())["config"]["DataArguments"]
    assert config["task_module"] == str(EXAMPLE)


def test_the_report_holds_every_score_of_all_five(root: Path, facts: Facts) -> None:
    for name in ("one", "sixteen", "again"):
        assert facts[name]["code"] == 0, facts[name]["err"]
    found = report(root, "sixteen")
    assert set(found["tuned"]) == {*SCORES, "grounding_box_iou", "grounding_hits"}
    # No java, no Inception weights, and three pictures are not fifty.
    missing = {"caption_meteor", "picture_fid", "picture_kid", "picture_is", "picture_text_r1_of_50"}
    forced = {name for name, value in found["teacher_forced"].items() if value is None}
    assert forced == missing
    assert found["teacher_forced"]["grounding_box_iou"] > 0
    intervals = found["intervals"]["teacher_forced"]
    without = {"picture_clip_frechet", "picture_clip_kernel"}
    assert set(intervals) == set(found["teacher_forced"]) - missing - without
    assert all(low <= high for low, high in intervals.values())
    assert found["run"]["samples"] == dict.fromkeys(FIVE.split(","), 3)
    assert "| grounding | box IoU |" in (root / "sixteen/report.md").read_text()


def test_the_report_is_the_same_one_by_one_and_on_two_ranks(root: Path) -> None:
    one, sixteen, ranks = (report(root, name) for name in ("one", "sixteen", "ranks"))
    assert one == sixteen == ranks
    answers = []
    for name in ("one", "sixteen", "ranks"):
        lines = (root / name / "predictions/teacher_forced.jsonl").read_text().splitlines()
        answers.append([[line[part] for part in ("key", "task", "text", "masks")] for line in map(json.loads, lines)])
    assert answers[0] == answers[1] == answers[2]
    assert any(mask for _, task, _, masks in answers[0] if task == "referring" for mask in masks)
    pictures = [sorted((root / name / "predictions/teacher_forced").iterdir()) for name in ("one", "ranks")]
    assert len(pictures[0]) == 3
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]


def test_saved_answers_score_the_same_without_a_model(root: Path, facts: Facts) -> None:
    assert report(root, "again") == report(root, "sixteen")
    details = [json.loads((root / name / "details.json").read_text()) for name in ("again", "sixteen")]
    assert details[0] == details[1]
    tables = (root / "again/tables.md").read_text()
    assert "| again | measured |" in tables and "| printed |" in tables
    assert (root / "again/table1.csv").read_text().splitlines()[0].startswith("model,figures are,reasoning mIoU")
    assert facts["unnamed module"]["code"] == 2
    assert f"give --task_module {EXAMPLE} if you trust that file" in facts["unnamed module"]["err"]
    settings = report(root, "again")["run"]["settings"]
    assert (settings["max_new_tokens"], settings["candidates"], settings["dtype"]) == (16, 2, "float32")
    assert (settings["bootstrap"], settings["caption tokenizer"], settings["inception_weights"]) == (50, "simple", "")
    assert "a tokenizer of our own" in facts["again"]["out"]
    assert facts["no answers"]["code"] == 2
    assert "about.json is missing" in facts["no answers"]["err"]
