"""LoRA and IA3 in the tuned model: identity at the start, size, what is trained, decoding, seeds."""

from functools import partial

import pytest
import torch
from tiny_tuner import HIDDEN, NORMS, OBJECTS, VOCAB, base, batch, build, features, prompts
from torch import nn

from pipeline.model.adapters import AdaptedProjection, add_ia3, add_lora, matched_rank, sparse_parameters
from pipeline.model.backbone import enable_checkpointing
from pipeline.model.initialise import initialise

LORA = partial(add_lora, first_layer=1, projections="qv", rank=4, alpha=8.0)
IA3 = partial(add_ia3, first_layer=1)
BOTH = pytest.mark.parametrize("adapt", [LORA, IA3], ids=["lora", "ia3"])


def adapters(tuner):
    return {name: p for name, p in tuner.trained_parameters().items() if ".adapted." in name}


def fill(tuner):
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters(tuner).values():
        nn.init.normal_(parameter, std=0.3, generator=generator)


@BOTH
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_untrained_adapter_leaves_the_base_logits_as_they_were(adapt, name):
    ids = torch.tensor([[1, 5, 9, 30], [1, 8, 8, 3]])
    want = base(name)(input_ids=ids).logits
    tuner = build(name, fill=False, adapt=adapt)
    assert torch.equal(tuner.llm(input_ids=ids).logits[..., :VOCAB], want)
    fill(tuner)
    got = tuner.llm(input_ids=ids).logits
    assert got.shape[-1] == VOCAB + OBJECTS + 1
    assert not torch.allclose(got[..., :VOCAB], want, atol=1e-3)


def test_what_is_trained():
    names = set(adapters(build(adapt=LORA)))
    layer = "llm.model.layers.1.self_attn"
    assert {name for name in names if name.startswith(layer)} == {
        f"{layer}.{projection}_proj.adapted.lora_{side}.default.weight" for projection in "qv" for side in "AB"
    }
    assert not [name for name in names if ".layers.0." in name]
    assert {name.split(".")[-4] for name in adapters(build(adapt=IA3))} == {"k_proj", "v_proj", "down_proj"}
    for tuner in (build(adapt=LORA), build(adapt=IA3)):
        learnt = {name for name, p in tuner.named_parameters() if p.requires_grad}
        assert learnt == set(tuner.trained_parameters())
        groups = {group["name"]: group["lr"] for group in tuner.parameter_groups(1.0, lrs={"adapter": 0.5})}
        assert groups["adapter"] == 0.5


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_matched_rank_is_the_nearest_in_size(name):
    where = {"first_layer": 1, "projections": "qv"}
    network = build(name, first_layer=1)
    wanted = sum(p.numel() for one in network.networks for p in one.parameters())
    assert sparse_parameters(base(name), z_dim=16, **where) == wanted
    rank = matched_rank(base(name), z_dim=16, **where)
    sizes = {}
    for near in (rank - 1, rank, rank + 1):
        tuner = build(name, adapt=partial(add_lora, rank=near, alpha=1.0, **where))
        sizes[near] = abs(sum(p.numel() for p in adapters(tuner).values()) - wanted)
    assert sizes[rank] == min(sizes.values())


@BOTH
def test_initial_values_depend_on_name_and_seed_alone(adapt):
    def values(seed):
        torch.manual_seed(torch.seed() % 1000)
        tuner = build(fill=False, adapt=adapt)
        initialise(tuner, seed)
        return {name: p.detach().clone() for name, p in adapters(tuner).items()}

    one, again, other = values(1), values(1), values(2)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    if adapt is LORA:
        drawn = [name for name in one if "lora_A" in name]
        assert len({one[name].sum().item() for name in drawn}) == len(drawn)
        assert all(one[name].abs().max() <= HIDDEN**-0.5 for name in drawn)
        assert not any(torch.equal(one[name], other[name]) for name in drawn)


@BOTH
def test_gradients_with_and_without_recomputation(adapt):
    found = []
    for recompute in (False, True):
        tuner = build(adapt=adapt)
        fill(tuner)
        if recompute:
            enable_checkpointing(tuner.llm)
        tuner.train()
        loss, _ = tuner(batch(), features(4), NORMS)
        loss.backward()
        found.append({name: p.grad for name, p in adapters(tuner).items()})
    assert all(grad is not None and grad.any() for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


@BOTH
def test_decoding_with_the_cache_is_the_full_forward(adapt):
    tuner = build(adapt=adapt)
    fill(tuner)
    free = tuner.generate(prompts(), features(4), max_new_tokens=6)
    slow = tuner.generate(prompts(), features(4), max_new_tokens=6, use_cache=False)
    assert [one.ids for one in free] == [one.ids for one in slow]


def test_a_model_without_such_layers_is_refused():
    llm = base()
    for layer in llm.model.layers:
        layer.mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match="layer 1 .* has not each of k_proj, v_proj, down_proj"):
        IA3(llm)
    assert not [module for module in llm.modules() if isinstance(module, AdaptedProjection)]
