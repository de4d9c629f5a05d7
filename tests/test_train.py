"""train.py and evaluate_mmud.py as they are typed, on MMUD files, a LLaMA folder and an open_clip file.

The weights are random. A start costs seconds, so three give the facts of all tests: one process, two ranks under the
deepspeed launcher, and one process that goes through the rest. Measured: losses and gradient norms of ZeRO-2 on one
rank and ZeRO-3 with recomputation on two differ by 2e-7 relative (order of summation); a resume as before is
bit-identical.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import LAYERS, MMUD, REPO
from train_world import World, launcher

from pipeline.assembly import parts
from pipeline.assembly.evaluation import open_checkpoint
from pipeline.assembly.running import with_absolute_paths
from pipeline.config import DataArguments, ModelArguments, to_dict
from pipeline.runtime.checkpoint import load_trained, read_state, verify
from pipeline.scoring.scores import CONDITIONS, SCORES

ACROSS = 2e-6
SCORE_NAMES = {
    *("referring_miou", "referring_oiou", "reasoning_miou", "reasoning_oiou", "caption_bleu4", "caption_cider"),
    *("caption_object_f1", "referring_object_accuracy", "reasoning_object_accuracy"),
    *("picture_text_r1_of_50", "picture_clip_cosine"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The files, the run of one process (ZeRO-2) and that of two ranks (ZeRO-3), four steps each."""
    world = World(tmp_path_factory.mktemp("train"))
    pack = ["--source", "mmud", "--mmud_root", MMUD, "--image_root", MMUD / "images", "--workers", "1"]
    said = world.start(sys.executable, "pipeline/shard_mmud.py", *pack, "--out", world.shards).stdout
    assert "train: 5 samples" in said
    alone = world.flags(world.one, micro_batch=2, gradient_checkpointing="none", register_model="tuned")
    world.start(sys.executable, "pipeline/train.py", *alone, "--deepspeed", "ds_configs/z2.json")
    ranks = world.flags(world.two, micro_batch=1)
    world.start(*launcher(), "pipeline/train.py", *ranks, "--deepspeed", "ds_configs/z3.json")
    return world


def without_valid(world: World) -> Path:
    """The packed data set, less the validation split."""
    folder = shutil.copytree(world.shards, world.root / "without_valid")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["valid"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def jobs(world: World) -> dict[str, dict[str, Any]]:
    """What became of every other command, by name: code, out, err."""
    # What a training writes meanwhile, an evaluation of an older checkpoint must leave alone.
    shutil.copy(world.two / "metrics.jsonl", world.root / "before.jsonl")

    def train(name: str, **changed: Any) -> dict[str, Any]:
        return {"name": name, "script": "train.py", "args": world.flags(world.root / name.replace(" ", "_"), **changed)}

    def evaluate(name: str, run: Path, *more: str | Path) -> dict[str, Any]:
        args = ["--checkpoint", run, "--split", "valid", "--max_new_tokens", "8", *more]
        return {"name": name, "script": "evaluate_mmud.py", "args": [str(word) for word in args]}

    def look(name: str, run: Path) -> dict[str, Any]:
        args = ["--checkpoint", run, "--split", "train", "--samples", "4", "--batch", "2"]
        return {"name": name, "script": "look_inside.py", "args": [str(word) for word in args]}

    saved, forced = world.one / "checkpoint-2", ("--protocol", "teacher-forced")
    released: dict[str, Any] = {"mechanism": "released", "first_tuned_layer": 1, "projections": "qkv", "bf16": "true"}
    released |= {"global_batch": 2, "max_steps": 2}
    paths = {"base": "base", "clip_weights": "clip", "data": "shards"}
    unknown = train("unknown flag")
    unknown["args"] += ["--global-bach", "8"]
    ready = train("ready")
    ready["args"] += ["--preflight"]
    plan = [
        unknown,
        train("no base", leave_out="base"),
        train("missing data", data=world.root / "nowhere"),
        train("missing base", base=world.root / "nowhere"),
        train("missing deepspeed", deepspeed=world.root / "z9.json"),
        train("odd batch", micro_batch=3),
        train("small valid", eval_steps=2),
        train("no valid", eval_steps=2, data=without_valid(world)),
        train("several", clip_weights=world.root / "nowhere", data=world.root / "nowhere", micro_batch=3),
        ready,
        train("other seed", resume=saved, seed=1),
        train("other batch", resume=saved, global_batch=2),
        train("other length", resume=saved, max_steps=6),
        train("other base", resume=saved, base=world.other_base),
        train("resumed", resume=saved, micro_batch=2, gradient_checkpointing="none", deepspeed="ds_configs/z2.json"),
        train("moved", resume=world.two / "checkpoint-2", deepspeed="ds_configs/z1.json"),
        train(
            "released",
            **released,
            gradient_checkpointing="attention",
            eval_steps=2,
            # As they are typed in the folder where the job runs.
            **{name: os.path.relpath(getattr(world, of), REPO) for name, of in paths.items()},
        ),
        train("released z3", **released, deepspeed="ds_configs/z3.json"),
        train("lora", tuner="lora", max_steps=2),
        train("ia3", tuner="ia3", max_steps=2, deepspeed="ds_configs/z3.json"),
        evaluate("no run", world.root / "nowhere"),
        evaluate("wrong base", world.two, "--base", world.other_base),
        evaluate("scores", world.two, "--condition", "all", "--report_dir", world.root / "scores"),
        evaluate("forced", world.two / "checkpoint-2", *forced, "--report_dir", world.root / "forced"),
        evaluate("scores released", world.root / "released", "--limit", "1"),
        evaluate("scores lora", world.root / "lora", "--limit", "1"),
        look("units", world.one),
        look("no units", world.root / "lora"),
    ]
    (world.root / "plan.json").write_text(json.dumps(plan))
    world.start(sys.executable, "tests/scripts_job.py", world.root / "plan.json", world.root / "facts.json")
    return json.loads((world.root / "facts.json").read_text())


def losses(run: Path) -> list[dict[str, float]]:
    """The figures of each step that depend on computation alone."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in line["metrics"].items() if name.startswith("loss") or name in ("grad_norm", "lr")}
        for line in lines
        if "loss" in line["metrics"]
    ]


def test_one_rank_and_two_compute_the_same(world: World) -> None:
    one, two = losses(world.one), losses(world.two)
    assert len(one) == 4
    assert one[-1]["loss"] < 0.9 * one[0]["loss"]
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=ACROSS)
    # All four tasks are among five samples and four steps.
    assert {"loss/ce/reasoning", "loss/ce/referring", "loss/ce/caption", "loss/ce/generation"} <= set(one[-1])
    assert {"loss/dice", "loss/mse"} <= set(one[-1])
    assert (world.one / "DONE").exists()
    assert read_state(world.two / "checkpoint-4")["world_size"] == 2


def test_a_resume_goes_on_as_if_there_had_been_no_stop(world: World, jobs: Mapping[str, Any]) -> None:
    assert jobs["resumed"]["code"] == 0, jobs["resumed"]["err"]
    assert "Going on from" in jobs["resumed"]["out"]
    assert losses(world.root / "resumed") == losses(world.one)[2:]
    # From ZeRO-3 on two ranks to ZeRO-1 on one.
    assert jobs["moved"]["code"] == 0, jobs["moved"]["err"]
    for a, b in zip(losses(world.one)[2:], losses(world.root / "moved"), strict=True):
        assert b == pytest.approx(a, rel=ACROSS)


def test_bf16_under_zero_3_is_that_of_zero_2(world: World, jobs: Mapping[str, Any]) -> None:
    """What is not loaded in pieces is cast, too: trained weights of two types would be refused."""
    assert jobs["released z3"]["code"] == 0, jobs["released z3"]["err"]
    for a, b in zip(losses(world.root / "released"), losses(world.root / "released_z3"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01)


def test_a_finished_run_says_what_to_do_next(world: World, jobs: Mapping[str, Any]) -> None:
    folder = world.root / "released"
    assert f"python pipeline/evaluate_mmud.py --checkpoint {folder}" in jobs["released"]["out"].splitlines()[-1]


def test_released_mechanism_trains_and_is_recorded(world: World, jobs: Mapping[str, Any]) -> None:
    folder = world.root / "released"
    assert jobs["released"]["code"] == 0, jobs["released"]["err"]
    assert len(losses(folder)) == 2
    assert '"valid/ce"' in (folder / "metrics.jsonl").read_text()
    state = read_state(folder / "checkpoint-2")
    model, train = state["config"]["ModelArguments"], state["config"]["TrainArguments"]
    assert (model["mechanism"], model["projections"], model["alpha"]) == ("released", "qkv", 0.2)
    assert (model["train_embeddings"], model["clip_head"], model["first_tuned_layer"]) == ("all", "mlp", 1)
    assert train["gradient_checkpointing"] == "attention"
    assert state["deepspeed"]["bf16"]["enabled"] is True
    # Absolute, so that the checkpoint can be scored from any folder.
    assert state["base"]["path"] == model["base"] == str(world.base)
    assert model["clip_weights"] == str(world.clip)
    assert state["config"]["DataArguments"]["data"] == str(world.shards)
    assert json.loads((folder / "run.json").read_text())["config"] == state["config"]
    weights = load_file(folder / "checkpoint-2" / "trained.safetensors")
    tuned = {name.split(".")[3] for name in weights if ".network." in name}
    assert tuned == {"1", "2", "3"}
    assert jobs["scores released"]["code"] == 0, jobs["scores released"]["err"]


def test_peft_adapters_train_in_the_same_pipeline(world: World, jobs: Mapping[str, Any]) -> None:
    trained = {}
    for tuner in ("lora", "ia3"):
        assert jobs[tuner]["code"] == 0, jobs[tuner]["err"]
        # Before the first step all three leave the LM as it was: the first loss is the neural tuner's.
        first = losses(world.root / tuner)[0]["loss"]
        assert first == pytest.approx(losses(world.one)[0]["loss"], rel=ACROSS)
        trained[tuner] = load_file(world.root / tuner / "checkpoint-2" / "trained.safetensors")
        assert not [name for name in trained[tuner] if ".network." in name or "base_layer" in name]
    assert {name.split(".")[-3] for name in trained["lora"] if ".adapted." in name} == {"lora_A", "lora_B"}
    assert all(value.any() for name, value in trained["lora"].items() if "lora_B" in name)
    assert any((value != 1).any() for name, value in trained["ia3"].items() if "ia3_l" in name)
    assert jobs["scores lora"]["code"] == 0, jobs["scores lora"]["err"]


def test_look_inside_any_checkpoint(world: World, jobs: Mapping[str, Any]) -> None:
    assert jobs["units"]["code"] == 0, jobs["units"]["err"]
    assert "| reasoning and caption |" in jobs["units"]["out"]
    folder = world.one / "units"
    assert {path.name for path in folder.iterdir()} == {"firing.png", "overlap.png", "units.md", "units.json"}
    data = json.loads((folder / "units.json").read_text())
    assert len(data["rates"]["caption"]) == LAYERS
    assert jobs["no units"]["code"] == 2
    assert "has no sparse network" in jobs["no units"]["err"]


def test_recorded_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ModelArguments(base="llm", clip="local-dir:../clip", prior=str(tmp_path / "prior"))
    found = with_absolute_paths(to_dict(model, DataArguments(data="shards")))
    assert found["DataArguments"]["data"] == str(tmp_path / "shards")
    changed = {name: v for name, v in found["ModelArguments"].items() if v != getattr(model, name)}
    assert changed == {"base": str(tmp_path / "llm"), "clip": f"local-dir:{tmp_path.parent / 'clip'}"}
    # The name of a model is no path.
    named = with_absolute_paths(to_dict(ModelArguments(clip="ViT-L-14-quickgelu")))
    assert named["ModelArguments"]["clip"] == "ViT-L-14-quickgelu"


def test_checkpoint_of_two_ranks_holds_the_trained_part_alone(world: World) -> None:
    folder = world.two / "checkpoint-4"
    trained = open_checkpoint(str(world.two), {})
    assert trained.folder == folder
    assert verify(folder) == []
    llm = parts.load_llm(trained.model, torch.float32)
    tower = parts.load_vision(trained.model, torch.device("cpu"))
    tuner = parts.make_tuner(trained.model, llm, tower, seed=0)
    load_trained(tuner, folder)
    weights = load_file(folder / "trained.safetensors")
    assert set(weights) == set(tuner.trained_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in tuner.trained_parameters().items())
    of_the_llm = {f"llm.model.layers.{i}.network.{name}" for i in range(LAYERS) for name in ("wz", "wb")}
    of_the_llm |= {"llm.model.embed_tokens.rows", "llm.lm_head.rows"}
    assert {name for name in weights if name.startswith("llm.")} == of_the_llm
    assert all(weights[f"llm.model.layers.{i}.network.wb"].abs().max() > 0 for i in range(LAYERS))


def test_evaluation_reports_every_score(world: World, jobs: Mapping[str, Any]) -> None:
    assert jobs["scores"]["code"] == 0, jobs["scores"]["err"]
    report = json.loads((world.root / "scores" / "report.json").read_text())
    assert set(report) == {*CONDITIONS, "intervals", "run"}
    assert set(SCORES) >= SCORE_NAMES
    for condition in CONDITIONS:
        if condition == "teacher_forced":
            continue
        missing = {name for name in SCORE_NAMES if report[condition][name] is None}
        # No VQGAN and prior: no pictures. Real captions: no closed list of object names.
        nameless = {"caption_object_f1", "referring_object_accuracy", "reasoning_object_accuracy"}
        assert missing == nameless | {"picture_text_r1_of_50", "picture_clip_cosine"}
    run = report["run"]
    assert {"samples", "seconds", "versions", "commit"} <= set(run)
    assert run["samples"] == {"reasoning": 2, "referring": 2, "caption": 2, "generation": 2}
    stages = {"load", "tune", "evaluate tuned", "evaluate untuned", "evaluate shuffled"}
    assert stages <= set(run["seconds"])
    assert "No --vqgan and --prior" in jobs["scores"]["out"]
    for name in ("report.md", "contact_sheet.png", "predictions/tuned.jsonl", "predictions/shuffled.jsonl"):
        assert (world.root / "scores" / name).stat().st_size > 0


def test_teacher_forced_evaluation_scores_masks(world: World, jobs: Mapping[str, Any]) -> None:
    assert jobs["forced"]["code"] == 0, jobs["forced"]["err"]
    report = json.loads((world.root / "forced" / "report.json").read_text())
    assert report["run"]["protocol"] == "teacher-forced"
    assert report["untuned"]["referring_miou"] is None
    assert report["tuned"]["referring_miou"] > 0
    lines = [json.loads(line) for line in (world.root / "forced/predictions/tuned.jsonl").read_text().splitlines()]
    masks = [mask for line in lines if line["task"] == "referring" for mask in line["masks"]]
    assert masks and all(mask["size"] in [line["reference"]["size"] for line in lines] for mask in masks)


def test_evaluation_leaves_the_training_record_alone(world: World, jobs: Mapping[str, Any]) -> None:
    # "forced" scored checkpoint-2 of a run that had gone on to step 4.
    before, after = (world.root / "before.jsonl").read_text(), (world.two / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert '"valid/tuned/referring_miou"' in after.removeprefix(before)

    import mlflow

    kept = json.loads((world.two / "mlflow.json").read_text())
    client = mlflow.MlflowClient(kept["uri"])
    assert [metric.step for metric in client.get_metric_history(kept["run_id"], "loss")] == [1, 2, 3, 4]
    # The newer checkpoint was evaluated first, and the older one counts too; each evaluation has its own files.
    scores = client.get_metric_history(kept["run_id"], "valid/tuned/referring_miou")
    assert [metric.step for metric in scores] == [4, 2]
    run = client.get_run(kept["run_id"])
    (folder,) = [f for f in client.list_artifacts(kept["run_id"], "evaluation") if "step-4" in f.path]
    names = {Path(file.path).name for file in client.list_artifacts(kept["run_id"], folder.path)}
    assert names == {"report.json", "report.md", "contact_sheet.png", "scores.json", "answers.json"}
    table = json.loads(Path(client.download_artifacts(kept["run_id"], f"{folder.path}/scores.json")).read_text())
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert rows["referring_miou"]["tuned"] == pytest.approx(scores[0].value)
    assert f"{folder.path}/scores.json" in run.data.tags["mlflow.loggedArtifacts"]
    assert "step-2" in run.data.tags["evaluation"]


def test_the_run_in_mlflow_says_what_it_was_made_of(world: World) -> None:
    import mlflow

    kept = json.loads((world.one / "mlflow.json").read_text())
    client = mlflow.MlflowClient(kept["uri"])
    run = client.get_run(kept["run_id"])
    assert run.data.params["TrainArguments.lr"] == "0.005"
    assert run.data.params["deepspeed.zero_optimization.stage"] == "2"
    assert "torch" in run.data.tags["versions"]
    assert "'world_size': 1" in run.data.tags["start.0"]
    assert {"run.json"} <= {file.path for file in client.list_artifacts(kept["run_id"])}
    rates = [client.get_metric_history(kept["run_id"], f"activation/layer_{i:02d}") for i in range(LAYERS)]
    for rate in rates:
        # The preset's draw of beta .4: within five of its standard deviations, and a unit more by ties.
        assert [metric.step for metric in rate] == [1, 2, 3, 4]
        assert all(0.2 < metric.value < 0.62 for metric in rate)
    assert 0.2 < run.data.metrics["activation/mean"] <= run.data.metrics["activation/ever"] <= 1
    assert run.data.metrics["grad_norm_max"] >= run.data.metrics["grad_norm"] > 0

    # The registered model is what pipeline/export.py makes of the checkpoint; --checkpoint takes it.
    (version,) = client.search_model_versions("name = 'tuned'")
    assert version.run_id == kept["run_id"]
    folder = Path(client.download_artifacts(kept["run_id"], "model/checkpoint-4", str(world.root)))
    assert verify(folder) == []
    weights = load_file(world.one / "checkpoint-4" / "trained.safetensors")
    registered = load_file(folder / "model.safetensors")
    assert registered.keys() == weights.keys()
    assert all(torch.equal(registered[name], weight) for name, weight in weights.items())
    assert not (folder / "optimizer.safetensors").exists()


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("unknown flag", ["--global-bach", "global_batch"]),
        ("no base", ["needs --base", "--preset mini needs nothing"]),
        ("missing data", ["--data", "nowhere", "pipeline/shard_mmud.py"]),
        ("missing base", ["--base", "nowhere", "config.json"]),
        ("missing deepspeed", ["--deepspeed", "z9.json"]),
        ("small valid", ["--eval_steps 2", "/shards has 2 samples", "--global_batch 4", "leave out --eval_steps"]),
        ("no valid", ["--eval_steps 2", "/without_valid", "'valid'", "it has: test, train", "pipeline/shard_mmud.py"]),
        ("odd batch", ["global_batch 4", "--micro_batch 2 or 4"]),
        ("other seed", ["another order of samples", "seed: 0 -> 1", "--resume never"]),
        ("other batch", ["another order of samples", "global_batch: 4 -> 2", "--resume never"]),
        ("other length", ["a run of 4 steps, this one has 6", "--max_steps"]),
        ("other base", ["another base model"]),
        ("no run", ["--checkpoint", "nowhere", "pipeline/train.py"]),
        ("wrong base", ["--base", "is not the model", "checkpoint-4"]),
    ],
)
def test_what_a_user_can_mend_is_one_message(jobs: Mapping[str, Any], name: str, wanted: list[str]) -> None:
    job = jobs[name]
    assert job["code"] == 2
    said = job["err"].strip()
    assert all(text in said for text in wanted), said
    assert "Traceback" not in job["out"] + said
    script = "evaluate_mmud.py" if name in ("no run", "wrong base") else "train.py"
    assert said.startswith(f"{script}: ")
    # One message: at most the hint at --help stands below it.
    assert len([line for line in said.splitlines() if line.strip()]) <= 2, said
    assert "tuning" not in said


def test_what_is_missing_is_listed_before_anything_is_loaded(world: World, jobs: Mapping[str, Any]) -> None:
    job = jobs["several"]
    assert job["code"] == 2
    first, *rest = job["err"].strip().splitlines()
    assert first == "train.py: error: 3 things to mend before this run can start:"
    for words, line in zip(("clip_weights", "--data", "--micro_batch"), rest, strict=True):
        assert words in line
    assert jobs["ready"]["code"] == 0, jobs["ready"]["err"]
    assert jobs["ready"]["out"].startswith("Ready: 1 rank on cpu, at least ")
    for name in ("several", "ready"):
        assert "tuning" not in jobs[name]["out"] + jobs[name]["err"]
        assert not (world.root / name).exists()


def test_what_one_rank_alone_meets_is_one_message(world: World) -> None:
    """A folder that is missing on the node of rank 1: rank 0 goes on until the first collective call."""
    script = world.root / "rank_1.py"
    script.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--base') + 1] = '/nowhere'\n"
        f"sys.path[0] = {str(REPO / 'pipeline')!r}\n"
        "runpy.run_path(sys.path[0] + '/train.py', run_name='__main__')\n"
    )
    done = world.start(*launcher(), script, *world.flags(world.root / "one_rank", micro_batch=1), ok=False)
    assert done.stderr.count("train.py: error: --base /nowhere is no folder") == 1
    assert "Traceback" not in done.stdout + done.stderr
