"""Compiled layers and Liger's kernels beside plain PyTorch: the same loss and gradients; what cannot run is refused.

Liger's RoPE runs in Triton's interpreter here; its RMSNorm and SwiGLU do not (they ask a number for a tensor's
methods) and are compared on a GPU only. Nothing here measures speed: benchmarks/train_step.py does.
"""

import pytest
import tiny_tuner
import torch
from tiny_tuner import NORMS, ROWS, batch, build, features
from torch._dynamo.utils import counters

from pipeline.assembly import speedups
from pipeline.config import TrainArguments
from pipeline.model import liger
from pipeline.model.backbone import compile_layers, enable_checkpointing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steps(tuner, device="cpu"):
    """Losses of three packed batches of different lengths, and the gradients of all three."""
    tuner.to(device).train()
    tuner.llm.set_attn_implementation("sdpa_varlen")
    found = []
    for number in range(3):
        tuner.set_step(number)
        data = batch(ROWS[: 4 - number], pack_tokens=0).to(device)
        loss, _ = tuner(data, features(len(data.keys)).to(device), NORMS)
        loss.backward()
        found.append(loss.item())
    return found, {name: p.grad for name, p in tuner.trained_parameters().items()}


def agree(one, two, rel=1e-5):
    assert two[0] == pytest.approx(one[0], rel=rel)
    for name, grad in one[1].items():
        # Relative to the tensor: single entries may be sums that nearly cancel.
        assert (two[1][name] - grad).norm() <= rel * grad.norm() + 1e-9, name
    assert sum(grad.norm() for grad in one[1].values()) > 0


@pytest.mark.parametrize("checkpointing", [None, "attention", "full"])
def test_compiled_layers_change_neither_loss_nor_gradients(checkpointing):
    """By AOTAutograd, whose graphs Inductor turns into kernels; three lengths make no graph more than one does."""
    tuners = [build(), build()]
    for tuner in tuners if checkpointing else ():
        enable_checkpointing(tuner.llm, checkpointing)
    torch._dynamo.reset()
    counters.clear()
    compile_layers(tuners[1].llm, backend="aot_eager")
    agree(*map(steps, tuners))
    # Of a norm and of an MLP; all layers share them.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4, counters["stats"]


@pytest.fixture
def one_model_only(monkeypatch):
    """Liger changes the module of all LLaMAs: undone after the test."""
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    return modeling_llama


def with_liger(monkeypatch, whole):
    """A tuned model with Liger's kernels; not whole: with its RoPE alone."""
    base = tiny_tuner.base

    def patched(name):
        llm = base(name)
        liger.patch(llm)
        own = [(layer.input_layernorm, layer.post_attention_layernorm, layer.mlp) for layer in llm.model.layers]
        for module in () if whole else (llm.model.norm, *sum(own, ())):
            del module.forward
        return llm

    monkeypatch.setattr(tiny_tuner, "base", patched)
    return build()


def test_liger_takes_the_place_of_the_right_modules(monkeypatch, one_model_only):
    kernels = pytest.importorskip("liger_kernel.transformers", reason="pip install -e '.[gpu]'")
    llm = with_liger(monkeypatch, whole=True).llm
    assert one_model_only.apply_rotary_pos_emb is kernels.liger_rotary_pos_emb
    norm, mlp = kernels.LigerRMSNorm.forward, kernels.LigerSwiGLUMLP.forward
    assert llm.model.norm.forward.__func__ is norm
    for layer in llm.model.layers:
        assert layer.layer.input_layernorm.forward.__func__ is layer.layer.post_attention_layernorm.forward.__func__
        assert layer.layer.input_layernorm.forward.__func__ is norm and layer.layer.mlp.forward.__func__ is mlp
    # Fused losses are not taken: pipeline/model/liger.py says why.
    assert "forward" not in vars(llm)


def test_liger_changes_neither_loss_nor_gradients(monkeypatch, one_model_only):
    pytest.importorskip("liger_kernel.transformers", reason="pip install -e '.[gpu]'")
    want = steps(build(), DEVICE)
    got = steps(with_liger(monkeypatch, whole=DEVICE == "cuda"), DEVICE)
    assert one_model_only.apply_rotary_pos_emb.__module__.startswith("liger_kernel.")
    agree(want, got, rel=1e-4)


@pytest.mark.parametrize(
    "flags, where, words",
    [
        ({"liger": True}, {}, "--liger true runs on a GPU only"),
        ({"liger": True}, {"device_type": "cuda", "model_type": "phi"}, "--base is a phi"),
        ({"compile_layers": True}, {"stage": 3}, "does not work with ZeRO-3"),
        ({"compile_layers": True}, {"quant": "nf4"}, "not --base_quant nf4"),
        ({"attn": "flex_attention"}, {}, "trains on a GPU only"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, flags, where, words):
    monkeypatch.setattr(liger, "find_spec", lambda name: True)
    place = {"device_type": "cpu", "stage": 2, "quant": "none", "model_type": "llama"} | where
    with pytest.raises(ValueError, match=words):
        speedups.check(TrainArguments(**flags), **place)


def test_what_is_missing_is_named(monkeypatch):
    place = {"device_type": "cuda", "stage": 2, "quant": "none", "model_type": "llama"}
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs liger-kernel: pip install -e '\.\[gpu\]'"):
        speedups.check(TrainArguments(liger=True), **place)
    monkeypatch.setattr(liger, "find_spec", lambda name: True)
    speedups.check(TrainArguments(liger=True), **place)
    with pytest.raises(ValueError, match="take one of them"):
        speedups.check(TrainArguments(liger=True, compile_layers=True), **place)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        speedups.check(TrainArguments(compile_layers=True), **place)
    monkeypatch.setenv("CXX", "g++")
    speedups.check(TrainArguments(compile_layers=True), **place)
