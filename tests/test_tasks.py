"""What is asked and what the right answer is; samples are made here."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.data import rle
from pipeline.data.order import keyed_rng
from pipeline.data.schema import ObjectRecord, Sample
from pipeline.data.tasks import TASKS, TaskOptions, renumber, resolve


def sample(n: int = 5, **more: object) -> Sample:
    mask = rle.encode(np.eye(8))
    names = ["dog", "cat", "cup", "car", "bus", "hat", "bee", "pan", "pen"][:n]
    objects = tuple(
        ObjectRecord(phrases=(f"{name} a", f"{name} b"), box=(0, 0, 8, 8), mask=mask, category=name) for name in names
    )
    facts = {"caption": "A dog.", "question": "Which?", "answer": "The cup <OBJ-3> and the dog <OBJ-1>."} | more
    return Sample(key="k", image=b"x", image_format="jpg", height=8, width=8, objects=objects, source="t", **facts)


@pytest.mark.parametrize(
    ("answer", "inline", "end", "objects"),
    [
        ("The b <OBJ-2>, a <OBJ-1>.", "The b <OBJ-1>, a <OBJ-2>.", "The b, a. <OBJ-1> <OBJ-2>", (1, 0)),
        ("A <OBJ-4> is <OBJ-4> it.", "A <OBJ-1> is it.", "A is it. <OBJ-1>", (3,)),
        ("<OBJ-5> it is.", "<OBJ-1> it is.", "it is. <OBJ-1>", (4,)),
        ("Nothing <GEN>.", "Nothing.", "Nothing.", ()),
        ("a <OBJ-1> b <OBJ-2> c <OBJ-3> d <OBJ-1>", "a <OBJ-1> b <OBJ-2> c d", "a b c d <OBJ-1> <OBJ-2>", (0, 1, 2)),
    ],
)
def test_tags_are_renumbered_and_each_object_keeps_one(answer, inline, end, objects):
    assert renumber(answer, TaskOptions(max_objects=2)) == (inline, objects)
    assert renumber(answer, TaskOptions(max_objects=2, mask_tokens="end")) == (end, objects)


def test_reasoning_asks_the_sample_s_own_question():
    text = TASKS["reasoning"].build(sample(question="Which <image> one?"), keyed_rng(0), TaskOptions())
    assert text.prompt == "Which one?"
    assert text.answer == "The cup <OBJ-1> and the dog <OBJ-2>."
    assert text.object_indices == (2, 0)


def test_referring_names_and_marks_what_it_asks_for():
    counts = set()
    for draw in range(60):
        text = TASKS["referring"].build(sample(), keyed_rng(draw), TaskOptions())
        names = [sample().objects[i].category for i in text.object_indices]
        counts.add(len(names))
        assert re.findall(r"the (\w+) <OBJ-(\d)>", text.answer) == [(n, str(i)) for i, n in enumerate(names, 1)]
        assert text.answer.endswith(">.")
        assert all(phrase in text.prompt for phrase in text.reference["phrases"])
        assert [phrase[:3] for phrase in text.reference["phrases"]] == names
    assert counts == {1, 2, 3}
    few = [TASKS["referring"].build(sample(9), keyed_rng(d), TaskOptions(max_objects=2)) for d in range(30)]
    assert {len(text.object_indices) for text in few} == {1, 2}


def test_the_same_generator_asks_the_same():
    for task in TASKS.values():
        one, two = (task.build(sample(), keyed_rng("a", 7), TaskOptions()) for _ in range(2))
        assert one == two


def test_caption_and_generation():
    odd = sample(caption="A {caption} of <GEN> a dog.")
    caption = TASKS["caption"].build(odd, keyed_rng(0), TaskOptions())
    assert (caption.answer, caption.wants_picture) == ("A {caption} of a dog.", False)
    picture = TASKS["generation"].build(odd, keyed_rng(0), TaskOptions())
    assert (picture.answer, picture.wants_picture) == ("<GEN>", True)
    assert picture.prompt.count("A {caption} of a dog.") == 1
    assert [task.needs_image for task in TASKS.values()] == [True, True, True, False]


def test_a_sample_without_a_task_falls_to_the_next_one_allowed():
    mute = sample(question="", answer="")
    assert resolve(mute, "reasoning", tuple(TASKS)).name == "referring"
    assert resolve(mute, "reasoning", ("reasoning", "caption")).name == "caption"
    assert resolve(sample(0, question="", answer=""), "referring", tuple(TASKS)).name == "caption"
    assert resolve(sample(caption=""), "generation", tuple(TASKS)).name == "reasoning"
    with pytest.raises(ValueError, match="nothing for any of the tasks reasoning"):
        resolve(mute, "reasoning", ("reasoning",))


def test_impossible_options_are_refused():
    for options in ({"referring_objects": 0}, {"max_objects": 0}, {"mask_tokens": "start"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            TaskOptions(**options)
