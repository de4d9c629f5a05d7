"""plan.py: the numbers it must hit, its memory against a real DeepSpeed engine, its trace against the real forward.

Not here: whether step times come true; that needs a GPU (benchmarks/gpu.sh).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_tuner
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.assembly import planning
from pipeline.config import DataArguments, ModelArguments, PlanArguments, TrainArguments, parse
from pipeline.model.backbone import enable_checkpointing
from pipeline.planning import communication, counting, memory, trace
from pipeline.planning.gpus import GPUS, of_device
from pipeline.planning.memory import Zero
from pipeline.planning.search import Planner
from pipeline.planning.workload import Pass, Workload
from pipeline.runtime import ds_config
from pipeline.runtime.ranks import free_port

REPO = Path(__file__).resolve().parent.parent


def plan_of(*flags: str) -> planning.Planning:
    return planning.Planning(*parse(ModelArguments, DataArguments, TrainArguments, PlanArguments, argv=list(flags)))


def test_the_command_answers_without_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "pipeline/plan.py"), "--preset", "7b", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert round(found["tmac_per_pair"], 2) == 2.46
    assert round(100 * found["sparse_share"], 2) == 0.75
    assert found["parameters"] == 6_738_415_616 + sum(
        number for part, number in found["parameters_by_part"].items() if part not in ("base", "clip")
    )
    parts = found["memory_gib"]
    assert {"base_weights", "trained_weights", "gradients", "optimizer", "activations", "clip", "logits"} <= set(parts)
    assert parts["base_weights"] == pytest.approx(2 * 6_738_415_616 / 2**30)
    assert parts["total"] == pytest.approx(sum(size for part, size in parts.items() if part not in ("total", "host")))
    assert found["step_seconds"] == pytest.approx(sum(found["step_seconds_by_part"].values()))
    assert found["hours"] == pytest.approx(found["step_seconds"] * 28_069 / 3600)
    assert found["predicted_not_measured"] is True


def test_shares_of_13b() -> None:
    assert round(100 * plan_of("--preset", "13b", "--mechanism", "released").count.trained_share, 1) == 2.9
    count = plan_of("--preset", "13b").count
    assert round(100 * count.trained["sparse"] / count.base, 2) == 0.60


def test_memory_is_what_deepspeed_allocates(tmp_path: Path) -> None:
    """Within 2 %, on each of 2 ranks, of weights, gradients and optimizer under ZeRO-1, 2 and 3."""
    out, port = tmp_path / "memory.json", str(free_port())
    path = f"{REPO}:{REPO / 'kernels'}"
    # Without the launcher, which starts two Pythons more.
    ranks = [
        subprocess.Popen(
            [sys.executable, str(REPO / "tests/memory_job.py"), str(out)],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=550)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-4000:] for text in said)
    found = json.loads(out.read_text())
    assert len(found) == 4
    for case, per_rank in found.items():
        assert len(per_rank) == 2
        for one in per_rank:
            for part, held in one["held"].items():
                assert one["planned"][part] == pytest.approx(held, rel=0.02), (case, part)


def test_trace_does_the_operations_of_the_real_forward() -> None:
    """Matrix FLOPs of forward and backward, attention aside, whose operator is another on the CPU."""
    others = ("attention", "bmm")

    def matrices(tuner: Any, run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if not any(o in str(op) for o in others))

    tuner, batch = tiny_tuner.build().train(), tiny_tuner.batch()
    want = matrices(tuner, lambda: tuner(batch, tiny_tuner.features(4), tiny_tuner.NORMS)[0].backward())

    llm_config = tiny_tuner.CONFIGS["llama"]
    llm_config._attn_implementation = trace.ATTENTION
    try:
        with torch.device("meta"):
            skeleton = tiny_tuner.build(fill=False).train()
    finally:
        llm_config._attn_implementation = "sdpa"
    rows, tokens = batch.input_ids.shape
    counts = batch.counts()
    size = Pass(rows=rows, tokens=tokens, labelled=counts.tokens, masks=counts.masks, pictures=counts.pictures)
    plain = counting.trace_pass(skeleton, size)
    got = matrices(skeleton, lambda: counting.trace_pass(skeleton, size))
    assert got == want
    assert plain.flops > want and plain.activations > 0

    enable_checkpointing(skeleton.llm, "full")
    again = counting.trace_pass(skeleton, size)
    assert again.activations < plain.activations and again.flops > plain.flops
    doubled = {name: 2 * getattr(size, name) for name in ("rows", "labelled", "masks", "pictures")}
    twice = counting.trace_pass(skeleton, dataclasses.replace(size, **doubled))
    assert twice.activations == pytest.approx(2 * again.activations, rel=0.1)


def zero_of(file: str, micro: int, ranks: int, batch: int, hidden: int = 5120) -> Zero:
    config = ds_config.resolve(
        ds_config.read_json(REPO / f"ds_configs/{file}.json"),
        plan=ds_config.plan_batch(batch, ranks, micro_batch=micro),
        optimizer=ds_config.OptimizerSettings(lr=1e-4),
        bf16=True,
        hidden_size=hidden,
    )
    return Zero.of(config, ranks)


@pytest.fixture(scope="module")
def large() -> counting.Parameters:
    return plan_of("--preset", "13b").count


def test_traffic_by_hand(large: counting.Parameters) -> None:
    trained = 2.0 * large.all_trained
    z1, z2, z3 = (communication.traffic(large, zero_of(file, 1, 4, 12)) for file in ("z1", "z2", "z3"))
    assert z1.total == pytest.approx(2 * trained * 3 / 4)
    assert z2.hidden == pytest.approx(3 * trained * 3 / 4) and z2.serial == pytest.approx(trained * 3 / 4)
    # Three passes gather 26 GB twice.
    assert z3.hidden == pytest.approx(3 * (2 * 2 * large.base + 3 * trained) * 3 / 4, rel=0.01)
    assert communication.traffic(large, zero_of("z2", 1, 1, 12)).total == 0
    offloaded = communication.traffic(large, zero_of("z3_offload", 1, 4, 12))
    assert offloaded.host > 3 * 2 * 2 * large.base / 4
    assert communication.rate(GPUS["A100-80"], 8) == 300e9 and communication.rate(GPUS["A100-80"], 16) == 100e9


def test_search_takes_what_fits(large: counting.Parameters) -> None:
    """13B in bf16 does not fit one 24 GB card: it is cut up over four, or quantised."""
    traced = counting.Traced(
        operations=(trace.Operation(flops=10**13, moved=10**9, itemsize=2),),
        activations=2**30,
        logits=0,
        features=0,
        workspace=0,
    )

    def fastest(gpu: str, quants: tuple[str, ...], ranks: int = 4) -> Any:
        planner = Planner(
            count=large,
            workload=Workload(global_batch=12),
            gpu=GPUS[gpu],
            trace=lambda samples, _: (dataclasses.replace(traced, activations=samples * 2**30), float(samples)),
            trace_vision=lambda _: dataclasses.replace(traced, operations=()),
        )
        return planner.fastest(ranks, lambda file, micro: zero_of(file, micro, ranks, 12), quants)

    assert fastest("A100-80", ("none", "nf4")).choice.quant == "none"
    cut = fastest("4090", ("none",))
    assert cut.choice.file == "z3" and cut.fits and cut.memory.total < memory.usable(GPUS["4090"].memory)
    packed = fastest("4090", ("none", "nf4"))
    assert packed.choice.quant == "nf4" and packed.zero.stage < 3 and packed.time.total < cut.time.total
    alone = fastest("4090", ("none",), ranks=1)
    assert alone.choice.file == "z3_offload" and alone.memory.host > 2 * large.base
    huge = dataclasses.replace(large, clip_bytes=10**12)
    with pytest.raises(ValueError, match="nothing fits: the smallest needs"):
        Planner(
            count=huge,
            workload=Workload(global_batch=12),
            gpu=GPUS["4090"],
            trace=lambda *_: (traced, 1.0),
            trace_vision=lambda _: traced,
        ).fastest(4, lambda file, micro: zero_of(file, micro, 4, 12), ("none",))


def test_fit_writes_what_train_reads(tmp_path: Path) -> None:
    asked = plan_of("--preset", "mini", "--gpu", "4090", "--gpus", "2", "--global_batch", "8", "--fit")
    plan = asked.fitted()
    command = asked.write(plan, str(tmp_path))
    words = command.split()
    assert words[:4] == ["deepspeed", "--num_gpus", "2", "pipeline/train.py"]
    model, _, train = parse(ModelArguments, DataArguments, TrainArguments, argv=words[4:])
    assert train.micro_batch == plan.choice.micro_batch and model.base_quant == plan.choice.quant
    batch = ds_config.plan_batch(train.global_batch, 2, micro_batch=train.micro_batch)
    settings = ds_config.OptimizerSettings(lr=train.lr)
    filled = ds_config.resolve(
        ds_config.read_json(train.deepspeed_file()), plan=batch, optimizer=settings, bf16=True, hidden_size=192
    )
    assert Zero.of(filled, 2) == plan.zero
    asked.draw(plan, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    count, used = planning.estimate(model, DataArguments(data="x"), train, plan.zero, micro_batch=train.micro_batch)
    assert count == asked.count and used == plan.memory and used.total < memory.usable(GPUS["4090"].memory)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--deepspeed", str(REPO / "ds_configs/z3.json"), "--base_quant", "nf4"), "does not work with ZeRO-3"),
        (("--gpus", "3"), "cannot be cut"),
        (("--clip", "ViT-Z"), "--clip ViT-Z"),
    ],
)
def test_what_cannot_be_is_said(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of("--preset", "mini", *flags).given()


def test_devices_by_name() -> None:
    names = {"NVIDIA A100-SXM4-40GB": "A100-40", "NVIDIA A100-SXM4-80GB": "A100-80", "NVIDIA GeForce RTX 4090": "4090"}
    names |= {"NVIDIA A100-PCIE-40GB": "A100-40", "NVIDIA A100 80GB PCIe": "A100-80"}
    names |= {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100-PCIe", "NVIDIA H200": "H200"}
    for device, name in names.items():
        found = of_device(device)
        assert found is not None and found.name == name
    assert of_device("Tesla V100") is None


def test_nothing_trained_counts_as_base() -> None:
    tuner = tiny_tuner.build(train_embeddings="all")
    count = counting.count_parameters(tuner, nn.Module())
    assert count.all_trained == sum(p.numel() for p in tuner.trained_parameters().values())
    assert count.base + count.all_trained == sum(p.numel() for p in tuner.parameters())
    assert count.linears == sum(
        p.numel() for n, p in tuner.named_parameters() if n.startswith("llm.") and n.endswith("proj.weight")
    )
