"""The sparse vector's door and operators: which implementation runs, torch.compile, recomputation, ZeRO-3, training.

Ladder: dispatch and operators in this process (interpreted kernels on a CPU), the kernels compiled for three GPU
architectures in a second one, and the mini preset trained on both implementations in a third. Not here: values and
gradients of the kernels (test_sparse_kernels.py); CUDA graphs need a GPU and are skipped without one.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.model.sparse import PATTERNS, SparseNetwork
from sparse_kernels import sparse_vector as door
from sparse_kernels import timing
from sparse_kernels.sparse_vector import choose

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_the_kernels(monkeypatch):
    monkeypatch.setenv("SPARSE_KERNELS", "triton")


def leaves(m=21, d=40, z=12, *, norm=True):
    generator = torch.Generator().manual_seed(0)
    sizes = [(m, d), (z, d), (m, z), (z,)][: 4 if norm else 3]
    return [torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in sizes]


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(sys.modules["sparse_kernels.sparse_vector"], "_told", set())


def test_the_path_is_chosen_by_device_and_environment_and_logged_once(monkeypatch, caplog, told):
    h, wz = torch.randn(3, 8), torch.randn(4, 8)
    caplog.set_level(logging.INFO, logger="sparse_kernels")
    for asked, taken in (("", "reference"), ("reference", "reference"), ("triton", "triton")):
        monkeypatch.setenv("SPARSE_KERNELS", asked)
        assert choose(h.to(DEVICE) if taken == "triton" else h, wz.to(DEVICE) if taken == "triton" else wz) == taken
        assert choose(h.to("meta"), wz.to("meta")) == "reference"
    if DEVICE == "cuda":
        monkeypatch.delenv("SPARSE_KERNELS")
        assert choose(h.cuda(), wz.cuda()) == "triton"
    said = [record.message for record in caplog.records]
    assert said == ["sparse vector: reference on cpu", f"sparse vector: triton on {DEVICE}"]


def test_the_path_taken_is_the_one_that_runs(monkeypatch):
    from sparse_kernels import ops, reference

    ran = []
    for module, name in ((ops, "forward"), (reference, "sparse_vector")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: ran.append(name) or real(*a, **k))
    for asked in ("reference", "triton"):
        monkeypatch.setenv("SPARSE_KERNELS", asked)
        door(*[x.detach() for x in leaves(norm=False)], alpha=0.9, n_active=3)
    assert ran == ["sparse_vector", "forward"]


@pytest.mark.parametrize(
    "h, wz, message",
    [
        (torch.zeros(3, 8), torch.zeros(300, 8), "at most Z = 256"),
        (torch.zeros(3, 8).double(), torch.zeros(4, 8).double(), "fp32, bf16 or fp16"),
        (torch.zeros(3, 8).bfloat16(), torch.zeros(4, 8), "one dtype"),
        (torch.zeros(3, 8, device="meta"), torch.zeros(4, 8), "move one"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_by_name(h, wz, message, on_the_kernels):
    with pytest.raises(ValueError, match=message):
        door(h, wz, None, alpha=0.9, n_active=2)


def test_without_an_interpreter_a_cpu_is_refused(monkeypatch, on_the_kernels):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        door(torch.zeros(3, 8), torch.zeros(4, 8), None, alpha=0.9, n_active=2)


@pytest.mark.parametrize("shifted", [False, True])
def test_opcheck(shifted):
    from sparse_kernels import ops

    h, wz, z_prev, weight = leaves()
    torch.library.opcheck(ops.forward, (h, wz, z_prev, weight, None, 5, 0.9, 1e-6, shifted))
    torch.library.opcheck(ops.forward, (h, wz, None, None, None, 5, 0.9, 1e-6, shifted))
    n_tensor = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(ops.forward, (h, wz, z_prev, None, n_tensor, 0, 0.9, 1e-6, shifted))
    with torch.no_grad():
        zu, za, threshold, pre = ops.forward(h, wz, z_prev, weight, None, 5, 0.9, 1e-6, shifted)
        given = (h, wz, zu, threshold, pre, weight, 0.9, 1e-6, shifted, True)
        fixed = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
        torch.library.opcheck(ops.backward, (zu, za, *fixed, True, True))
        torch.library.opcheck(ops.backward, (None, za, *fixed, False, True))


def test_torch_compile_takes_it_whole_and_a_new_n_does_not_compile_anew(on_the_kernels):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def run(h, wz, z_prev, n):
        return door(h, wz, z_prev, alpha=0.9, n_active=n)

    torch._dynamo.reset()
    fast = torch.compile(run, backend=backend, fullgraph=True)
    operands = [x.detach() for x in leaves(norm=False)]
    for n in (5, 3, 7, 1, 9, 12, 4):
        for got, want in zip(fast(*operands, n), run(*operands, n), strict=True):
            assert torch.equal(got, want)
    # The first n is taken for a constant, the second makes it a variable.
    assert len(compiled) <= 2
    calls = [node.target for node in compiled[-1].graph.nodes if "sparse_kernels" in str(node.target)]
    assert calls == [torch.ops.sparse_kernels.forward.default]


def test_gradients_through_torch_compile(on_the_kernels):
    def run(h, wz, z_prev, weight, n):
        zu, za = door(h, wz, z_prev, alpha=0.9, n_active=n, norm_weight=weight)
        return (zu * za).sum() + za.square().sum()

    torch._dynamo.reset()
    want = torch.autograd.grad(run(*(given := leaves()), 5), given)
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(*(given := leaves()), 5), given)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_leaves_gradients_as_they_are(reentrant, on_the_kernels):
    def run(*given):
        zu, za = door(*given[:3], alpha=0.9, n_active=5, norm_weight=given[3])
        return zu.tanh() + za

    want = torch.autograd.grad(run(*(given := leaves())).square().sum(), given)
    given = leaves()
    checkpoint(run, *given, use_reentrant=reentrant).square().sum().backward()
    for leaf, theirs in zip(given, want, strict=True):
        assert torch.equal(leaf.grad, theirs)


def test_wz_may_be_away_between_forward_and_backward(on_the_kernels):
    """What ZeRO-3 does: the parameter's values are given back after the forward and gathered again for the backward."""

    def loss(given):
        zu, za = door(*given[:3], alpha=0.9, n_active=5)
        return zu.square().sum() + za.sum()

    want = torch.autograd.grad(loss(given := leaves(norm=False)), given)
    given = leaves(norm=False)
    out = loss(given)
    full, given[1].data = given[1].data, torch.empty(0, device=DEVICE)
    given[1].data = full.clone()
    for mine, theirs in zip(torch.autograd.grad(out, given), want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("training", [True, False])
def test_every_activation_pattern_runs_on_the_kernels(pattern, training, monkeypatch):
    """ "gaussian" and "level" hand the kernel their n; the patterns by rank take zu from it and choose in PyTorch."""
    results = []
    for asked in ("reference", "triton"):
        monkeypatch.setenv("SPARSE_KERNELS", asked)
        net = SparseNetwork(24, 16, {"q": 10, "v": 6}, pattern=pattern, depth=(1, 3)).to(DEVICE).train(training)
        torch.nn.init.normal_(net.wb, generator=None if DEVICE == "cuda" else torch.Generator().manual_seed(1))
        torch.nn.init.constant_(net.wb, 0.1)
        net.set_step(3)
        h = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        zu, parts = net(h, torch.ones(2, 5, 16, device=DEVICE))
        loss = zu.square().sum() + sum((part**2).sum() for part in parts.values())
        results.append([zu, *parts.values(), *torch.autograd.grad(loss, [net.wz, net.wb])])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_a_cuda_graph_sees_a_new_n_at_each_replay(on_the_kernels):
    h, wz, z_prev = (x.detach() for x in leaves(norm=False))
    n = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    door(h, wz, z_prev, alpha=0.9, n_active=n)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, za = door(h, wz, z_prev, alpha=0.9, n_active=n)
    for value in (1, 7, 12):
        n.fill_(value)
        graph.replay()
        assert torch.equal(za, door(h, wz, z_prev, alpha=0.9, n_active=value)[1])


def test_kernels_compile_for_three_architectures_with_the_spills_of_the_readme(repo, run_python):
    done = run_python(repo / "kernels/compiled_resources.py", "--check", timeout=500, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_mini_preset_trains_to_the_same_losses_on_both(repo, run_python, tmp_path):
    """Three steps in one process, on a GPU where there is one. The kernels sum in another order, so losses agree to
    rounding, not to the bit."""
    shards = tmp_path / "shards"
    flags = {"global_batch": 4, "max_steps": 3, "num_workers": 0, "logging_steps": 1, "save_steps": 0, "data": shards}
    # In bf16 the reference rounds z, and the kernels do not.
    flags |= {"bf16": "false"}
    pack = ["--out", shards, "--splits", "train", "--mini_train", 8, "--workers", 1]
    plan = [{"name": "pack", "script": "shard_mmud.py", "args": [str(word) for word in pack]}]
    for asked in ("reference", "triton"):
        args = [
            str(w) for key, value in (flags | {"output_dir": tmp_path / asked}).items() for w in (f"--{key}", value)
        ]
        plan.append({"name": asked, "script": "train.py", "args": args, "env": {"SPARSE_KERNELS": asked}})
    (tmp_path / "jobs.json").write_text(json.dumps(plan))
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "OMP_NUM_THREADS": "1"}
    env["DS_ACCELERATOR"] = DEVICE
    env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    ran = run_python(repo / "tests/scripts_job.py", tmp_path / "jobs.json", tmp_path / "out.json", env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    out = json.loads((tmp_path / "out.json").read_text())
    assert all(job["code"] == 0 for job in out.values()), [job["err"][-2000:] for job in out.values()]
    losses = {}
    for asked in ("reference", "triton"):
        assert f"sparse vector: {asked} on {DEVICE}" in out[asked]["out"] + out[asked]["err"]
        lines = [json.loads(line) for line in (tmp_path / asked / "metrics.jsonl").read_text().splitlines()]
        losses[asked] = [line["metrics"]["loss"] for line in lines if "loss" in line["metrics"]]
    assert len(losses["reference"]) == 3
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5 if DEVICE == "cpu" else 1e-3)


def test_a_call_is_queued_before_the_gpu_comes_to_it(monkeypatch):
    """Stands for CUDA: each call's work between two events, behind the flush of L2 and a wait."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: done.append("flush"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"wait of {cycles}"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("end"))
    assert timing._on_cuda(lambda: done.append("call"), torch.device("cpu"), 2) == [1.5, 1.5]
    assert done == 2 * ["flush", "wait of 4000000", "event", "call", "event"] + ["end"]


def test_the_benchmark_runs_to_its_end_and_keeps_toy_figures_out_of_the_results(repo, run_python, tmp_path):
    bench, before = repo / "kernels/bench_sparse_vector.py", (repo / "kernels/results.csv").exists()
    done = run_python(bench, "--smoke", "--m", "20", "--out", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert head.startswith("date,gpu,torch,triton,cuda,commit,dtype,d,z,m,mode,provider,median_ms,p20_ms,p80_ms,")
    assert len(rows) == 6 and (tmp_path / "out.svg").exists()
    refused = run_python(bench, "--smoke", "--out", repo / "kernels/results.csv")
    assert refused.returncode == 2 and "no place in kernels/results.csv" in refused.stderr
    if DEVICE == "cpu":
        assert "none (CPU" in rows[0] and run_python(bench).returncode == 2
    assert (repo / "kernels/results.csv").exists() == before


def test_the_benchmark_goes_on_where_it_was_cut_short(repo, monkeypatch, tmp_path, capsys, on_the_kernels):
    spec = importlib.util.spec_from_file_location("bench_sparse_vector", repo / "kernels/bench_sparse_vector.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    out, facts, timed = tmp_path / "out.csv", bench.origin(torch.device(DEVICE)), []

    def time_shape(m, d, z, *_):
        timed.append(m)
        cases, times = itertools.product(bench.MODES, bench.PROVIDERS), {"median_ms": "1.5", "bytes_ms": "1"}
        return [{"dtype": "bf16", "d": d, "z": z, "m": m, "mode": mode, "provider": p, **times} for mode, p in cases]

    def rows(commit, *sizes):
        """The number of rows after a run at this commit, and the M it timed."""
        timed.clear()
        monkeypatch.setattr(bench, "origin", lambda device: facts | {"date": f"day {len(sizes)}", "commit": commit})
        monkeypatch.setattr(sys, "argv", ["bench", "--smoke", "--out", str(out), "--m", *map(str, sizes)])
        bench.main()
        return len(out.read_text().splitlines()) - 1, list(timed)

    monkeypatch.setattr(bench, "time_shape", time_shape)
    assert rows("abc", 7) == (6, [7])
    assert rows("abc", 7, 9) == (12, [9]) and "M      7  timed before, in" in capsys.readouterr().out
    assert rows("abd", 7) == (18, [7])
    # Which program a tree with changes held cannot be told.
    assert rows("abd+changes", 7) == (24, [7]) and rows("abd+changes", 7) == (30, [7])


def test_the_tuned_layer_benchmark_runs_to_its_end(repo, run_python):
    done = run_python(repo / "benchmarks/tuned_layer.py", "--smoke")
    assert done.returncode == 0 and "tuned, reference" in done.stdout, done.stderr[-3000:]
