"""The tuned model as a whole, on tiny random LMs: what moves, which state a decoder gets, losses by hand, decoding.

All on one process and one CPU. Not here: DeepSpeed, GPUs, real weights.
"""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from pipeline.data.batch import IGNORE, Batch, PromptBatch, VisionFeatures
from pipeline.model.backbone import enable_checkpointing, tune_layers
from pipeline.model.decoders import ClipHead, ImageProjector, MaskDecoder
from pipeline.model.embedding import ExtendedHead, NewTokenEmbedding
from pipeline.model.generation import find_mentions, until_end
from pipeline.model.initialise import initialise
from pipeline.model.losses import LossWeights, Norms
from pipeline.model.sparse import SparseNetwork
from pipeline.model.tuner import KINDS, NeuralTuner

VOCAB, HIDDEN, WIDTH, EMBED, OBJECTS = 40, 32, 24, 6, 3
OBJ, GEN, SLOT = VOCAB, VOCAB + OBJECTS, VOCAB + OBJECTS + 1
PICTURE = [SLOT] * 17
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
}
RELEASED = {"alpha": 0.2, "activation": "shifted", "norm": True, "inference_sparsity": False}
NORMS = Norms(tokens=7.0, masks=3.0, pictures=2.0)


def base(name="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def build(name="llama", *, fill=True, train_embeddings="new", first_layer=0, **options):
    llm = base(name)

    def make(index, hidden, out_features):
        return SparseNetwork(hidden, 16, out_features, layer_index=index, **options)

    tune_layers(llm, first_layer=first_layer, projections="qv", make_network=make)
    tuner = NeuralTuner(
        llm,
        max_objects=OBJECTS,
        projector=ImageProjector(WIDTH, HIDDEN, output_rms=0.3),
        mask_decoder=MaskDecoder(WIDTH, HIDDEN, 4, dim=16, upsample=8),
        clip_head=ClipHead(HIDDEN, EMBED),
        train_embeddings=train_embeddings,
    )
    initialise(tuner, 0)
    if fill:
        generator = torch.Generator().manual_seed(3)
        for network in tuner.networks:
            torch.nn.init.normal_(network.wb, std=0.3, generator=generator)
        torch.nn.init.normal_(llm.lm_head.rows, std=0.5, generator=generator)
        torch.nn.init.normal_(llm.model.embed_tokens.rows, std=0.5, generator=generator)
    return tuner


def features(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(4, rows, 17, WIDTH, generator=generator)
    embedding = torch.randn(rows, EMBED, generator=generator)
    return VisionFeatures(tokens=tokens[3], taps=tuple(tokens[:3]), embedding=embedding)


ROWS = [
    ("reasoning", [1, *PICTURE, 5, 6], [7, OBJ, 8, OBJ + 1, 2]),
    ("caption", [1, *PICTURE, 5, 6, 9], [10, 11, 2]),
    ("generation", [1, 5, 12], [GEN, 2]),
    ("referring", [1, *PICTURE, 14], [13, OBJ + 2, 2]),
]


def batch(rows=ROWS, *, clip_targets=True):
    length = max(len(prompt) + len(answer) for _, prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    at = {"mask": [], "gen": []}
    for row, (_, prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
        for place in range(len(prompt), end):
            if OBJ <= ids[row, place] < GEN:
                at["mask"].append((row, place))
            elif ids[row, place] == GEN:
                at["gen"].append((row, place))
    where = {kind: torch.tensor(pairs, dtype=torch.long).reshape(-1, 2) for kind, pairs in at.items()}
    generator = torch.Generator().manual_seed(1)
    return Batch(
        keys=[str(i) for i in range(len(rows))],
        tasks=[task for task, _, _ in rows],
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        pixel_values=torch.zeros(len(rows), 3, 8, 8),
        mask_rows=where["mask"][:, 0],
        mask_positions=where["mask"][:, 1],
        masks=(torch.rand(len(where["mask"]), 16, 16, generator=generator) > 0.5).float(),
        gen_rows=where["gen"][:, 0],
        gen_positions=where["gen"][:, 1],
        clip_targets=torch.randn(len(where["gen"]), EMBED, generator=generator) if clip_targets else None,
    )


def empty_batch():
    one = torch.zeros(1, 1, dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        keys=[],
        tasks=[],
        input_ids=one,
        attention_mask=one,
        labels=torch.full((1, 1), IGNORE),
        pixel_values=torch.zeros(1, 3, 8, 8),
        mask_rows=none,
        mask_positions=none,
        masks=torch.zeros(0, 16, 16),
        gen_rows=none,
        gen_positions=none,
    )


def prompts(rows=ROWS):
    length = max(len(prompt) for _, prompt, _ in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for row, (_, prompt, _) in enumerate(rows):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return PromptBatch(
        keys=[str(i) for i in range(len(rows))],
        tasks=[task for task, _, _ in rows],
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.zeros(len(rows), 3, 8, 8),
        references=[{} for _ in rows],
        answer_ids=[answer for _, _, answer in rows],
    )


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


@pytest.mark.parametrize("name, train_embeddings", [("llama", "new"), ("tied", "new"), ("llama", "all"), ("tied", "all")])
def test_only_the_trained_set_moves(name, train_embeddings):
    tuner = build(name, train_embeddings=train_embeddings).train()
    trained = tuner.trained_parameters()
    assert {n for n, p in tuner.named_parameters() if p.requires_grad} == set(trained)
    before = {n: p.detach().clone() for n, p in tuner.named_parameters()}
    groups = tuner.parameter_groups(1e-2, weight_decay=0.1, lrs={"projector": 3e-3, "tokens": None})
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(trained)
    assert {group["name"].split("/")[0] for group in groups} == set(KINDS)
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
        tuner.parameter_groups(1.0, lrs={"heads": 1.0})


@pytest.mark.parametrize("mechanism", [{}, RELEASED])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_batched_generation_equals_one_by_one(name, mechanism):
    tuner, feats, many = build(name, **mechanism), features(4), prompts()
    with_all = tuner.generate(many, feats, max_new_tokens=8, eos_token_id=2)
    assert len({tuple(g.ids) for g in with_all}) > 1
    for row in range(4):
        alone = tuner.generate(
            prompts([ROWS[row]]), feats.select(torch.tensor([row])), max_new_tokens=8, eos_token_id=2
        )[0]
        assert alone.ids == with_all[row].ids and alone.object_numbers == with_all[row].object_numbers
        if alone.mask_logits is not None:
            assert torch.allclose(alone.mask_logits, with_all[row].mask_logits, atol=1e-4)


def force(tuner, answers):
    """Makes greedy decoding write the given answers, whatever the LM would say."""
    step = {"n": 0}

    def rewrite(module, args, logits):
        forced = torch.full_like(logits, -1e9)
        for row, answer in enumerate(answers):
            forced[row, -1, answer[min(step["n"], len(answer) - 1)]] = 0.0
        step["n"] += 1
        return forced

    return tuner.llm.lm_head.register_forward_hook(rewrite)


@pytest.mark.parametrize("training", [True, False])
def test_the_predicting_state_is_the_decoders_state_in_all_three_ways(training):
    """forward(), generate() and teacher_forced() hand the same states to the mask decoder and the CLIP head."""
    tuner, feats, data = build().train(training), features(4), batch()
    seen = {"mask_decoder": [], "clip_head": []}
    tuner.mask_decoder.register_forward_pre_hook(lambda _, args: seen["mask_decoder"].append(args[1].detach()))
    tuner.clip_head.register_forward_pre_hook(lambda _, args: seen["clip_head"].append(args[0].detach()))
    tuner.eval()
    tuner(data, feats, NORMS)
    tuner.train(training)
    handle = force(tuner, [answer for _, _, answer in ROWS])
    generated = tuner.generate(prompts(), feats, max_new_tokens=6)
    handle.remove()
    forced = tuner.teacher_forced(prompts(), feats)
    assert tuner.training is training, "the mode comes back"
    for states in seen.values():
        assert len(states) == 3
        assert torch.allclose(states[0], states[1], atol=1e-4) and torch.allclose(states[0], states[2], atol=1e-4)
    assert [g.ids for g in generated] == [answer[:-1] for _, _, answer in ROWS]
    for results in (generated, forced):
        assert [g.object_numbers for g in results] == [[1, 2], [], [], [3]]
        assert [g.embedding is not None for g in results] == [False, False, True, False]
        assert [None if g.mask_logits is None else tuple(g.mask_logits.shape) for g in results] == [
            (2, 16, 16),
            None,
            None,
            (1, 16, 16),
        ]
    assert torch.allclose(generated[3].mask_logits, forced[3].mask_logits, atol=1e-4)


def test_teacher_forced_ids_are_the_models_own_best_guesses():
    tuner, feats = build().eval(), features(4)
    got = tuner.teacher_forced(prompts(), feats)
    for row, (_, prompt, answer) in enumerate(ROWS):
        alone = prompts([(ROWS[row][0], prompt + answer, [])])
        embeds = tuner._embed(alone.input_ids, feats.select(torch.tensor([row])))
        best = tuner.llm(inputs_embeds=embeds).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert got[row].ids == until_end(best, {2})


def test_repeated_tags_and_rows_without_a_picture_make_no_masks():
    found = find_mentions([7, OBJ + 1, OBJ, OBJ + 1, GEN, GEN, SLOT], first_object=OBJ, max_objects=OBJECTS)
    assert (found.numbers, found.places, found.picture) == ([2, 1], [1, 2], 4)
    tuner = build()
    handle = force(tuner, [[OBJ, OBJ, OBJ + 1, 2], [OBJ, GEN, 2]])
    first, second = tuner.generate(prompts([ROWS[0], ROWS[2]]), features(2), max_new_tokens=5)
    handle.remove()
    assert first.object_numbers == [1, 2] and first.mask_logits.shape[0] == 2 and first.embedding is None
    assert second.object_numbers == [] and second.mask_logits is None and second.embedding.shape == (EMBED,)


def test_beams_are_refused_and_sampling_runs():
    tuner = build()
    with pytest.raises(ValueError, match="num_beams"):
        tuner.generate(prompts(), features(4), max_new_tokens=2, num_beams=2)
    assert len(tuner.generate(prompts(), features(4), max_new_tokens=2, do_sample=True, top_p=0.9)) == 4


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
