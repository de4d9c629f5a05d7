"""What the tuned model says and shows for a prompt, and the bookkeeping between token ids and the decoders' states.

Shape suffixes: B rows, P pictures, T tokens, L answer tokens, D hidden, K masks of one row, S mask side, H and W a
picture's height and width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache


@dataclass(kw_only=True)
class Generation:
    """One row's answer.

    ids: the answer's ids before the end token; free-running, what the model wrote; teacher-forced, its most likely id
    at each place of the right answer, up to that answer's end. object_numbers: i of each decoded <OBJ-i>, in order of
    first mention. object_chances: the model's probability of each of these tokens where it wrote it. mask_logits
    [K,S,S] fp32 in that order, None without any. embedding [E] fp32, None without <GEN>.
    """

    ids: list[int]
    object_numbers: list[int] = field(default_factory=list)
    object_chances: list[float] = field(default_factory=list)
    mask_logits: Tensor | None = None
    embedding: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Mentions:
    """Task tokens of one answer: numbers i and places of each first <OBJ-i>, place of the first <GEN>."""

    numbers: list[int]
    places: list[int]
    picture: int | None


def find_mentions(ids: Sequence[int], *, first_object: int, max_objects: int) -> Mentions:
    """Task tokens in an answer; the id first_object + i - 1 is <OBJ-i> and first_object + max_objects is <GEN>.

    A repeated <OBJ-i> counts once, at its first place (the released code makes a mask too many there).
    """
    numbers: list[int] = []
    places: list[int] = []
    picture = None
    for place, token in enumerate(ids):
        number = token - first_object + 1
        if 1 <= number <= max_objects and number not in numbers:
            numbers.append(number)
            places.append(place)
        elif number == max_objects + 1 and picture is None:
            picture = place
    return Mentions(numbers, places, picture)


def until_end(ids: Sequence[int], end_ids: set[int]) -> list[int]:
    """The ids before the first end token."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return list(ids[:place])
    return list(ids)


def end_token_ids(llm: Any, options: dict[str, Any]) -> set[int]:
    """The ids that end an answer: of the call's options, else of the LM's generation config."""
    ends = options.get("eos_token_id", llm.generation_config.eos_token_id)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@contextmanager
def recorded_states(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collects, for each call of the head, the last position's input [B,D]: the state that predicts the next token."""
    states: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0][:, -1].detach())

    handle = head.register_forward_pre_hook(record)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no draws, no checkpointing) without gradients; the mode before comes back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def full_size(mask_logits_KSS: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Each mask [H,W] (bool) at the picture's own size (height, width).

    Logits are enlarged bilinearly; a pixel belongs to the mask where the logit is above 0. One at a time: those of a
    large picture together would fill the memory.
    """
    for logits_SS in mask_logits_KSS:
        yield F.interpolate(logits_SS[None, None], size=size, mode="bilinear", align_corners=False)[0, 0] > 0


def prefix_cache(llm: Any, embeds_BTD: Tensor, pictures_B: Tensor, length: int) -> DynamicCache:
    """Keys and values of the first `length` positions of each row, computed once for each picture.

    pictures_B: the picture of each row, 0..P-1, each at least once; rows of one picture begin alike, without padding.
    """
    count = int(pictures_B.max()) + 1
    first_P = torch.stack([(pictures_B == picture).nonzero()[0, 0] for picture in range(count)])
    cache = DynamicCache(config=llm.config)
    llm.model(inputs_embeds=embeds_BTD[first_P, :length], past_key_values=cache, use_cache=True)
    cache.batch_select_indices(pictures_B)
    return cache
