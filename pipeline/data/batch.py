"""The dataclasses in which data and model meet. Imports torch and the standard library only.

Shape letters: B rows, T tokens, R samples, S picture side in pixels, M masks, K mask side, G pictures to make, E CLIP
embedding, N patches of the vision tower, C its width.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that carries no loss; PyTorch's cross-entropy leaves it out by default."""
NO_SAMPLE = -1
"""Segment id of padding."""

_Holder = TypeVar("_Holder")


class Counts(NamedTuple):
    """What the losses are averaged over: labelled tokens, masks, pictures to make."""

    tokens: int
    masks: int
    pictures: int
    values: dict[str, int]
    """Items of each task's own decoder."""


def _map_tensors(holder: _Holder, change: Callable[[Tensor], Tensor]) -> _Holder:
    """A copy of a dataclass with `change` applied to its tensors, and to those of its tuples, dicts and dataclasses."""

    def apply(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, tuple):
            return tuple(apply(part) for part in value)
        if isinstance(value, dict):
            return {name: apply(part) for name, part in value.items()}
        if isinstance(value, ObjectValues):
            return _map_tensors(value, change)
        return value

    assert dataclasses.is_dataclass(holder) and not isinstance(holder, type)
    return dataclasses.replace(holder, **{f.name: apply(getattr(holder, f.name)) for f in dataclasses.fields(holder)})


class TrainingBatch(Protocol):
    """What the loader and the trainer ask of a micro-batch, whatever model it is for."""

    @property
    def keys(self) -> list[str]:
        """One per sample."""

    @property
    def tasks(self) -> list[str]:
        """One per sample."""

    @property
    def skipped(self) -> list[str]:
        """ "key: reason" of the samples that could not be read."""

    @property
    def pixel_values(self) -> Any:
        """What the frozen models see."""

    @property
    def attention_mask(self) -> Tensor:
        """[B,T]: 1 on tokens."""

    @property
    def slots(self) -> int:
        """Places for tokens, padding included."""

    def to(self, device: torch.device | str) -> Any:
        """A copy on `device`."""

    def counts(self) -> Counts:
        """What the losses are averaged over."""


@dataclass(kw_only=True)
class VisionFeatures:
    """What the frozen vision tower says of B pictures.

    tokens     [B,1+N,C] last block, the CLS token first
    taps       some blocks' outputs, each [B,1+N,C], CLS first, in the order in which the mask decoder reads them
    embedding  [B,E] the projected, unnormalised CLIP embedding
    """

    tokens: Tensor
    taps: tuple[Tensor, ...]
    embedding: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "VisionFeatures":
        """A copy on `device`, in `dtype` if one is given."""
        return _map_tensors(self, lambda tensor: tensor.to(device=device, dtype=dtype, non_blocking=True))

    def select(self, rows: Tensor) -> "VisionFeatures":
        """The features of the pictures `rows` [R] (long), in that order; a row may be asked for more than once."""
        return _map_tensors(self, lambda tensor: tensor.index_select(0, rows.to(tensor.device)))


@dataclass(kw_only=True)
class ObjectValues:
    """What a task's own decoder should say of n of a batch's <OBJ-i>.

    places   [n] long, which of the batch's M masks each stands beside: the same token, the same state
    targets  [n,W] float32
    """

    places: Tensor
    targets: Tensor


@dataclass(kw_only=True)
class Batch:
    """One micro-batch for training: each sample a row of its own (padded), or several samples to a row (packed).

    keys, tasks      one per sample; both are empty in an empty batch, which still has one row of padding (no label, no
                     mask, no picture), so that every rank calls the same modules
    input_ids        [B,T] long, rows padded at their ends; image slots hold TokenMap.image_id
    segment_ids      [B,T] long: the sample, 0..R-1, that a token belongs to; NO_SAMPLE on padding. A sample's tokens
                     stand together in one row
    position_ids     [B,T] long: counts from 0 in each sample, and goes on counting on the padding behind it. Attention
                     is causal and stays within a run of positions
    labels           [B,T] long: at t the id of the token at t where it carries loss, else IGNORE. The logits that
                     predict it come from the state at t-1
    pixel_values     [R,3,S,S] float32, CLIP-normalised; of every sample, also of those that must make the picture
    mask_rows        [M] long, row of each mask
    mask_positions   [M] long, position t of its <OBJ-i> in input_ids; the state that predicts it is at t-1
    masks            [M,K,K] float32 in {0,1}
    gen_rows, gen_positions  [G] long, the same for <GEN>
    clip_targets     [G,E] float32 from the shards, or None: the vision tower's embedding of pixel_values[gen_rows]
    values           for each task in use that has a decoder of its own, its targets (n may be 0)
    skipped          "key: reason" of the samples that should have been here and could not be read
    """

    keys: list[str]
    tasks: list[str]
    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    mask_rows: Tensor
    mask_positions: Tensor
    masks: Tensor
    gen_rows: Tensor
    gen_positions: Tensor
    clip_targets: Tensor | None = None
    values: dict[str, ObjectValues] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def attention_mask(self) -> Tensor:
        """[B,T] long, 1 on tokens, 0 on padding."""
        return (self.segment_ids != NO_SAMPLE).long()

    @property
    def slots(self) -> int:
        """Places for tokens, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on `device`; asynchronous from pinned memory."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; the DataLoader calls this when pin_memory=True."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    def counts(self) -> Counts:
        """How many labelled tokens, masks, pictures and values of each task this micro-batch holds."""
        values = {task: found.targets.shape[0] for task, found in self.values.items()}
        return Counts(int((self.labels != IGNORE).sum()), self.masks.shape[0], self.gen_rows.shape[0], values)


@dataclass(kw_only=True)
class PictureBatch:
    """One micro-batch of pictures alone, for the image prior.

    keys            one per row; an empty batch still has one black picture, so that every rank calls the same modules
    pixel_values    ([B,3,S,S] CLIP-normalised, [B,3,R,R] in -1..1 for the image decoder), float32, of the same pictures
    attention_mask  [B,N] long: ones, a code of the picture each; zeros in an empty batch
    skipped         "key: reason" of the samples that could not be read
    """

    keys: list[str]
    pixel_values: tuple[Tensor, Tensor]
    attention_mask: Tensor
    skipped: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """One per row."""
        return ["picture"] * len(self.keys)

    @property
    def slots(self) -> int:
        """Places for codes."""
        return self.attention_mask.numel()

    def to(self, device: torch.device | str) -> "PictureBatch":
        """A copy on `device`; asynchronous from pinned memory."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PictureBatch":
        """A copy in page-locked memory."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    def counts(self) -> Counts:
        """How many codes this micro-batch holds; they count as tokens."""
        return Counts(int(self.attention_mask.sum()), 0, 0, {})


@dataclass(kw_only=True)
class PromptBatch:
    """Prompts for generation and scoring, without their answers.

    input_ids       [B,T] long, LEFT-padded, ending right before the answer
    attention_mask  [B,T] long
    pixel_values    [B,3,S,S] float32
    references      per row: index (of the sample in its split), answer, caption, question, size (height, width) of the
                    masks in pixels, object_indices, masks (full-resolution COCO RLE, in target order: <OBJ-1> first;
                    of every object of the right answer, those that max_objects and max_length leave out included),
                    names (the objects' categories, same order), phrases (what the prompt called them; referring only),
                    values (of a task with a decoder of its own), and what else the task puts there
    answer_ids      the right answer's ids, end token included, for teacher-forced scoring
    skipped         "key: reason" of the samples that could not be read
    """

    keys: list[str]
    tasks: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    references: list[dict[str, Any]]
    answer_ids: list[list[int]]
    skipped: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "PromptBatch":
        """A copy on `device`."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PromptBatch":
        """A copy in page-locked memory."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())
