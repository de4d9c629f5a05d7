"""The work of a run in numbers: samples, tokens of a sample, how a global batch is cut into passes.

Lengths are means that a user may set. Those of the defaults: LLaMA-2 needs 257 tokens for a picture (CLIP ViT-L/14 at
224 pixels) and about 110 for question and answer, as the paper counts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MMUD_TRAIN = 33_682
"""Pictures of MMUD's training split."""

LONGEST = 1.3
"""Longest text of a padded micro-batch over the mean. Of 76 MMUD-like rows with 20 words of frame it was 1.1 for two,
1.2 for four, 1.3 for twelve: an assumption for MMUD as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One micro-batch: `rows` rows of `tokens` each; of all rows together answer tokens, masks, pictures to draw."""

    rows: int
    tokens: int
    labelled: int
    masks: int
    pictures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """samples: of one epoch. *_tokens: means of a sample. pictured: share of samples with a picture in the prompt.

    answers: share of the text that is labelled. masks, pictures: means of a sample. max_tokens: limit of a sample.
    packed: samples lie end to end without padding, each attended to alone.
    """

    samples: int = MMUD_TRAIN
    epochs: float = 10.0
    global_batch: int = 12
    image_tokens: int = 257
    text_tokens: float = 110.0
    pictured: float = 0.75
    answers: float = 0.5
    masks: float = 1.0
    pictures: float = 0.25
    max_tokens: int = 512
    packed: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, math.ceil(round(self.epochs * self.samples / self.global_batch, 6)))

    @property
    def tokens(self) -> float:
        """Mean tokens of a sample that are no padding."""
        return self.image_tokens * self.pictured + self.text_tokens

    def passed(self, samples: int) -> tuple[Pass, float]:
        """The largest pass that `samples` samples make, and the mean share of its operations that are done.

        Memory is what the largest pass needs; time is what the mean one does.
        """
        longest = LONGEST * self.text_tokens if not self.packed or samples == 1 else self.text_tokens
        tokens = min(self.image_tokens + math.ceil(longest), self.max_tokens)
        # A sample that is alone or packed is as long as itself; padded ones are as long as the longest, nearly always
        # one with a picture. Packed samples do the work of as many rows of their own lengths.
        share = self.tokens / tokens if samples == 1 or self.packed else 1.0
        size = Pass(
            rows=samples,
            tokens=tokens,
            labelled=round(self.answers * self.text_tokens * samples),
            masks=math.ceil(self.masks * samples),
            pictures=math.ceil(self.pictures * samples),
        )
        return size, share
