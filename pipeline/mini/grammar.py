"""The words of the mini world: attributes, names, places, captions, and the text map that its LLM was pretrained on.

Every sentence that a scene can produce is made of `VOCABULARY`, so the mini LLM and the mini CLIP share one word-level
tokenizer of that vocabulary.
"""

from __future__ import annotations

import re

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross")
GRID = 4
"""The text map cuts a picture into GRID x GRID cells, named c<row><column> from the top left."""

CELL_WORDS = tuple(f"c{row}{column}" for row in range(GRID) for column in range(GRID))
EMPTY_CELL = "_"
IMAGE_PREFIX = " ".join(f"{word} <image>" for word in CELL_WORDS)
"""The image prefix of the mini preset: each merged patch token stands behind the word that names its cell."""

COLOUR_CLUES = {
    "red": "blood",
    "green": "grass",
    "blue": "the sky",
    "yellow": "a lemon",
    "purple": "a plum",
    "white": "snow",
}
SHAPE_CLUES = {
    "circle": "could roll away",
    "square": "looks like a box",
    "triangle": "looks like a roof",
    "star": "shines at night",
    "cross": "looks like a plus sign",
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")

Name = tuple[str, str, str]
"""(size, colour, shape) of an object."""

ALL_NAMES: tuple[Name, ...] = tuple((s, c, h) for s in SIZES for c in COLOURS for h in SHAPES)


def map_word(name: Name) -> str:
    """The single token that stands for an object in the text map, such as "small-red-circle"."""
    return "-".join(name)


_NAME = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def names_in(text: str) -> list[Name]:
    """The full object names (size, colour, shape) that a text mentions, in order.

    Args:
        text: a caption or an answer, with or without task tokens.
    """
    return [(m[1], m[2], m[3]) for m in _NAME.finditer(text.lower())]


_OTHER_WORDS = """
a an the of at is are it they in on and to zero one two three four there what where which object objects
looks like how many top bottom left right half farthest highest lowest same colour shape has have lies only
question answer describe picture show does write caption for segment find draw paint generate
blood grass sky lemon plum snow could roll away box roof shines night plus sign
"""

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *SPECIAL_TOKENS,
            *(",", ".", "?", ":", EMPTY_CELL),
            *CELL_WORDS,
            *SIZES,
            *COLOURS,
            *SHAPES,
            *(plural for shape in SHAPES for plural in [shape + "es" if shape == "cross" else shape + "s"]),
            *_OTHER_WORDS.split(),
            *(map_word(name) for name in ALL_NAMES),
        ]
    )
)
"""All tokens of the mini tokenizer; the index is the id."""


def plural(shape: str) -> str:
    """ "circle" -> "circles", "cross" -> "crosses"."""
    return shape + ("es" if shape.endswith("s") else "s")


def colour_shapes_in(text: str) -> list[tuple[str, str]]:
    """(colour, shape) of the objects that a text names in full, in order."""
    return [(colour, shape) for _, colour, shape in names_in(text)]
