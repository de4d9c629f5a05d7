"""Every sentence the model is asked with, in one place.

A dialogue reads `Question: ... Answer: ...`. The prompt part ends at the colon and the answer brings its own space, so
that prompt and answer may be tokenised apart and give the same ids as together.
"""

from collections.abc import Sequence

IMAGE_SLOT = "<image>"
CAPTION = ("Describe the picture.", "What does the picture show?", "Write a caption for the picture.")
REFERRING = ("Segment {phrases}.", "Find {phrases} in the picture.", "Where is {phrases}?")
GENERATION = ("Draw {caption}", "Paint a picture of {caption}", "Generate the picture: {caption}")

QUESTION_HEAD = "Question: "
ANSWER_HEAD = " Answer:"


def join_phrases(phrases: Sequence[str]) -> str:
    """English enumeration: "a", "a and b", "a, b and c"."""
    if not phrases:
        raise ValueError("no phrases to join")
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def dialogue(question: str) -> str:
    """The text before the answer."""
    return QUESTION_HEAD + question + ANSWER_HEAD


def image_prefix(template: str, image_tokens: int) -> str:
    """The text that holds the picture's slots: `template`, or `image_tokens` bare slots if it is empty.

    A template may put words between the slots, e.g. "c00 <image> c01 <image> ...". ValueError if it has another number
    of slots than the vision tower gives tokens.
    """
    text = template or IMAGE_SLOT * image_tokens
    slots = text.count(IMAGE_SLOT)
    if slots != image_tokens:
        raise ValueError(
            f"image_prefix holds {slots} {IMAGE_SLOT} slots but the picture gives {image_tokens} tokens: "
            f"put {image_tokens} slots there, or leave image_prefix empty"
        )
    return text
