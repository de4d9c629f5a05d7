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
FILLED = 0.95
"""Share of a packed row's tokens that are used. An assumption."""


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

    answers: share of the text that is labelled. masks, pictures: means of a sample. row_tokens: limit of a row, and
    the length of packed ones.
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
    row_tokens: int = 512
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
        longest = min(self.image_tokens + math.ceil(LONGEST * self.text_tokens), self.row_tokens)
        if self.packed:
            rows = max(1, math.ceil(samples * self.tokens / (FILLED * self.row_tokens)))
            tokens, share = self.row_tokens, samples * self.tokens / FILLED / (rows * self.row_tokens)
        else:
            rows, tokens = samples, longest
            # Alone, a sample is as long as itself; together, all are as long as the longest, nearly always a picture's.
            share = (self.tokens if samples == 1 else longest) / longest
        size = Pass(
            rows=rows,
            tokens=tokens,
            labelled=round(self.answers * self.text_tokens * samples),
            masks=math.ceil(self.masks * samples),
            pictures=math.ceil(self.pictures * samples),
        )
        return size, share
