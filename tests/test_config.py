"""Flags, presets, YAML, batch arithmetic, and each file of ds_configs/ made one with the flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.config import DataArguments, EvalArguments, ModelArguments, TrainArguments, from_dict, parse, to_dict
from pipeline.runtime.ds_config import (
    BatchPlan,
    OptimizerSettings,
    count_steps,
    offloads,
    plan_batch,
    read_json,
    resolve,
)

DS_FILES = sorted((config.REPO / "ds_configs").glob("*.json"))
LARGE = ["--base", "b", "--clip_weights", "w", "--data", "d"]
SETTINGS = OptimizerSettings(lr=1e-3, total_steps=100, warmup_steps=3)


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(ModelArguments, DataArguments, TrainArguments, argv=list(argv))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    return captured.err + captured.out


def test_bare_command_is_the_mini_preset() -> None:
    model, data, train = parse(ModelArguments, DataArguments, TrainArguments, argv=[])
    assert Path(model.base) == config.REPO / "models/mini/llm"
    assert model.clip == f"local-dir:{config.REPO}/models/mini/clip"
    assert (model.alpha, model.z_dim, model.activation, model.image_cls) == (0.5, 128, "hard", False)
    assert model.image_prefix.split()[:2] == ["c00", "<image>"]
    assert model.image_prefix.count("<image>") == 16
    assert (train.global_batch, train.lr, Path(data.data).name) == (32, 4e-3, "mini")
    assert train.deepspeed_file().exists()


def test_flag_over_yaml_over_preset_over_mechanism(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-4\nz_dim: 32\nmechanism: released\nbf16: true\neval_batch: 4\nmicro_batch: 2\n")
    model, train = parse(ModelArguments, TrainArguments, argv=["--config", str(file), "--z_dim", "16"])
    assert (train.lr, train.bf16, train.micro_batch) == (1e-4, "true", 2)
    assert (model.z_dim, model.mechanism, model.activation, model.alpha) == (16, "released", "shifted", 0.2)
    # Half of the mini LM's four layers; the released 16 counts for a large one.
    assert model.first_tuned_layer == 2
    (large,) = parse(ModelArguments, argv=["--preset", "7b", "--mechanism", "released", *LARGE[:4]])
    assert (large.first_tuned_layer, large.clip_head, large.inference_sparsity) == (16, "mlp", False)
    (mixed,) = parse(ModelArguments, argv=["--mechanism", "released", "--alpha", "0.3", "--sparse_norm", "False"])
    assert (mixed.alpha, mixed.sparse_norm, mixed.mask_tokens) == (0.3, False, "end")


def test_large_presets_hold_the_papers_settings() -> None:
    for preset in ("7b", "13b"):
        model, data, train = parse(ModelArguments, DataArguments, TrainArguments, argv=["--preset", preset, *LARGE])
        assert (model.alpha, model.beta, model.z_dim, model.image_merge) == (0.9, 0.4, 128, 1)
        assert (model.image_cls, model.projections, model.clip) == (True, "qv", "ViT-L-14-quickgelu")
        assert (train.global_batch, train.epochs, train.lr, train.max_steps) == (12, 10.0, 1e-4, -1)
        assert train.gradient_checkpointing == "full"
        assert (data.packing, data.row_tokens, train.attn) == (True, 0, "auto")
        assert train.use_bf16("cpu")


def test_what_a_preset_leaves_open_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "--preset", "13b", "--base", "x")
    assert "--clip_weights" in said
    assert "--data" in said
    assert "--base" not in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--alph", "0.1"], "did you mean `--alpha`"),
        (["--alpha", "1"], "alpha must be at least 0 and below 1"),
        (["--projections", "qx"], "letters q, k, v"),
        (["--tasks", "caption,poetry"], "tasks must be some of"),
        (["--tasks", "caption", "--task_mix", "1,2"], "task_mix takes 1 shares"),
        (["--task_mix", "refering=2"], "task_mix takes name=share"),
        (["--task_mix", "referring=2,1"], "task_mix takes name=share"),
        (["--task_mix", "referring=two"], "task_mix takes name=share"),
        (["--clip_taps", "3,2"], "must rise"),
        (["--preset", "70b"], "preset must be one of mini, 7b, 13b"),
        (["--bf16", "maybe"], "bf16 must be"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_end_with_one_clear_line(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert words in failure(capsys, *argv)


@pytest.mark.parametrize("launcher", ["RANK", "SLURM_PROCID"])
def test_one_rank_tells_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv(launcher, rank)
        assert bool(failure(capsys, "--alph", "0.1")) == told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1", "there is no setting `learning_rate`"),
        ("lr: fast", "lr must be of type float"),
        ("image_cls: 1", "image_cls must be of type bool"),
        ("z_dim: 1.5", "z_dim must be of type int"),
        ("mechanism: mine", "mechanism must be one of paper, released"),
        ("- a", "`flag: value` lines"),
        ("a: [", "no valid YAML"),
        ("lr: !!python/object/apply:os.system ['true']", "no valid YAML"),
    ],
)
def test_yaml_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert words in failure(capsys, "--config", str(file))


@pytest.mark.parametrize("kinds", [(ModelArguments, DataArguments, TrainArguments), (EvalArguments,)], ids=len)
def test_help_tells_every_flag(capsys: pytest.CaptureFixture[str], kinds: tuple[type, ...]) -> None:
    with pytest.raises(SystemExit):
        parse(*kinds, argv=["--help"])
    said = capsys.readouterr().out
    for kind in kinds:
        for name, field in kind.__dataclass_fields__.items():
            assert f"--{name}" in said
            assert field.metadata["help"], name


def test_settings_survive_a_checkpoint() -> None:
    model, data = parse(ModelArguments, DataArguments, argv=["--mechanism", "released", "--z_dim", "7"])
    saved = json.loads(json.dumps(to_dict(model, data)))
    assert from_dict(ModelArguments, saved) == model
    assert from_dict(DataArguments, saved, data="elsewhere").data == "elsewhere"
    assert from_dict(EvalArguments, saved) == EvalArguments()
    saved["ModelArguments"]["gone"] = 1
    with pytest.raises(ValueError, match="gone"):
        from_dict(ModelArguments, saved)


def test_task_shares_and_taps() -> None:
    assert DataArguments(tasks="caption, referring").task_names == ("caption", "referring")
    assert DataArguments(task_mix="2,1,1,0").task_shares == (2, 1, 1, 0)
    assert DataArguments(task_mix="referring=2, caption=0").task_shares == (1, 2, 0, 1)
    assert DataArguments(tasks="generation,reasoning", task_mix="referring=2,reasoning=3").task_shares == (1, 3)
    assert ModelArguments().tap_layers(24) == (7, 15, 23)
    assert ModelArguments().tap_layers(6) == (1, 3, 5)
    assert ModelArguments(clip_taps="0,2,5").tap_layers(6) == (0, 2, 5)
    with pytest.raises(ValueError, match=r"within 0\.\.3"):
        ModelArguments(clip_taps="0,4").tap_layers(4)


def test_batch_arithmetic() -> None:
    assert plan_batch(32, 1) == BatchPlan(global_batch=32, micro_batch=16, accumulation=2, world_size=1)
    assert plan_batch(32, 2).accumulation == 1
    assert plan_batch(12, 4, limit=2) == BatchPlan(global_batch=12, micro_batch=1, accumulation=3, world_size=4)
    assert plan_batch(12, 2, micro_batch=3).accumulation == 2
    for world in range(1, 9):
        for batch in range(world, 50, world):
            plan = plan_batch(batch, world, limit=5)
            assert plan.micro_batch * plan.accumulation * world == batch
            assert plan.micro_batch <= 5


def test_batch_mistakes_name_the_nearest_numbers() -> None:
    with pytest.raises(ValueError, match=r"--global_batch 8 or 16, or 6 or 12 rank\(s\)"):
        plan_batch(12, 8)
    with pytest.raises(ValueError, match="--global_batch 10 or 20, or --micro_batch 3 or 6"):
        plan_batch(12, 2, micro_batch=5)
    with pytest.raises(ValueError, match="--global_batch 16"):
        plan_batch(4, 16)


def test_count_steps() -> None:
    assert count_steps(33682, 12, epochs=10) == 28069
    assert count_steps(30, 3, epochs=0.1) == 1
    assert count_steps(100, 10, epochs=3, max_steps=7) == 7


def test_schedule_is_transformers_cosine_with_warmup() -> None:
    import torch
    from transformers.optimization import get_cosine_schedule_with_warmup

    for total, warmup in ((100, 3), (7, 0), (5, 5)):
        adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        theirs = get_cosine_schedule_with_warmup(adam, warmup, total).lr_lambdas[0]
        ours = OptimizerSettings(lr=1.0, total_steps=total, warmup_steps=warmup)
        assert [ours.rate(step) for step in range(total + 1)] == [theirs(step) for step in range(total + 1)]


def resolved(raw: dict[str, Any], world: int = 1, **more: Any) -> dict[str, Any]:
    options = {"plan": plan_batch(12, world), "optimizer": SETTINGS, "bf16": True} | more
    return resolve(raw, **options)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("file", DS_FILES, ids=lambda path: path.stem)
def test_every_deepspeed_file_resolves(file: Path, world: int) -> None:
    raw = read_json(file)
    full = resolved(raw, world, hidden_size=64)
    assert '"auto"' not in json.dumps(full)
    assert full["train_batch_size"] == 12
    assert (
        full["train_micro_batch_size_per_gpu"] * full["gradient_accumulation_steps"] * world == full["train_batch_size"]
    )
    assert full["zero_optimization"]["stage"] == int(file.stem[1])
    assert offloads(full) == ("offload" in file.stem)
    assert full["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    # On the CPU everything is in its memory already.
    assert not offloads(resolved(raw, world, on_cpu=True))
    assert raw == read_json(file)


def test_there_are_the_seven_files() -> None:
    names = {"z1", "z2", "z3", "z2_offload", "z3_offload", "z3_quantized", "z3_hpz"}
    assert {path.stem for path in DS_FILES} == names


def test_quantised_gathering_is_for_cuda_and_groups_divide_the_ranks() -> None:
    raw = read_json(config.REPO / "ds_configs" / "z3_hpz.json")
    on_gpu, on_cpu = (resolved(raw, 4, on_cpu=on_cpu)["zero_optimization"] for on_cpu in (False, True))
    assert on_gpu["zero_quantized_weights"] is True and on_gpu["zero_hpz_partition_size"] == 4
    assert "zero_quantized_weights" not in on_cpu and on_cpu["zero_hpz_partition_size"] == 4
    # Fewer ranks than a group: DeepSpeed takes all of them.
    resolved(raw, 2)
    with pytest.raises(ValueError, match="zero_hpz_partition_size is 4 .* 6 ranks"):
        resolved(raw, 6)


def test_all_contradictions_are_named_with_both_values() -> None:
    raw = {
        "train_batch_size": 16,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 7, "warmup_num_steps": "auto"}},
    }
    with pytest.raises(ValueError, match="contradict") as error:
        resolved(raw)
    for words in (
        "train_batch_size is 16 in the file, but --global_batch gives 12",
        "gradient_clipping is 0.5 in the file, but --max_grad_norm gives 1.0",
        "bf16.enabled is False in the file, but --bf16 gives True",
        "fp16.enabled is True",
        "optimizer.type is 'Lamb'",
        "optimizer.params.betas is [0.9, 0.95]",
        "scheduler.params.total_num_steps is 7 in the file, but --epochs/--max_steps gives 100",
    ):
        assert words in str(error.value)
    assert "params.lr" not in str(error.value)


def test_optimizer_and_scheduler_sections_are_filled() -> None:
    raw = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}},
    }
    full = resolved(raw)
    assert full["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}
    assert full["scheduler"]["params"] == {"warmup_num_steps": 3}
    # Unknown width: DeepSpeed's own default counts.
    assert "stage3_prefetch_bucket_size" not in full["zero_optimization"]


def test_other_mistakes_in_a_deepspeed_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage must be 1, 2 or 3"):
        resolved({"zero_optimization": {"stage": 0}})
    with pytest.raises(ValueError, match="aio.block_size"):
        resolved({"zero_optimization": {"stage": 2}, "aio": {"block_size": "auto"}})
    file = tmp_path / "bad.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is no valid JSON"):
        read_json(file)
    with pytest.raises(ValueError, match=r"none\.json"):
        read_json(tmp_path / "none.json")
