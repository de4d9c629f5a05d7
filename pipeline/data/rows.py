"""Where the sequences of a micro-batch stand in its tensors: one to a padded row, or several packed into one.

Both layouts are told to the model in the same way, by the sample and the position of each token. Attention goes by the
positions, as transformers' DataCollatorWithFlattening has it: a position that does not follow the one before it begins
another sequence, which sees nothing of the earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import NO_SAMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tokens' tensors, each [B,T] long, and the place (row, position) of each sequence's first token."""

    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    starts: tuple[tuple[int, int], ...]


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `budget`: the longest first, each into the first bin it fits in.

    One that is longer than the budget has a bin of its own. First-fit decreasing needs at most 11/9 of the fewest bins
    possible, plus 6/9 (Dosa 2007). Within a bin, and among bins by their first index, the order of the input is kept.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, left in enumerate(room) if lengths[i] <= left), None)
        if at is None:
            bins.append([i])
            room.append(budget - lengths[i])
        else:
            bins[at].append(i)
            room[at] -= lengths[i]
    return sorted(sorted(each) for each in bins)


def lay_out(sequences: Sequence[Sequence[int]], *, pad_id: int, budget: int | None = None) -> Layout:
    """Sequences (token ids, none empty) as rows. budget: tokens of a packed row at most, 0 for all sequences in one
    row; None gives each a padded row of its own.

    Padding stands at the ends of rows and goes on counting positions from the last sequence there: it is seen by no
    token, and rows of one sequence keep the plain causal mask.
    """
    lengths = [len(ids) for ids in sequences]
    assert lengths and min(lengths) > 0, lengths
    rows = [[i] for i in range(len(lengths))]
    if budget is not None:
        rows = first_fit_decreasing(lengths, budget or sum(lengths))
    width = max(sum(lengths[i] for i in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    segment_ids = torch.full_like(input_ids, NO_SAMPLE)
    position_ids = torch.zeros_like(input_ids)
    starts: dict[int, tuple[int, int]] = {}
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            starts[i] = (r, at)
            end = at + lengths[i]
            input_ids[r, at:end] = torch.tensor(sequences[i])
            segment_ids[r, at:end] = i
            position_ids[r, at:] = torch.arange(width - at)
            at = end
    return Layout(
        input_ids=input_ids,
        segment_ids=segment_ids,
        position_ids=position_ids,
        starts=tuple(starts[i] for i in range(len(lengths))),
    )
