"""Samples to tensors and loaders: labels, positions, truncation, damaged pictures, ranks and workers. Real pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data import rle
from pipeline.data.batch import IGNORE, Batch, VisionFeatures
from pipeline.data.collate import Collator
from pipeline.data.loader import EvalLoader, StepDataset, build_loader
from pipeline.data.mmud import MmudSource
from pipeline.data.order import Item, SampleOrder
from pipeline.data.schema import Sample
from pipeline.data.tasks import TASKS
from pipeline.data.tokens import TokenMap

NAMES = tuple(TASKS)
EVEN = (1.0,) * 4
SLOTS = 4


class Listed:
    """Samples in memory; those at `bad` cannot be read."""

    def __init__(self, samples: list[Sample], bad: tuple[int, ...] = ()) -> None:
        self.samples, self.bad = samples, bad

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, i: int) -> str:
        return self.samples[i].key

    def __getitem__(self, i: int) -> Sample:
        if i in self.bad:
            raise ValueError("cut")
        return self.samples[i]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    root = Path(__file__).parent / "data" / "mmud"
    source = MmudSource(root, root / "images")
    found = [each for split in source.splits() for each in source.iterate(split)]
    assert all(isinstance(each, Sample) for each in found)
    return [each for each in found if isinstance(each, Sample)]


@pytest.fixture(scope="module")
def token_map(samples) -> TokenMap:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [text for each in samples for text in (each.caption, each.question, each.answer)]
    texts += ["Question: Answer:", "the c0 c1"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return TokenMap(fast, len(fast), 6)


def collator(token_map: TokenMap, **more) -> Collator:
    settings = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "mask_size": 16, "max_length": 256}
    return Collator(token_map, **(settings | {"image_prefix": "<image>" * SLOTS} | more))


def all_tasks(samples: list[Sample], epoch: int = 0) -> list[tuple[Sample, Item]]:
    return [(each, Item(i, epoch, NAMES[i % 4])) for i, each in enumerate(samples)]


def check_row(batch: Batch, r: int, token_map: TokenMap) -> None:
    ids = batch.input_ids[r][batch.attention_mask[r].bool()].tolist()
    labels = batch.labels[r].tolist()
    start = next(t for t, label in enumerate(labels) if label != IGNORE)
    assert labels[start : len(ids)] == ids[start:]
    assert set(labels[:start] + labels[len(ids) :]) <= {IGNORE}
    assert ids[0] == token_map.bos_id
    assert ids[-1] == token_map.eos_id
    assert ids.count(token_map.image_id) == (SLOTS if TASKS[batch.tasks[r]].needs_image else 0)


def test_labels_positions_and_targets_belong_together(samples, token_map):
    batch = collator(token_map)(all_tasks(samples))
    assert batch.tasks == list(NAMES) * 2
    assert batch.pixel_values.shape == (8, 3, 32, 32)
    for r in range(8):
        check_row(batch, r, token_map)
    assert batch.masks.shape[0] == len(batch.mask_rows) == len(batch.mask_positions) > 0
    for row, position in zip(batch.mask_rows, batch.mask_positions):
        assert token_map.object_number(int(batch.input_ids[row, position])) is not None
    tags = sum(token_map.object_number(int(i)) is not None for i in batch.input_ids.flatten())
    assert tags == len(batch.masks)
    assert batch.masks.flatten(1).sum(1).min() > 0
    assert set(batch.masks.unique().tolist()) == {0.0, 1.0}
    assert [batch.tasks[r] for r in batch.gen_rows] == ["generation"] * 2
    assert (batch.input_ids[batch.gen_rows, batch.gen_positions] == token_map.gen_id).all()
    assert batch.counts() == (int((batch.labels != IGNORE).sum()), len(batch.masks), 2, {})
    assert batch.clip_targets is None


def test_masks_come_in_the_order_of_their_tags(samples, token_map):
    rows = [(each, Item(i, 0, "reasoning")) for i, each in enumerate(samples)]
    batch = collator(token_map)(rows)
    prompts = collator(token_map).prompts(rows)
    at = 0
    for reference in prompts.references:
        for mask in reference["masks"]:
            assert np.array_equal(batch.masks[at], rle.shrink(mask, 16))
            at += 1
    assert at == len(batch.masks)


def test_prompts_end_where_answers_begin(samples, token_map):
    batch = collator(token_map)(all_tasks(samples))
    prompts = collator(token_map).prompts(all_tasks(samples))
    for r in range(8):
        whole = batch.input_ids[r][batch.attention_mask[r].bool()].tolist()
        prompt = prompts.input_ids[r][prompts.attention_mask[r].bool()].tolist()
        assert prompt + prompts.answer_ids[r] == whole
        assert prompts.attention_mask[r, -1] == 1
        reference = prompts.references[r]
        assert reference["size"] == (samples[r].height, samples[r].width)
        assert [samples[r].objects[i].mask for i in reference["object_indices"]] == reference["masks"]
        assert [samples[r].objects[i].category for i in reference["object_indices"]] == reference["names"]


@pytest.mark.parametrize("limit", [{"max_length": 34}, {"max_objects": 1}])
def test_what_the_model_has_no_room_for_is_still_the_truth(samples, token_map, limit):
    sample = max(samples, key=lambda each: len(each.objects))
    tags = [f"quite a long name of a thing <OBJ-{i}>" for i in range(1, len(sample.objects) + 1)]
    sample = replace(sample, question="Which?", answer=" and ".join(tags))
    make = collator(token_map, **{name: n for name, n in limit.items() if name == "max_length"})
    if "max_objects" in limit:
        make.options = replace(make.options, max_objects=limit["max_objects"])
    rows = [(sample, Item(0, 0, "reasoning"))]
    (reference,) = make.prompts(rows).references
    assert len(make(rows).masks) < len(sample.objects) == len(reference["masks"]) == len(reference["names"])


@pytest.mark.parametrize("mask_tokens", ["inline", "end"])
@pytest.mark.parametrize("max_length", [34, 36, 40, 48, 64])
def test_truncation_never_splits_tags_from_targets(samples, token_map, mask_tokens, max_length):
    make = collator(token_map, max_length=max_length, mask_tokens=mask_tokens)
    batch = make(all_tasks(samples) + [(each, Item(i, 1, "reasoning")) for i, each in enumerate(samples)])
    assert batch.input_ids.shape[1] <= max_length
    assert not batch.skipped
    for r in range(len(batch.keys)):
        check_row(batch, r, token_map)
    tags = (batch.input_ids >= token_map.base_vocab) & (batch.input_ids < token_map.gen_id)
    assert int(tags.sum()) == len(batch.masks)
    assert len(batch.gen_rows) == 2


def test_too_little_room_is_refused(token_map):
    with pytest.raises(ValueError, match="max_length 20 leaves no room"):
        collator(token_map, max_length=20)


def test_words_between_the_slots(samples, token_map):
    batch = collator(token_map, image_prefix="c0 <image> c1 <image>")(all_tasks(samples)[:1])
    slots = (batch.input_ids[0] == token_map.image_id).nonzero().flatten().tolist()
    assert slots == [2, 4]


def test_damaged_samples_are_skipped_and_named(samples, token_map):
    broken = replace(samples[0], image=samples[0].image[:3000])
    batch = collator(token_map)([(broken, Item(0, 0, "caption")), (samples[1], Item(1, 0, "caption"))])
    assert batch.keys == [samples[1].key]
    assert len(batch.skipped) == 1
    assert samples[0].key in batch.skipped[0]
    empty = collator(token_map)([(broken, Item(0, 0, "caption"))], ["other: cut"])
    assert empty.input_ids.shape == (1, 1)
    assert empty.counts() == (0, 0, 0, {})
    assert empty.pixel_values.shape == (1, 3, 32, 32)
    assert len(empty.skipped) == 2
    assert int(empty.attention_mask.sum()) == 0


def test_clip_targets_come_from_the_samples(samples, token_map):
    vector = np.arange(4, dtype=np.float16)
    rows = [(replace(each, clip=vector + i), Item(i, 0, "generation")) for i, each in enumerate(samples[:3])]
    targets = collator(token_map)(rows).clip_targets
    assert targets is not None
    assert targets.dtype == torch.float32
    assert targets[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="pack them alike"):
        collator(token_map)([rows[0], (samples[1], Item(1, 0, "generation"))])


def test_moving_and_selecting():
    features = VisionFeatures(tokens=torch.rand(3, 5, 2), taps=(torch.rand(3, 5, 2),) * 2, embedding=torch.rand(3, 4))
    chosen = features.select(torch.tensor([2, 0, 2])).to("cpu", torch.float64)
    assert torch.equal(chosen.taps[1], features.taps[1][[2, 0, 2]].double())
    assert chosen.embedding.shape == (3, 4)


def same(one: Batch, two: Batch) -> bool:
    tensors = ("input_ids", "labels", "pixel_values", "masks", "mask_positions", "gen_rows")
    return one.keys == two.keys and all(torch.equal(getattr(one, name), getattr(two, name)) for name in tensors)


def test_ranks_micro_batches_and_workers_see_the_same_samples(samples, token_map):
    data, make = Listed(samples), collator(token_map)
    order = SampleOrder(len(samples), 0, 8, NAMES, EVEN)

    def seen(world: int, micro: int) -> list[tuple[str, str, list[int]]]:
        rows = []
        for step in range(3):
            for rank in range(world):
                steps = StepDataset(
                    data, order, make, rank=rank, world=world, micro_batch=micro, first_step=0, last_step=3
                )
                assert len(steps[step]) == 8 // world // micro
                for batch in steps[step]:
                    for r, key in enumerate(batch.keys):
                        ids = batch.input_ids[r][batch.attention_mask[r].bool()].tolist()
                        rows.append((key, batch.tasks[r], ids))
        return rows

    whole = seen(1, 8)
    assert sorted(key for key, *_ in whole) == sorted(each.key for each in samples for _ in range(3))
    assert whole == seen(1, 2) == seen(2, 4) == seen(8, 1)
    alone = [batch for _, step in build_loader(data, order, make, micro_batch=4, last_step=3) for batch in step]
    many = list(build_loader(data, order, make, micro_batch=4, first_step=1, last_step=3, num_workers=2))
    assert [step for step, _ in many] == [1, 2]
    assert all(same(a, b) for a, b in zip(alone[2:], [batch for _, step in many for batch in step], strict=True))
    with pytest.raises(ValueError, match="choose a multiple of 15"):
        StepDataset(data, order, make, rank=0, world=3, micro_batch=5, first_step=0, last_step=1)


def test_too_many_bad_samples_stop_the_run(samples, token_map):
    order = SampleOrder(len(samples), 0, 8, NAMES, EVEN)
    data, make = Listed(samples, bad=(3,)), collator(token_map)
    loader = build_loader(data, order, make, micro_batch=8, last_step=3, max_bad_share=0.02)
    assert [len(step[0].keys) for _, step in loader] == [7, 7, 7]
    assert (loader.seen, loader.skipped) == (24, 3)
    strict = build_loader(data, order, make, micro_batch=8, last_step=3, max_bad_share=0.01)
    with pytest.raises(ValueError, match=f"3 of 24 samples could not be read.*{samples[3].key}: cut"):
        list(strict)


def test_scoring_sees_every_sample_once_for_each_task(samples, token_map):
    data, make = Listed(samples), collator(token_map)
    for world in (1, 3):
        seen: list[tuple[str, str]] = []
        for rank in range(world):
            loader = EvalLoader(data, make, tasks=NAMES, rank=rank, world=world, batch_size=3)
            for batch in loader:
                seen += zip(batch.tasks, batch.keys, strict=True)
                assert len(batch.keys) <= 3
                assert [samples[reference["index"]].key for reference in batch.references] == batch.keys
        assert sorted(seen) == sorted((task, each.key) for task in NAMES for each in samples)
    mute = Listed([replace(samples[0], question="", answer=""), samples[1]])
    assert [b.keys for b in EvalLoader(mute, make, tasks=("reasoning",), batch_size=4)] == [[samples[1].key]]
    assert sum(len(b.keys) for b in EvalLoader(data, make, tasks=("caption",), batch_size=4, limit=5)) == 5
