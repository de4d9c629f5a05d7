"""Packed batches beside padded ones: the same samples, the same losses, the same gradients. Tiny LMs, fp32, one CPU.

FlashAttention itself needs a GPU; here its place is taken by plain attention over the boundaries it would be given.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import all_tasks, collator, samples, token_map  # noqa: F401 - fixtures
from tiny_tuner import NORMS, ROWS, batch, build, features, prompts
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.assembly.speedups import check, check_attention
from pipeline.config import DataArguments, TrainArguments
from pipeline.data.batch import IGNORE, NO_SAMPLE
from pipeline.data.rows import first_fit_decreasing, lay_out
from pipeline.model.attention import attend_by_sample
from pipeline.model.backbone import enable_checkpointing


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_bins_hold_everything_once_and_no_two_could_be_one(lengths, budget):
    bins = first_fit_decreasing(lengths, budget)
    assert sorted(i for each in bins for i in each) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in each) for each in bins]
    assert all(total <= budget or len(each) == 1 for total, each in zip(fill, bins, strict=True))
    two_least = sorted(fill)[:2]
    assert len(bins) == 1 or sum(two_least) > budget


@pytest.mark.parametrize("budget, rows", [(None, 3), (5, 2), (0, 1)])
def test_positions_restart_with_each_sequence_and_count_on_over_padding(budget, rows):
    layout = lay_out([[7, 8], [4, 5, 6], [9]], pad_id=0, budget=budget)
    assert layout.input_ids.shape[0] == rows
    for i, ids in enumerate(([7, 8], [4, 5, 6], [9])):
        row, start = layout.starts[i]
        place = slice(start, start + len(ids))
        assert layout.input_ids[row, place].tolist() == ids
        assert layout.position_ids[row, place].tolist() == list(range(len(ids)))
        assert (layout.segment_ids == i).nonzero()[:, 1].tolist() == list(range(start, start + len(ids)))
    if budget == 5:
        assert layout.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
        assert layout.segment_ids[1].tolist() == [2, *[NO_SAMPLE] * 4]


@pytest.mark.parametrize("pack_tokens", [0, 300])
def test_the_collator_packs_what_it_would_pad(samples, token_map, pack_tokens):  # noqa: F811
    padded = collator(token_map)(all_tasks(samples))
    packed = collator(token_map, pack_tokens=pack_tokens)(all_tasks(samples))
    assert (packed.keys, packed.tasks, packed.counts()) == (padded.keys, padded.tasks, padded.counts())
    assert packed.input_ids.shape[0] < len(packed.keys)
    assert pack_tokens == 0 or packed.input_ids.shape[1] <= pack_tokens
    assert torch.equal(packed.pixel_values, padded.pixel_values) and torch.equal(packed.masks, padded.masks)
    for sample in range(len(padded.keys)):
        here, there = padded.segment_ids == sample, packed.segment_ids == sample
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(getattr(padded, name)[here], getattr(packed, name)[there]), name
    for kind in ("mask", "gen"):
        one, two = (
            [(each.segment_ids[r, t].item(), each.position_ids[r, t].item()) for r, t in zip(rows, places)]
            for each in (padded, packed)
            for rows, places in [(getattr(each, f"{kind}_rows"), getattr(each, f"{kind}_positions"))]
        )
        assert one == two and one
    assert set(packed.labels[packed.segment_ids == NO_SAMPLE].tolist()) <= {IGNORE}
    with pytest.raises(ValueError, match="rows must hold a sample"):
        collator(token_map, pack_tokens=255)


def outcome(attn, checkpointing, name="llama", pack_tokens=None):
    tuner = build(name, train_embeddings="all").train()
    tuner.set_step(4)
    tuner.llm.set_attn_implementation(attn)
    if checkpointing:
        enable_checkpointing(tuner.llm, checkpointing)
    data = batch([*ROWS, *ROWS[::-1]], pack_tokens=pack_tokens)
    loss, sums = tuner(data, features(len(data.keys)), NORMS)
    loss.backward()
    return loss, sums, {name: p.grad for name, p in tuner.trained_parameters().items()}


def agree(one, two):
    assert two[0].item() == pytest.approx(one[0].item(), rel=1e-6)
    assert set(one[1]) == set(two[1])
    for name, value in one[1].items():
        assert two[1][name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    for name, grad in one[2].items():
        # Relative to the tensor: single entries may be sums that nearly cancel.
        assert (two[2][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


@pytest.mark.parametrize("attn", ["sdpa_varlen", "sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [None, "attention", "full"])
@pytest.mark.parametrize("pack_tokens", [0, 60])
def test_loss_and_gradients_are_those_of_the_padded_batch(attn, checkpointing, pack_tokens):
    agree(outcome("eager", None), outcome(attn, checkpointing, pack_tokens=pack_tokens))


@pytest.mark.parametrize("attn", ["sdpa_varlen", "sdpa"])
def test_grouped_queries_too(attn):
    agree(outcome("eager", None, "qwen2"), outcome(attn, None, "qwen2", pack_tokens=0))


def test_decoding_is_that_of_the_usual_attention():
    answers = []
    for attn in ("sdpa", "sdpa_varlen"):
        tuner = build()
        tuner.llm.set_attn_implementation(attn)
        found = tuner.generate(prompts(), features(4), max_new_tokens=5)
        answers.append([each.ids for each in found + tuner.teacher_forced(prompts(), features(4))])
    assert answers[0] == answers[1]


def test_a_sample_beyond_the_sliding_window_is_refused():
    heads = torch.zeros(1, 2, 9, 4)
    with pytest.raises(ValueError, match="sample of 6 tokens is longer than the model's sliding window of 5"):
        attend_by_sample(torch.nn.Identity(), heads, heads, heads, None, sample_lengths=[6, 3], sliding_window=5)


def varlen(module, query, key, value, mask, scaling, dropout=0.0, **given):
    """What flash_attn_varlen_func computes: causal attention between boundaries over all rows laid end to end."""
    assert mask is None and given["cu_seq_lens_q"] is given["cu_seq_lens_k"]
    ends = given["cu_seq_lens_q"].tolist()
    assert given["max_length_q"] == max(b - a for a, b in itertools.pairwise(ends))
    flat = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (query, key, value)]
    parts = [
        F.scaled_dot_product_attention(*(x[None, :, a:b] for x in flat), is_causal=True, scale=scaling)[0]
        for a, b in itertools.pairwise(ends)
    ]
    out = torch.cat(parts, dim=1).transpose(0, 1)
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


@pytest.mark.parametrize("pack_tokens", [None, 0, 60])
def test_flash_attention_is_given_the_boundaries_of_the_samples(monkeypatch, pack_tokens):
    want = outcome("sdpa", None)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
    monkeypatch.setattr("transformers.PreTrainedModel.set_attn_implementation", _take)
    agree(want, outcome("flash_attention_2", None, pack_tokens=pack_tokens))


def _take(llm, name):
    """Without the check that the package is installed."""
    llm.config._attn_implementation = name


def test_what_cannot_run_is_refused_before_anything_is_loaded(monkeypatch):
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match=f"--attn {name} trains on a GPU only"):
            check_attention(name, "cpu", bf16=True)
    monkeypatch.setattr("pipeline.assembly.speedups.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="needs the package flash-attn"):
        check_attention("flash_attention_2", "cuda", bf16=True)
    monkeypatch.setattr("pipeline.assembly.speedups.is_flash_attn_2_available", lambda: True)
    check_attention("flash_attention_2", "cuda", bf16=True)
    asked = TrainArguments(attn="flash_attention_2", bf16="false")
    with pytest.raises(ValueError, match="does not compute in fp32: take --bf16 true"):
        check(asked, device_type="cuda", stage=2, quant="none", model_type="llama")
    for name in ("auto", "sdpa", "eager"):
        check_attention(name, "cpu", bf16=False)
    with pytest.raises(ValueError, match="pack_tokens must be 0 or at least max_length, 512"):
        DataArguments(pack_tokens=400)
    assert [DataArguments(packing=on, pack_tokens=600).row_tokens for on in (True, False)] == [600, None]
