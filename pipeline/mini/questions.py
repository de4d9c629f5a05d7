"""What the mini world asks of a scene: referring phrases and reasoning question-answers.

A referring phrase is true of one object only. A reasoning question never names its object by colour and shape: the
answer depends on the picture (where things lie, what they share, what they are like, how many there are).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pipeline.data.prompts import join_phrases
from pipeline.mini import grammar
from pipeline.mini.scenes import Scene, Shape


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A reasoning question; the answer names its objects with <OBJ-i> tags (i counts `scene.objects` from 1)."""

    family: str
    question: str
    answer: str
    objects: tuple[int, ...]


def referring_phrases(scene: Scene, index: int) -> list[str]:
    """Phrases true of `scene.objects[index]` alone, those that name its colour and its shape first."""
    o = scene.objects[index]
    candidates = [
        (f"the {o.colour} {o.shape}", lambda p: (p.colour, p.shape) == (o.colour, o.shape)),
        (f"the {o.size} {o.colour} {o.shape}", lambda p: p.name == o.name),
        (f"the {o.size} {o.shape}", lambda p: (p.size, p.shape) == (o.size, o.shape)),
        (f"the {o.colour} object at the {o.place}", lambda p: (p.colour, p.place) == (o.colour, o.place)),
        (f"the {o.shape} at the {o.place}", lambda p: (p.shape, p.place) == (o.shape, o.place)),
    ]
    unique = [phrase for phrase, holds in candidates if sum(map(holds, scene.objects)) == 1]
    return unique[:3]


def _named(scene: Scene, indices: list[int]) -> str:
    return join_phrases([f"the {scene.objects[i].text} <OBJ-{i + 1}>" for i in indices])


def questions(scene: Scene) -> list[QuestionAnswer]:
    """Every question of every family that has one clear answer in this scene."""
    objects = scene.objects
    found: list[QuestionAnswer] = []

    def ask(family: str, question: str, indices: list[int], lead: str = "It is") -> None:
        text = f"{lead} {_named(scene, indices)}."
        found.append(QuestionAnswer(family, question, text, tuple(indices)))

    columns, rows = [o.column for o in objects], [o.row for o in objects]
    for question, values, best in (
        ("Which object is farthest to the left?", columns, min(columns)),
        ("Which object is farthest to the right?", columns, max(columns)),
        ("Which object is highest?", rows, min(rows)),
        ("Which object is lowest?", rows, max(rows)),
    ):
        if values.count(best) == 1:
            ask("extreme", question, [values.index(best)])

    colours, shapes, sizes = ([getattr(o, name) for o in objects] for name in ("colour", "shape", "size"))
    for i, o in enumerate(objects):
        if colours.count(o.colour) == 1:
            ask("colour clue", f"Which object has the colour of {grammar.COLOUR_CLUES[o.colour]}?", [i])
        if shapes.count(o.shape) == 1:
            ask("shape clue", f"Which object {grammar.SHAPE_CLUES[o.shape]}?", [i])
        if len(objects) > 2 and sizes.count(o.size) == 1:
            ask("odd one", f"Which is the only {o.size} object?", [i])

    for attribute, values in (("colour", colours), ("shape", shapes)):
        pairs = [v for v, count in Counter(values).items() if count == 2]
        if len(pairs) == 1 and max(Counter(values).values()) == 2:
            same = [i for i, v in enumerate(values) if v == pairs[0]]
            ask("same", f"Which two objects have the same {attribute}?", same, lead="They are")

    for shape, count in Counter(shapes).items():
        if count <= 2:
            same = [i for i, s in enumerate(shapes) if s == shape]
            lead = grammar.NUMBER_WORDS[count].capitalize() + ":"
            ask("count", f"How many {grammar.plural(shape)} are there?", same, lead=lead)

    for side, holds in (
        ("left", lambda o: o.column < grammar.GRID // 2),
        ("right", lambda o: o.column >= grammar.GRID // 2),
        ("top", lambda o: o.row < grammar.GRID // 2),
        ("bottom", lambda o: o.row >= grammar.GRID // 2),
    ):
        inside = [i for i, o in enumerate(objects) if holds(o)]
        if 1 <= len(inside) <= 2 and len(inside) < len(objects):
            ask("side", f"What lies in the {side} half?", inside, lead="It is" if len(inside) == 1 else "They are")
    return found


def choose_question(scene: Scene, rng: np.random.Generator) -> QuestionAnswer:
    """One question for the scene: first a family, so that frequent ones do not crowd out the rest, then a question."""
    every = questions(scene)
    families = sorted({qa.family for qa in every})
    family = families[rng.integers(len(families))]
    candidates = [qa for qa in every if qa.family == family]
    return candidates[rng.integers(len(candidates))]


def shares_attribute(scene: Scene, o: Shape, phrase: str) -> bool:
    """Whether another object has the colour or the shape that a referring phrase asks for."""
    asked = set(phrase.split())
    return any(p is not o and bool(asked & {p.colour, p.shape}) for p in scene.objects)
