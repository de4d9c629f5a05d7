"""Which objects a text names: F1 of a caption's objects, and whether an answer names the right ones.

A mask may be right by luck and a fluent caption may be about the wrong things; these scores read the words. How a text
is read is the caller's: `parse(text)` returns the objects that it names, as anything hashable, e.g. ("red", "circle")
for "a small red circle". Two equal objects in one picture count twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

Parse = Callable[[str], Iterable[Hashable]]


def read_counts(
    predicted: Sequence[Iterable[Hashable]], gold: Sequence[Iterable[Hashable]]
) -> list[tuple[int, int, int]]:
    """Per sample (named, there, right): objects named, objects there, and how many of the named are there."""
    pairs = [(Counter(some), Counter(true)) for some, true in zip(predicted, gold, strict=True)]
    return [(some.total(), true.total(), (some & true).total()) for some, true in pairs]


def object_f1(predicted: Sequence[Iterable[Hashable]], gold: Sequence[Iterable[Hashable]]) -> dict[str, Any]:
    """Precision, recall and F1 of named objects, counted over all samples together.

    predicted, gold: per sample the objects named and the objects there (as multisets).
    Returns precision, recall, f1 in [0,1] (None where nothing is there to count) and the counts named, there, right.
    """
    if len(predicted) != len(gold):
        raise ValueError(f"{len(predicted)} samples of predictions for {len(gold)} samples of truth")
    counts = read_counts(predicted, gold)
    named, there, right = (sum(column) for column in zip(*counts)) if counts else (0, 0, 0)
    return {
        "precision": right / named if named else None,
        "recall": right / there if there else None,
        "f1": 2 * right / (named + there) if named + there else None,
        "named": named,
        "there": there,
        "right": right,
    }


def caption_object_f1(captions: Sequence[str], gold: Sequence[Iterable[Hashable]], parse: Parse) -> dict[str, Any]:
    """`object_f1` of captions read by `parse` against the objects of their pictures."""
    return object_f1([list(parse(caption)) for caption in captions], gold)


def right_object_accuracy(answers: Sequence[str], gold: Sequence[Iterable[Hashable]], parse: Parse) -> dict[str, Any]:
    """Share of answers that name exactly the right objects: all of them, nothing else, in any order.

    Returns accuracy (None for no answers), right and samples.
    """
    if len(answers) != len(gold):
        raise ValueError(f"{len(answers)} answers for {len(gold)} samples of truth")
    right = sum(Counter(parse(answer)) == Counter(true) for answer, true in zip(answers, gold, strict=True))
    return {"accuracy": right / len(answers) if answers else None, "right": right, "samples": len(answers)}
