"""What the benchmarks compare is the same: equal losses of the usual step and ours, equal tensors of plain webdataset
and our loader; and the table of padding."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from pipeline.model.losses import Norms

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up the module of a class by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["neural", "lora", "released"])
def test_all_steps_of_a_model_compute_the_same_loss(kind):
    bench = load("train_step")
    frozen = bench.make_llm(bench.SIZES["toy"], torch.device("cpu"), torch.float32)
    model = bench.Model(kind, frozen, "none")
    # The frozen weights are there once; `released` trains tables of its own.
    own = {name for name, p in model.tuner.llm.named_parameters() if id(p) not in set(map(id, frozen.parameters()))}
    tables = {"model.embed_tokens.base.weight", "lm_head.base.weight"}
    assert own & tables == (tables if kind == "released" else set())
    assert not [name for name in own if name.endswith("mlp.up_proj.weight")]
    assert all(not p.requires_grad for p in frozen.model.layers.parameters())
    samples = json.loads(bench.LENGTHS.read_text())["samples"][:3]
    assert {sample["task"] for sample in samples} == {"reasoning", "generation"}
    features, norms = bench.make_features(3), Norms(tokens=30.0, masks=2.0, pictures=1.0)
    found = []
    for fields in bench.STEPS[2:6]:
        step = bench.Step(*fields)
        model.tuner.llm.set_attn_implementation(step.attn)
        batch = bench.make_batch(samples, model.tuner, step.budget)
        assert batch.counts() == (sum(s["answer"] for s in samples), sum(s["masks"] for s in samples), 1, {})
        found.append(step.loss(model.tuner, batch, features, norms).item())
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("kind", ["neural", "lora", "released"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_lines_train_in_the_frozen_dtype_with_fp32_masters(kind, dtype):
    bench = load("train_step")
    model = bench.Model(kind, bench.make_llm(bench.SIZES["toy"], torch.device("cpu"), dtype), "none")
    trained = list(model.tuner.trained_parameters().values())
    assert {p.dtype for p in model.tuner.parameters()} == {dtype}
    before = [p.detach().clone() for p in trained]
    step = bench.Step(*next(fields for fields in bench.STEPS if fields[1] == kind))
    samples = json.loads(bench.LENGTHS.read_text())["samples"][:1]
    model.step(step, bench.make_batch(samples, model.tuner, step.budget), bench.make_features(1))
    masters = model.optimizer.masters
    assert {m.dtype for m in masters} == {torch.float32} and all(p.grad is None for p in trained)
    assert all(torch.equal(p, m.to(dtype)) for p, m in zip(trained, masters, strict=True))
    # Adam's moments, and in bf16 the copies, which keep what a step of 1e-4 adds below bf16's last bit.
    apart = dtype == torch.bfloat16
    assert model.optimizer.bytes() // (4 * model.trained) == 2 + apart
    assert any((p != m).any() for p, m in zip(trained, masters, strict=True)) == apart
    assert any(not torch.equal(old, p) for old, p in zip(before, trained, strict=True))


def test_the_table_of_steps_by_hand():
    rows = {
        "LoRA, plain": {"samples_per_s": 2.0, "trained_parameters": 1234567},
        "released, plain": {"samples_per_s": 1.0, "trained_parameters": 9999},
        "ours": {"samples_per_s": 5.0, "trained_parameters": 12},
    }
    head, _, *lines = load("train_step").table(rows).splitlines()
    assert head.endswith("| trained_parameters | samples/s, LoRA, plain = 1 | samples/s, released, plain = 1 |")
    assert lines[0] == "| LoRA, plain | 2 | 1,234,567 | 1.00 | 2.00 |"
    assert lines[2] == "| ours | 5 | 12 | 2.50 | 5.00 |"


def test_padding_by_hand():
    padding = load("padding")
    lengths = [10, 6, 4, 2]
    assert padding.padding_share(lengths, 4, None) == (1 - 22 / 40, 10)
    assert padding.padding_share(lengths, 4, 12) == (1 - 22 / 24, 12)
    assert padding.padding_share(lengths, 2, 1000) == (0.0, 11)
    assert "| 12 | 27.4% (331) |" in padding.table(
        [s["prompt"] + s["answer"] for s in json.loads(padding.LENGTHS.read_text())["samples"]]
    )


def test_webdataset_and_our_loader_make_the_same_of_every_sample(tmp_path, data_dir):
    bench = load("loader")
    mmud = data_dir / "mmud"
    (tmp_path / "loose").mkdir()
    bench.tiled([mmud / "train.pkl", mmud / "test.pkl"], mmud / "images", 32, tmp_path / "loose")
    assert sum(bench.packing(tmp_path / "loose", tmp_path / "packed", 1, 64)) == 32
    collator, places = bench.make_collator(), bench.places_of(tmp_path / "packed")
    found = []
    for batches in (
        bench.plain_webdataset(tmp_path / "packed", places, collator, 0),
        bench.ours(tmp_path / "packed", collator, 0),
    ):
        rows = {}
        for batch in batches:
            for i, key in enumerate(batch.keys):
                ids, labels = (tensor[i][batch.segment_ids[i] == i] for tensor in (batch.input_ids, batch.labels))
                rows[key] = (batch.tasks[i], ids, labels, batch.pixel_values[i], batch.masks[batch.mask_rows == i])
        assert len(rows) == 32
        found.append(rows)
    theirs, own = found
    assert {task: sum(row[0] == task for row in own.values()) for task in bench.TASKS} == dict.fromkeys(bench.TASKS, 8)
    for key, (task, *tensors) in own.items():
        assert task == theirs[key][0]
        assert all(map(torch.equal, tensors, theirs[key][1:])), key
