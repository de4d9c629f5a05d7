"""The tuned model as a whole, on tiny random LMs: identity, losses by hand, gradients, what is trained.

All on one process and one CPU. Not here: DeepSpeed, GPUs, real weights; decoding is in test_decoding.py.
"""

import pytest
import torch
from tiny_tuner import (
    CONFIGS,
    EMBED,
    GEN,
    HIDDEN,
    NORMS,
    OBJ,
    OBJECTS,
    RELEASED,
    ROWS,
    SLOT,
    VOCAB,
    WIDTH,
    base,
    batch,
    build,
    empty_batch,
    features,
    prompts,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.data.batch import IGNORE
from pipeline.model.backbone import enable_checkpointing, tune_layers
from pipeline.model.decoders import ClipHead, ImageProjector, MaskDecoder
from pipeline.model.embedding import ExtendedHead, NewTokenEmbedding
from pipeline.model.losses import LossWeights, Norms
from pipeline.model.sparse import SparseNetwork
from pipeline.model.tuner import KINDS, NeuralTuner


@pytest.mark.parametrize("name", CONFIGS)
def test_an_untrained_tuner_leaves_the_base_logits_as_they_were(name):
    ids = torch.tensor([[1, 5, 9, 30], [1, 8, 8, 3]])
    want = base(name)(input_ids=ids).logits
    tuner = build(name, fill=False)
    for mode in (True, False):
        got = tuner.train(mode).llm(input_ids=ids).logits
        assert got.shape[-1] == VOCAB + OBJECTS + 1 == tuner.llm.config.vocab_size
        assert torch.equal(got[..., :VOCAB], want)


def test_new_rows_start_near_the_mean_and_slots_embed_as_zeros():
    tuner = build(fill=False)
    embedding, head = tuner.llm.get_input_embeddings(), tuner.llm.get_output_embeddings()
    assert isinstance(embedding, NewTokenEmbedding) and isinstance(head, ExtendedHead)
    for module in (embedding, head):
        table = module.base.weight
        rms = table.square().mean().sqrt()
        spread = (module.rows - table.mean(0)).square().mean().sqrt()
        assert spread.item() == pytest.approx(0.1 * rms.item(), rel=0.3)
    out = embedding(torch.tensor([[3, OBJ, GEN, SLOT, SLOT + 5]]))
    assert torch.equal(out[0, 0], embedding.base.weight[3]) and torch.equal(out[0, 1], embedding.rows[0])
    assert torch.equal(out[0, 2], embedding.rows[OBJECTS]) and not out[0, 3:].any()


def by_hand(tuner, data, feats):
    """The losses from the full logits of an unpadded forward of each row alone."""
    ce, dice, mse = 0.0, 0.0, 0.0
    mask_index, gen_index = 0, 0
    for row in range(len(data.keys)):
        length = int(data.attention_mask[row].sum())
        ids = data.input_ids[row, :length]
        embeds = tuner.llm.get_input_embeddings()(ids[None])
        if (ids == SLOT).any():
            picture = tuner.projector(feats.tokens[row : row + 1])
            embeds = torch.cat([embeds[:, :1], picture, embeds[:, 18:]], dim=1)
        hidden = tuner.llm.model(inputs_embeds=embeds).last_hidden_state[0]
        logits = tuner.llm.lm_head(hidden)
        for t in range(1, length):
            if data.labels[row, t] != IGNORE:
                ce = ce + F.cross_entropy(logits[t - 1], data.labels[row, t])
            if data.labels[row, t] in range(OBJ, GEN):
                taps = tuple(tap[row : row + 1] for tap in feats.taps)
                p = tuner.mask_decoder(taps, hidden[None, t - 1])[0].sigmoid()
                g = data.masks[mask_index]
                dice = dice + 1 - (2 * (p * g).sum() + 1) / (p.sum() + g.sum() + 1)
                mask_index += 1
            if data.labels[row, t] == GEN:
                target = feats.embedding[row] if data.clip_targets is None else data.clip_targets[gen_index]
                mse = mse + ((tuner.clip_head(hidden[t - 1]) - target) ** 2).mean()
                gen_index += 1
    return ce, dice, mse


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("clip_targets", [True, False])
def test_loss_equals_the_equations(name, clip_targets):
    tuner, data, feats = build(name).train(), batch(clip_targets=clip_targets), features(4)
    tuner.set_step(5)
    loss, sums = tuner(data, feats, NORMS)
    ce, dice, mse = by_hand(tuner, data, feats)
    want = ce / 7 + dice / 3 + 10 * mse / 2
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert sums["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert (sums["tokens"], sums["masks"], sums["pictures"]) == (13, 3, 1)
    for whole, count, tasks in (("ce", "tokens", [5, 3, 3, 2]), ("dice", "masks", [2, 1, 0, 0])):
        split = [sums[f"{whole}/{task}"].item() for task in tuner.tasks]
        assert sum(split) == pytest.approx(sums[whole].item(), rel=1e-5)
        assert [sums[f"{count}/{task}"].item() for task in tuner.tasks] == tasks
    weighted, _ = tuner(data, feats, NORMS, LossWeights(seg=2.0, gen=0.0, bce=0.5))
    assert weighted.item() == pytest.approx((ce / 7 + 2 * dice / 3 + 0.5 * sums["bce"] / 3).item(), rel=1e-5)


def test_micro_batches_add_up_to_the_whole_batch():
    tuner, feats = build().train(), features(4)
    whole, _ = tuner(batch(), feats, NORMS)
    whole.backward()
    want = {name: p.grad.clone() for name, p in tuner.trained_parameters().items()}
    tuner.zero_grad()
    targets, masks, total = batch().clip_targets, batch().masks, 0.0
    for rows, mask_rows in (([0, 3], [0, 1, 2]), ([1], []), ([2], [])):
        part = batch([ROWS[i] for i in rows])
        part.masks = masks[mask_rows]
        part.clip_targets = targets if part.gen_rows.numel() else None
        loss, _ = tuner(part, feats.select(torch.tensor(rows)), NORMS)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    for name, parameter in tuner.trained_parameters().items():
        assert torch.allclose(parameter.grad, want[name], atol=2e-5), name


@pytest.mark.parametrize("mechanism", [{}, RELEASED])
def test_checkpointing_leaves_gradients_as_they_are(mechanism):
    grads = []
    for checkpointing in (False, True):
        tuner = build(**mechanism, train_embeddings="all").train()
        tuner.set_step(9)
        if checkpointing:
            enable_checkpointing(tuner.llm)
        loss, _ = tuner(batch(), features(4), NORMS)
        loss.backward()
        grads.append({name: p.grad for name, p in tuner.trained_parameters().items()})
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name


@pytest.mark.parametrize("which", ["all", "caption", "generation", "empty"])
@pytest.mark.parametrize("mechanism", [{}, {**RELEASED, "train_embeddings": "all"}])
def test_every_batch_touches_every_trained_parameter(which, mechanism):
    tuner = build(fill=False, **mechanism).train()
    calls = []
    for name in ("projector", "mask_decoder", "clip_head"):
        getattr(tuner, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    data = empty_batch() if which == "empty" else batch([row for row in ROWS if which in ("all", row[0])])
    loss, sums = tuner(data, features(data.input_ids.shape[0]), NORMS)
    loss.backward()
    assert calls == ["projector", "mask_decoder", "clip_head"]
    for name, parameter in tuner.trained_parameters().items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if which == "empty":
        assert loss.item() == 0 and all(not p.grad.any() for p in tuner.trained_parameters().values())
    other, other_sums = tuner(batch(), features(4), Norms(tokens=0.0, masks=0.0, pictures=0.0))
    assert other.item() == 0.0 and set(other_sums) == set(sums)


@pytest.mark.parametrize(
    "name, train_embeddings", [("llama", "new"), ("tied", "new"), ("llama", "all"), ("tied", "all")]
)
def test_only_the_trained_set_moves(name, train_embeddings):
    tuner = build(name, train_embeddings=train_embeddings).train()
    trained = tuner.trained_parameters()
    assert {n for n, p in tuner.named_parameters() if p.requires_grad} == set(trained)
    before = {n: p.detach().clone() for n, p in tuner.named_parameters()}
    groups = tuner.parameter_groups(1e-2, weight_decay=0.1, lrs={"projector": 3e-3, "tokens": None})
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(trained)
    assert {group["name"].split("/")[0] for group in groups} == set(KINDS) - {"adapter", "heads"}
    assert {g["name"]: g["lr"] for g in groups}["projector"] == 3e-3
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])
    loss, _ = tuner(batch(), features(4), NORMS)
    loss.backward()
    torch.optim.AdamW(groups).step()
    moved = {n for n, p in tuner.named_parameters() if not torch.equal(p, before[n])}
    still = {n for n in trained if n not in moved}
    assert moved <= set(trained) and not still, still
    tables = {n for n in moved if n.endswith("base.weight")}
    assert len(tables) == {"new": 0, "all": 1 if name == "tied" else 2}[train_embeddings]
    with pytest.raises(ValueError, match="no such parts"):
        tuner.parameter_groups(1.0, lrs={"eyes": 1.0})


def test_slots_between_words_take_the_pictures_tokens_in_order():
    tuner, feats = build(), features(1)
    ids = torch.tensor([[1, *[token for _ in range(17) for token in (9, SLOT)]]])
    embeds = tuner._embed(ids, feats)
    assert torch.equal(embeds[0, 2::2], tuner.projector(feats.tokens)[0])
    assert torch.equal(embeds[0, 1::2], tuner.llm.model.embed_tokens(torch.full((17,), 9)))
    with pytest.raises(ValueError, match="image_prefix"):
        tuner._embed(ids[:, :-1], feats)


def test_bf16_base_with_fp32_and_bf16_parts():
    for whole in (False, True):
        tuner = build()
        (tuner if whole else tuner.llm.model.layers[0].layer).bfloat16()
        tuner = tuner if whole else tuner.float()
        if not whole:
            for module in (tuner.llm.model.embed_tokens.base, tuner.llm.lm_head.base, tuner.llm.model.norm):
                module.bfloat16()
            for layer in tuner.llm.model.layers:
                layer.layer.bfloat16()
        loss, _ = tuner.train()(batch(), features(4), NORMS)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert len(tuner.generate(prompts(), features(4), max_new_tokens=3)) == 4


def test_unequal_tables_and_double_installation_are_named():
    llm = base()
    llm.lm_head = torch.nn.Linear(HIDDEN, VOCAB + 1, bias=False)
    parts = {
        "max_objects": OBJECTS,
        "projector": ImageProjector(WIDTH, HIDDEN),
        "mask_decoder": MaskDecoder(WIDTH, HIDDEN, 4, dim=16),
        "clip_head": ClipHead(HIDDEN, EMBED),
    }
    with pytest.raises(ValueError, match="same number of rows"):
        NeuralTuner(llm, **parts)
    with pytest.raises(ValueError, match="installed already"):
        NeuralTuner(build().llm, **parts)
    with pytest.raises(ValueError, match="train_embeddings"):
        NeuralTuner(base(), train_embeddings="some", **parts)


def test_share_of_13b_under_released():
    """The paper prints 2.9 %: embed_tokens, lm_head, sparse networks from layer 16, projector, decoders, CLIP head."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=5120,
                intermediate_size=13824,
                num_hidden_layers=40,
                num_attention_heads=40,
                num_key_value_heads=40,
            )
        )
        tune_layers(
            llm,
            first_layer=16,
            projections="qv",
            make_network=lambda i, d, out: SparseNetwork(d, 128, out, layer_index=i, **RELEASED),
        )
        tuner = NeuralTuner(
            llm,
            max_objects=8,
            projector=ImageProjector(1024, 5120),
            mask_decoder=MaskDecoder(1024, 5120, 16, upsample=14),
            clip_head=ClipHead(5120, 512, kind="mlp"),
            train_embeddings="all",
        )
    trained = sum(p.numel() for p in tuner.trained_parameters().values())
    total = sum(p.numel() for p in tuner.parameters())
    assert round(100 * trained / total, 1) == 2.9


def test_the_share_of_units_that_fire():
    """What is watched is counted and told once; nothing is kept otherwise."""
    tuner = build(beta=0.5).eval()
    tuner(batch(), features(4), NORMS)
    assert tuner.unit_rates() == {}
    tuner.watch_units(True)
    seen = []
    keep = tuner.networks[1].observe
    tuner.networks[1].observe = lambda layer, za: (seen.append(za), keep(layer, za))
    for _ in range(2):
        tuner(batch(), features(4), NORMS)
    rates = tuner.unit_rates()
    assert set(rates) == {f"activation/layer_{layer:02d}" for layer in range(3)} | {
        "activation/mean",
        "activation/ever",
    }
    fired = torch.stack(seen) != 0
    assert rates["activation/layer_01"] == pytest.approx(fired.float().mean().item())
    # Half of 16 units, less where a padded place holds nothing but zeros.
    assert 0.4 < rates["activation/mean"] <= 0.5 < rates["activation/ever"] <= 1
    assert tuner.unit_rates() == {}
    tuner.watch_units(False)
    tuner(batch(), features(4), NORMS)
    assert tuner.unit_rates() == {}
