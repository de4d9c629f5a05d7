"""Tuned layers inside real Hugging Face models: identity, equations, checkpointing, caching, GQA, parameter shares."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.model.backbone import TunedLayer, enable_checkpointing, tune_layers
from pipeline.model.sparse import SparseNetwork

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-gqa": LlamaConfig(**SIZES, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8),
}
PAPER = {"alpha": 0.9, "activation": "hard", "norm": False, "inference_sparsity": True}
RELEASED = {"alpha": 0.2, "activation": "shifted", "norm": True, "inference_sparsity": False}


def base(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def tuned(name, projections="qv", first_layer=0, fill=True, **options):
    llm = base(name)
    llm.requires_grad_(False)

    def make(index, hidden, out_features):
        return SparseNetwork(hidden, 16, out_features, layer_index=index, **{**PAPER, **options})

    layers = tune_layers(llm, first_layer=first_layer, projections=projections, make_network=make)
    if fill:
        generator = torch.Generator().manual_seed(7)
        for layer in layers:
            torch.nn.init.normal_(layer.network.wb, std=0.3, generator=generator)
            if layer.network.norm_weight is not None:
                torch.nn.init.uniform_(layer.network.norm_weight, 0.5, 1.5, generator=generator)
    return llm


IDS = torch.tensor([[1, 5, 9, 30, 7, 22], [1, 8, 8, 3, 17, 4]])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mechanism", [PAPER, RELEASED])
def test_an_untrained_tuner_changes_nothing(name, mechanism):
    want = base(name)(input_ids=IDS).logits
    for first_layer in (0, 2, 3):
        llm = tuned(name, "qkv", first_layer, fill=False, **mechanism)
        assert torch.equal(llm(input_ids=IDS).logits, want)
        assert torch.equal(llm.train()(input_ids=IDS).logits, want)


def record(llm):
    """What each layer's attention receives and its projections give, after the parts are added."""
    seen = [{} for _ in llm.model.layers]
    for index, layer in enumerate(llm.model.layers):
        attention = (layer.layer if isinstance(layer, TunedLayer) else layer).self_attn

        def before(module, args, kwargs, index=index):
            seen[index]["h"] = kwargs["hidden_states"].detach().double().numpy()

        attention.register_forward_pre_hook(before, with_kwargs=True)
        for name in "qkv":

            def after(module, args, output, index=index, name=name):
                seen[index][name] = output.detach().double().numpy()

            getattr(attention, f"{name}_proj").register_forward_hook(after)
    return seen


@pytest.mark.parametrize("projections", ["qv", "vq", "q", "k", "v", "qk", "kv", "qkv"])
@pytest.mark.parametrize("mechanism", ["paper", "released"])
@pytest.mark.parametrize("training", [False, True])
def test_projections_follow_the_equations_over_all_layers(projections, mechanism, training):
    """Eq. 1-5 evaluated in NumPy from what the attention of each layer received, the recurrence included."""
    options, first = (PAPER, 0) if mechanism == "paper" else (RELEASED, 1)
    llm = tuned("llama-gqa", projections, first, beta=0.4, **options).train(training)
    seen = record(llm)
    llm(input_ids=IDS)
    zu = None
    for index, layer in enumerate(llm.model.layers):
        inner = layer.layer if index >= first else layer
        h, got = seen[index]["h"], seen[index]
        weight = {n: getattr(inner.self_attn, f"{n}_proj").weight.double().numpy() for n in "qkv"}
        want = {n: h @ weight[n].T for n in "qkv"}
        if index >= first:
            net = layer.network
            wz, wb = net.wz.detach().double().numpy(), net.wb.detach().double().numpy()
            r = net.share if training else 0.4
            z = h @ wz.T
            if mechanism == "paper":
                zu = z if zu is None else 0.9 * zu + 0.1 * z
                n = min(max(round(r * 16), 1), 16)
                nth = np.sort(zu, -1)[..., ::-1][..., n - 1 : n]
                za = np.where(zu >= nth, zu, 0.0)
            else:
                zu = z if zu is None else 0.2 * zu + 0.8 * z
                zu = zu / np.sqrt((zu**2).mean(-1, keepdims=True) + 1e-6) * net.norm_weight.detach().double().numpy()
                k = int(np.floor((1 - r) * 16))
                theta = np.sort(zu, -1)[..., k - 1 : k]
                za = np.maximum(zu - theta, 0.0) if training and k >= 1 else zu
            zb, start = za @ wb.T, 0
            for n in projections:
                width = weight[n].shape[0]
                want[n] = want[n] + zb[..., start : start + width]
                start += width
            assert start == wb.shape[0], "every column of Wb feeds one projection"
        for n in "qkv":
            np.testing.assert_allclose(got[n], want[n], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("mechanism", [PAPER, RELEASED, {"pattern": "top2beta"}, {"pattern": "distribution"}])
@pytest.mark.parametrize("part", ["full", "attention"])
def test_checkpointing_leaves_loss_and_gradients_as_they_are(name, mechanism, part):
    grads = []
    for checkpointing in (False, True):
        llm = tuned(name, "qv", 1, **mechanism).train()
        for layer in llm.model.layers[1:]:
            layer.network.set_step(11)
        calls = []
        llm.model.layers[2].layer.self_attn.q_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        llm.model.layers[2].network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            enable_checkpointing(llm, part)
        embeds = llm.get_input_embeddings()(IDS).detach().requires_grad_()
        loss = llm(inputs_embeds=embeds, labels=IDS).loss
        loss.backward()
        assert len(calls) == 2 + 2 * checkpointing, "each region is recomputed exactly once"
        grads.append([loss.detach(), embeds.grad] + [p.grad for p in llm.parameters() if p.requires_grad])
    assert len(grads[0]) == len(grads[1]) > 6
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed) and plain.abs().sum() > 0


def held(part):
    """Bytes that the forward keeps for the backward pass."""
    llm = tuned("llama", "qv", 1).train()
    if part:
        enable_checkpointing(llm, part)
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    embeds = torch.randn(4, 64, 32, requires_grad=True)
    weights = {each.untyped_storage().data_ptr() for each in llm.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    assert out.requires_grad
    return sum(size for place, size in storages.items() if place not in weights)


def test_less_is_held_the_more_is_recomputed():
    plain, attention, full = (held(part) for part in (None, "attention", "full"))
    assert full < 0.6 * attention and attention < 0.8 * plain
    with pytest.raises(ValueError, match="must be one of"):
        enable_checkpointing(tuned("llama", "qv", 1), "mlp")


def test_gradients_reach_early_networks_through_zu():
    """With the LM's own path cut, the first layer's Wz still moves the last layer's parts."""
    llm = tuned("llama", "q").train()
    h = torch.randn(1, 3, 32)
    zu, last = None, None
    for layer in llm.model.layers:
        zu, parts = layer.network(h, zu)
        last = parts["q"]
    last.sum().backward()
    assert llm.model.layers[0].network.wz.grad.abs().sum() > 0
    assert llm.model.layers[0].network.wb.grad is None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mechanism", [PAPER, RELEASED])
def test_cached_decoding_equals_the_full_forward(name, mechanism):
    llm = tuned(name, "qkv", 1, **mechanism)
    with torch.no_grad():
        want = llm(input_ids=IDS).logits
        out = llm(input_ids=IDS[:, :2], use_cache=True)
        got = [out.logits]
        for t in range(2, IDS.shape[1]):
            out = llm(input_ids=IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            got.append(out.logits)
    assert torch.allclose(torch.cat(got, 1), want, atol=2e-5)
    assert not torch.allclose(want, base(name)(input_ids=IDS).logits, atol=1e-2)


def test_copies_and_reported_hidden_states_work():
    llm = tuned("llama", "qv", 2)
    twin = copy.deepcopy(llm)
    for parameter in twin.model.layers[2].network.parameters():
        parameter.data.zero_()
    out = llm(input_ids=IDS, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [torch.Size([2, 6, 32])] * 5
    assert not torch.equal(twin(input_ids=IDS).logits, out.logits)
    assert torch.equal(llm(input_ids=IDS).logits, out.logits)


def test_a_failed_forward_leaves_the_layer_usable():
    llm = tuned("llama")
    want = llm(input_ids=IDS).logits
    with pytest.raises(RuntimeError):
        llm(inputs_embeds=torch.randn(1, 2, 31))
    assert torch.equal(llm(input_ids=IDS).logits, want)


def test_bf16_base_with_fp32_networks():
    llm = base("llama").bfloat16()
    tune_layers(llm, first_layer=0, projections="qv", make_network=lambda i, d, out: SparseNetwork(d, 16, out))
    assert llm(input_ids=IDS).logits.dtype == torch.bfloat16


def test_unfit_models_and_choices_are_named():
    def make(index, hidden, out_features):
        return SparseNetwork(hidden, 16, out_features)

    for projections in ("", "qx", "qq"):
        with pytest.raises(ValueError, match="projections"):
            tune_layers(base("llama"), first_layer=0, projections=projections, make_network=make)
    with pytest.raises(ValueError, match="first_tuned_layer"):
        tune_layers(base("llama"), first_layer=4, projections="qv", make_network=make)
    llm = tuned("llama", first_layer=2)
    with pytest.raises(ValueError, match="tuned already"):
        tune_layers(llm, first_layer=3, projections="qv", make_network=make)
    with pytest.raises(ValueError, match="model.layers"):
        tune_layers(torch.nn.Linear(2, 2), first_layer=0, projections="qv", make_network=make)
    phi = AutoModelForCausalLM.from_config(PhiConfig(**SIZES))
    phi.model.layers[1].self_attn.q_proj = None
    del phi.model.layers[1].self_attn.q_proj
    with pytest.raises(ValueError, match="layer 1"):
        tune_layers(phi, first_layer=0, projections="qv", make_network=make)


LLAMA_2 = {
    "7b": LlamaConfig(),
    "13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
}


@pytest.mark.parametrize("size, total, share", [("7b", 6_738_415_616, 0.75), ("13b", 13_015_864_320, 0.60)])
def test_share_of_the_sparse_network_on_llama_2(size, total, share):
    """The paper's 0.75 % of 7B and 0.60 % of 13B: q and v of every layer, Z = 128."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(LLAMA_2[size])
        assert sum(p.numel() for p in llm.parameters()) == total
        layers = tune_layers(
            llm, first_layer=0, projections="qv", make_network=lambda i, d, out: SparseNetwork(d, 128, out)
        )
    trained = sum(p.numel() for layer in layers for p in layer.network.parameters())
    assert round(100 * trained / total, 2) == share
