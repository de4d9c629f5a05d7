"""Which words of an answer an <OBJ-i> stands for.

The model writes a tag behind the words that mention its object: "It is the large red circle <OBJ-1>, left of ...". The
phrase begins with the first determiner behind the last verb of being, comma or "and the" before the tag (and behind the
tag before); without a determiner it is all of those words.
Tags that follow no words of their own (all at the end of an answer, as the released code has them) have no phrase.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"\s*<(?:OBJ-(\d+)|GEN)>")
_DETERMINERS = "the|a|an|this|that|these|those|its|his|her|their|one|two|three|four|five|each|every|some"
_BREAK = re.compile(
    rf"[.,;:!?()]\s|\b(?:is|are|was|were|be|has|have)\s|\b(?:and|or)\s(?=(?:{_DETERMINERS})\s)", re.IGNORECASE
)
_DETERMINER = re.compile(rf"\b(?:{_DETERMINERS})\s", re.IGNORECASE)
_LEADING = re.compile(r"^(?:\W|\b(?:and|or)\b)+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Mention:
    """number: i of the tag. span: (start, end) of its phrase in the text without tags; None where it has none."""

    number: int
    span: tuple[int, int] | None


def read_answer(tagged: str) -> tuple[str, list[Mention]]:
    """(the answer without its tags, the first mention of each <OBJ-i> in order)."""
    text, mentions, seen = "", [], set()
    start, position = 0, 0
    for tag in _TAG.finditer(tagged):
        text += tagged[position : tag.start()]
        position = tag.end()
        number = int(tag[1]) if tag[1] else None
        if number is not None and number not in seen:
            seen.add(number)
            mentions.append(Mention(number, _phrase(text, start)))
        start = len(text)
    return text + tagged[position:], mentions


def _phrase(text: str, start: int) -> tuple[int, int] | None:
    """The span of the phrase that ends with `text`, not before `start`."""
    start += max((found.end() for found in _BREAK.finditer(text[start:])), default=0)
    if determiner := _DETERMINER.search(text, start):
        start = determiner.start()
    elif leading := _LEADING.match(text[start:]):
        start += leading.end()
    end = start + len(text[start:].rstrip())
    return (start, end) if re.search(r"\w", text[start:end]) else None
