"""The Evaluator on answers that are known, and what "shuffled" and full-size masks mean. The script: test_train.py."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import rle
from pipeline.data.batch import VisionFeatures
from pipeline.data.schema import ObjectRecord, Sample
from pipeline.model.generation import Generation
from pipeline.runtime.evaluator import EachPhrase, Evaluator, OtherPictures, full_masks
from pipeline.runtime.ranks import Ranks
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.predictions import Prediction
from pipeline.scoring.report import build_report
from pipeline.scoring.scores import SCORES
from pipeline.scoring.suite import GROUP, Rules, Scored, score_predictions

TASKS = ("reasoning", "referring", "caption", "generation")
SIDE = 8


class Split:
    """n samples without objects, sample i with the picture bytes `picture i`."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def key(self, i: int) -> str:
        return f"s{i}"

    def __getitem__(self, i: int) -> Sample:
        return Sample(
            key=f"s{i}",
            image=f"picture {i}".encode(),
            image_format="png" if i % 2 else "jpg",
            height=6,
            width=8,
            caption=f"caption {i}",
            question="",
            answer="",
            objects=(),
            clip=np.full(3, i, np.float16),
            source="test",
        )


@pytest.mark.parametrize("n", [2, 5, 6])
def test_shuffled_shows_every_question_another_picture(n: int) -> None:
    split, other = Split(n), OtherPictures(Split(n))
    assert len(other) == n
    assert sorted(other.partner(i) for i in range(n)) == list(range(n))
    for i in range(n):
        j = other.partner(i)
        assert j != i
        sample = other[i]
        assert (sample.key, sample.caption, other.key(i)) == (f"s{i}", f"caption {i}", f"s{i}")
        assert (sample.image, sample.image_format) == (split[j].image, split[j].image_format)
        assert sample.clip is not None and sample.clip[0] == j


def test_masks_come_at_full_size_by_their_token_number() -> None:
    left = torch.full((4, 4), -5.0)
    left[:, :2] = 5.0
    answer = Generation(ids=[], object_numbers=[3, 1], mask_logits=torch.stack([left, -left]))
    masks = full_masks(answer, (6, 10))
    assert [mask is None for mask in masks] == [False, True, False]
    first, third = rle.decode(masks[0]), rle.decode(masks[2])  # type: ignore[arg-type]
    assert first.shape == (6, 10)
    assert third[:, :5].all() and not third[:, 5:].any()
    assert np.array_equal(first, 1 - third)
    assert full_masks(Generation(ids=[1, 2]), (6, 10)) == []
    # A logit of exactly 0 is no mask.
    none = full_masks(Generation(ids=[], object_numbers=[1], mask_logits=torch.zeros(1, 4, 4)), (6, 10))
    assert not rle.decode(none[0]).any()  # type: ignore[arg-type]


class Colours:
    """A CLIP whose embedding of a picture is its mean colour, and of a text the colour that the text's number names."""

    image_size, mean, std = SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, pixels: torch.Tensor) -> VisionFeatures:
        none = torch.zeros(len(pixels), 1, 1)
        return VisionFeatures(tokens=none, taps=(), embedding=pixels.mean(dim=(2, 3)))

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([colour(int(text.split()[-1])) for text in texts]) / 255


def colour(number: int) -> tuple[float, float, float]:
    angle = 2 * np.pi * number / 60
    return tuple(float(round(128 + 100 * np.cos(angle + shift))) for shift in (0, 2, 4))  # type: ignore[return-value]


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in colour(number))).save(file, "PNG")
    return file.getvalue()


class Drawn(Split):
    """n samples that show their colour."""

    def __getitem__(self, i: int) -> Sample:
        return dataclasses.replace(super().__getitem__(i), image=picture(i))


def evaluator(tasks: Sequence[str] = TASKS, *, painter: Any = None) -> Evaluator:
    unused: Any = SimpleNamespace()
    return Evaluator(
        tuner=unused,
        vision=Colours(),  # type: ignore[arg-type]
        token_map=unused,
        collator=unused,
        dataset=Drawn(60),
        painter=painter,
        tasks=tasks,
        ranks=Ranks(0, 0, 1, torch.device("cpu")),
        batch_size=2,
        max_new_tokens=4,
    )


def score(found: Evaluator, answers: list[Prediction], condition: str, parse: Any = None) -> Scored:
    """The scores of answers, with the features that the evaluator gives them."""
    rules = Rules(tasks=found.tasks, bootstrap=Bootstrap(20), full_name=parse, colour_shape=parse)
    return score_predictions(answers, found.picture_features(answers), rules, condition)


def mask(rows: slice) -> dict[str, Any]:
    grid = np.zeros((6, 8), np.uint8)
    grid[rows] = 1
    return rle.encode(grid)


def segmentation(task: str, text: str, masks: list[Any], true: list[Any], names: list[str]) -> Prediction:
    return Prediction(key="s", task=task, text=text, masks=masks, reference={"masks": true, "names": names})


def test_scores_of_known_answers() -> None:
    top, low = mask(slice(0, 3)), mask(slice(3, 6))

    def words(text: str) -> list[str]:
        return [word for word in text.split() if word in ("dog", "cat")]

    answers = [
        # Both right, in the other order; one right and one missed; nothing said.
        segmentation("referring", "the cat and the dog", [low, top], [top, low], ["dog", "cat"]),
        segmentation("referring", "the dog", [top, None], [top, low], ["dog", "cat"]),
        segmentation("referring", "", [], [top], ["dog"]),
        segmentation("reasoning", "the cat", [low], [top], ["dog"]),
        Prediction(key="a", task="caption", text="a dog by a cat", masks=[], reference={"caption": "a dog by a cat"}),
        Prediction(key="b", task="caption", text="a dog on grass", masks=[], reference={"caption": "a cat on grass"}),
    ]
    scores = score(evaluator(), answers, "tuned", words).figures
    assert set(scores) == set(SCORES)
    assert scores["referring_miou"] == pytest.approx(3 / 5)
    assert scores["referring_oiou"] == pytest.approx(3 / 5)
    assert scores["referring_object_accuracy"] == pytest.approx(1 / 3)
    assert scores["reasoning_miou"] == 0
    assert scores["reasoning_object_accuracy"] == 0
    assert scores["caption_object_f1"] == pytest.approx(2 / 3)
    assert 0.3 < scores["caption_bleu4"] < 1
    assert scores["picture_clip_cosine"] is None


def test_a_task_without_answers_has_no_score() -> None:
    for tasks in (("caption",), TASKS):
        scores = score(evaluator(tasks, painter=SimpleNamespace()), [], "tuned").figures
        assert set(scores) == set(SCORES)
        assert set(scores.values()) == {None}
        build_report({"tuned": scores}, {"samples": {}, "seconds": {}, "versions": {}, "commit": None})


def pictures(n: int, *, grey: bool = False) -> list[Prediction]:
    return [
        Prediction(
            key=str(i),
            task="generation",
            text="<GEN>",
            masks=[],
            reference={"caption": f"colour {i}", "index": i},
            picture=None if grey else picture(i),
        )
        for i in range(n)
    ]


def test_pictures_find_their_text_and_shuffled_ones_do_not() -> None:
    scorer, some = evaluator(painter=SimpleNamespace()), pictures(60)
    tuned, shuffled = (score(scorer, some, condition).figures for condition in ("tuned", "shuffled"))
    name = f"picture_text_r1_of_{GROUP}"
    assert tuned[name] > 0.9
    assert shuffled[name] < 0.1
    assert tuned["picture_clip_cosine"] > 0.99 > shuffled["picture_clip_cosine"]
    # Answers without <GEN> have one grey picture, which finds no text better than chance.
    assert score(scorer, pictures(60, grey=True), "untuned").figures[name] < 0.1
    # The drawn pictures are the true ones; grey ones are far from them.
    assert tuned["picture_clip_frechet"] == pytest.approx(0, abs=1e-4)
    assert score(scorer, pictures(60, grey=True), "untuned").figures["picture_clip_frechet"] > 0.05
    assert shuffled["picture_clip_frechet"] is None
    # Among fewer texts the figure would be another one.
    few = score(scorer, pictures(8), "tuned").figures
    assert few[name] is None
    assert few["picture_clip_cosine"] > 0.99


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="protocol must be one of free-running, teacher-forced"):
        evaluator().predict("tuned", "greedy")


def test_each_phrase_is_a_sample_of_its_own() -> None:
    def thing(*phrases: str) -> ObjectRecord:
        return ObjectRecord(phrases=phrases, box=(0, 0, 1, 1), mask=mask(slice(0, 1)), category=phrases[0])

    class Two(Split):
        def __getitem__(self, i: int) -> Sample:
            objects = ((thing("dog", "the pet"), thing("cat")), (thing("sea"),))[i]
            return dataclasses.replace(super().__getitem__(i), objects=objects, question="q", answer="a <OBJ-1>")

    each = EachPhrase(Two(2))
    found = [each[i] for i in range(len(each))]
    assert [s.objects[0].phrases for s in found] == [("dog",), ("the pet",), ("cat",), ("sea",)]
    assert [s.key for s in found] == [each.key(i) for i in range(4)] == ["s0-0-0", "s0-0-1", "s0-1-0", "s1-0-0"]
    assert {(len(s.objects), s.question) for s in found} == {(1, "")}


def test_a_sample_that_cannot_be_read_has_no_phrases_and_is_counted() -> None:
    class Damaged(Split):
        def __getitem__(self, i: int) -> Sample:
            if i == 0:
                raise ValueError("no picture")
            one = ObjectRecord(phrases=("dog",), box=(0, 0, 1, 1), mask=mask(slice(0, 1)), category="dog")
            return dataclasses.replace(super().__getitem__(i), objects=(one,))

    each = EachPhrase(Damaged(2))
    assert [each.key(i) for i in range(len(each))] == ["s1-0-0"]
    assert each.skipped == ["s0: no picture"]


def test_shuffled_takes_over_the_pictures_that_were_drawn_from_text() -> None:
    scorer = evaluator(("generation",), painter=SimpleNamespace())
    scorer._drawn = pictures(3)
    assert scorer.predict("shuffled") == scorer._drawn
