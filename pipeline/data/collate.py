"""From samples and their places in the order to tensors: the only maker of Batch and PromptBatch.

A sequence is: begin token, picture slots (tasks that see one), "Question: ... Answer:", answer, end token. Only the
answer and the end token carry loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data import prompts, rle
from pipeline.data.batch import IGNORE, NO_SAMPLE, Batch, ObjectValues, PromptBatch
from pipeline.data.images import normalise, to_square
from pipeline.data.order import Item, keyed_rng
from pipeline.data.rows import lay_out
from pipeline.data.schema import Sample
from pipeline.data.tasks import TASKS, MaskTokens, TaskOptions, TaskText, check_names, resolve
from pipeline.data.tokens import TokenMap, strip_tags

_LEAST_ROOM = 16
"""Tokens that question and answer need at the very least."""


@dataclass(slots=True)
class _Row:
    sample: Sample
    item: Item
    task: str
    text: TaskText
    prompt_ids: list[int]
    answer_ids: list[int]
    objects: tuple[int, ...]
    picture_3SS: Tensor


class Collator:
    """Samples to tensors. A sample that cannot be used (damaged picture, nothing to ask) is left out and named.

    image_size   side of CLIP's input in pixels; mean, std of its normalisation
    mask_size    side of the mask decoder's output
    image_prefix the text with the picture's <image> slots, see prompts.image_prefix
    max_length   longest sequence in tokens, picture slots included. A question that is too long loses words at its end,
                 then the answer does; an object whose tag is cut loses its target too
    tasks        the tasks in use; a sample that lacks one falls to the next of these
    pack_tokens  training batches hold several samples to a row, of this many tokens at most, 0 for all in one row;
                 None: a padded row each
    """

    def __init__(
        self,
        token_map: TokenMap,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        mask_size: int,
        image_prefix: str,
        max_length: int,
        mask_tokens: MaskTokens = "inline",
        referring_objects: int = 3,
        seed: int = 0,
        tasks: Sequence[str] = tuple(TASKS),
        pack_tokens: int | None = None,
    ) -> None:
        if pack_tokens and pack_tokens < max_length:
            raise ValueError(f"pack_tokens {pack_tokens} is less than max_length {max_length}: rows must hold a sample")
        self.token_map = token_map
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.mask_size = mask_size
        self.max_length = max_length
        self.seed = seed
        self.pack_tokens = pack_tokens
        self.tasks = check_names(tasks)
        self.options = TaskOptions(
            referring_objects=referring_objects, max_objects=token_map.max_objects, mask_tokens=mask_tokens
        )
        self._begin = [] if token_map.bos_id is None else [token_map.bos_id]
        self._image_ids = token_map.encode(image_prefix)
        frame = token_map.encode(prompts.QUESTION_HEAD.strip() + prompts.ANSWER_HEAD)
        least = len(self._begin) + len(self._image_ids) + len(frame) + _LEAST_ROOM
        if max_length < least:
            raise ValueError(f"max_length {max_length} leaves no room for text beside the picture: at least {least}")

    def __call__(self, samples: Sequence[tuple[Sample, Item]], skipped: Sequence[str] = ()) -> Batch:
        """A training batch. `skipped`: samples already given up on by the reader, as "key: reason"."""
        rows, gone = self._rows(samples)
        sequences = [row.prompt_ids + row.answer_ids for row in rows]
        layout = lay_out(sequences or [[self.token_map.pad_id]], pad_id=self.token_map.pad_id, budget=self.pack_tokens)
        if not rows:
            layout.segment_ids[:] = NO_SAMPLE
        labels = torch.full_like(layout.input_ids, IGNORE)
        mask_places, gen_places = [], []
        for row, (r, start) in zip(rows, layout.starts, strict=False):
            answer = start + len(row.prompt_ids)
            labels[r, answer : answer + len(row.answer_ids)] = torch.tensor(row.answer_ids)
            mask_places += [(r, answer + t) for t in self._mask_places(row)]
            if row.text.wants_picture:
                gen_places.append((r, answer))
        masks = [mask for row in rows for mask in self._masks(row)]
        assert len(masks) == len(mask_places)
        return Batch(
            keys=[row.sample.key for row in rows],
            tasks=[row.task for row in rows],
            input_ids=layout.input_ids,
            segment_ids=layout.segment_ids,
            position_ids=layout.position_ids,
            labels=labels,
            pixel_values=self._pixels(rows),
            mask_rows=torch.tensor([r for r, _ in mask_places], dtype=torch.long),
            mask_positions=torch.tensor([t for _, t in mask_places], dtype=torch.long),
            masks=torch.stack(masks) if masks else torch.zeros(0, self.mask_size, self.mask_size),
            gen_rows=torch.tensor([r for r, _ in gen_places], dtype=torch.long),
            gen_positions=torch.tensor([t for _, t in gen_places], dtype=torch.long),
            clip_targets=_clip_targets([row.sample for row in rows if row.text.wants_picture]),
            values=self._values(rows),
            skipped=[*skipped, *gone],
        )

    def prompts(self, samples: Sequence[tuple[Sample, Item]], skipped: Sequence[str] = ()) -> PromptBatch:
        """Prompts without answers, and what the answers should be."""
        rows, gone = self._rows(samples)
        width = max((len(row.prompt_ids) for row in rows), default=1)
        input_ids = torch.full((max(len(rows), 1), width), self.token_map.pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for r, row in enumerate(rows):
            input_ids[r, width - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
            attention_mask[r, width - len(row.prompt_ids) :] = 1
        if not rows:
            attention_mask[:] = 1
        return PromptBatch(
            keys=[row.sample.key for row in rows],
            tasks=[row.task for row in rows],
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=self._pixels(rows),
            references=[self._reference(row) for row in rows],
            answer_ids=[row.answer_ids for row in rows],
            skipped=[*skipped, *gone],
        )

    def ask(self, keys: Sequence[str], task: str, questions: Sequence[str], *, answer: int) -> tuple[PromptBatch, int]:
        """Prompts for questions that come without samples, and how many first positions are the same in every row.

        Padding stands behind the picture's slots and before the question, so that rows about one picture begin alike.
        pixel_values is empty: pictures are looked at apart. `answer`: tokens to leave for the answer, which may take
        half of the room at most. Raises ValueError for a question that is empty or too long.
        """
        begin = self._begin + (self._image_ids if TASKS[task].needs_image else [])
        room = self.max_length - len(begin)
        room -= min(answer, room // 2)
        rows = []
        for question in questions:
            text = question
            # What is left of a tag within a tag may be a tag again.
            while (without := strip_tags(text)) != text:
                text = without
            if not text:
                raise ValueError("there is no text to answer: write a question or a phrase")
            rows.append(self.token_map.encode(prompts.dialogue(text)))
            if len(rows[-1]) > room:
                raise ValueError(f"the text is {len(rows[-1])} tokens long, {room} fit: shorten it")
        width = len(begin) + max(len(ids) for ids in rows)
        input_ids = torch.full((len(rows), width), self.token_map.pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        input_ids[:, : len(begin)] = torch.tensor(begin, dtype=torch.long)
        attention_mask[:, : len(begin)] = 1
        for r, ids in enumerate(rows):
            input_ids[r, width - len(ids) :] = torch.tensor(ids)
            attention_mask[r, width - len(ids) :] = 1
        made = PromptBatch(
            keys=list(keys),
            tasks=[task] * len(rows),
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=torch.zeros(0, 3, self.image_size, self.image_size),
            references=[{} for _ in rows],
            answer_ids=[[] for _ in rows],
        )
        return made, len(begin)

    def _rows(self, samples: Sequence[tuple[Sample, Item]]) -> tuple[list[_Row], list[str]]:
        rows, gone = [], []
        for sample, item in samples:
            try:
                rows.append(self._row(sample, item))
            except ValueError as error:
                gone.append(f"{sample.key}: {error}")
        return rows, gone

    def _row(self, sample: Sample, item: Item) -> _Row:
        task = resolve(sample, item.task, self.tasks)
        rng = keyed_rng("text", self.seed, task.name, item.sample, item.epoch)
        text = task.build(sample, rng, self.options)
        begin = self._begin + (self._image_ids if task.needs_image else [])
        question_ids, answer_ids = self._fit(text, self.max_length - len(begin))
        numbers = [n for n in map(self.token_map.object_number, answer_ids) if n is not None]
        assert numbers == list(range(1, len(numbers) + 1))
        picture = to_square(sample.image, self.image_size)
        objects = text.object_indices[: len(numbers)]
        return _Row(sample, item, task.name, text, begin + question_ids, answer_ids, objects, picture)

    def _fit(self, text: TaskText, room: int) -> tuple[list[int], list[int]]:
        """Ids of the framed question and of the answer with its end token, together at most `room`."""
        question = self.token_map.encode(prompts.dialogue(text.prompt))
        answer = self._answer_ids(text.answer)
        if len(question) + len(answer) > room:
            # The question gives way first, but not below half of the room: an endless answer must not erase it.
            question = self._cut_question(text.prompt, max(room - len(answer), room // 2))
            answer = self._cut_answer(text.answer, room - len(question))
        if len(question) + len(answer) > room:
            raise ValueError("a single word of the text is longer than max_length leaves room for")
        return question, answer

    def _answer_ids(self, answer: str) -> list[int]:
        return [*self.token_map.encode(" " + answer, continued=True), self.token_map.eos_id]

    def _cut_question(self, prompt: str, room: int) -> list[int]:
        words = prompt.split(" ")
        return _longest(len(words), room, lambda n: self.token_map.encode(prompts.dialogue(" ".join(words[:n]))))

    def _cut_answer(self, answer: str, room: int) -> list[int]:
        words = answer.split(" ")
        tail = [word for word in words if word.startswith("<OBJ-")] if self.options.mask_tokens == "end" else []
        words = words[: len(words) - len(tail)]
        return _longest(len(words), room, lambda n: self._answer_ids(" ".join(words[:n] + tail)))

    def _mask_places(self, row: _Row) -> list[int]:
        return [t for t, i in enumerate(row.answer_ids) if self.token_map.object_number(i) is not None]

    def _masks(self, row: _Row) -> list[Tensor]:
        return [torch.from_numpy(rle.shrink(row.sample.objects[i].mask, self.mask_size)) for i in row.objects]

    def _values(self, rows: Sequence[_Row]) -> dict[str, ObjectValues]:
        """Targets of the tasks' own decoders, for each task in use that has one, also where no row is of it."""
        places: dict[str, list[int]] = {name: [] for name in self.tasks if TASKS[name].values}
        targets: dict[str, list[tuple[float, ...]]] = {name: [] for name in places}
        first = 0
        for row in rows:
            if row.task in places:
                places[row.task] += range(first, first + len(row.objects))
                targets[row.task] += row.text.values[: len(row.objects)]
            first += len(row.objects)
        return {
            name: ObjectValues(
                places=torch.tensor(places[name], dtype=torch.long),
                targets=torch.tensor(targets[name], dtype=torch.float32).reshape(-1, TASKS[name].values),
            )
            for name in places
        }

    def _pixels(self, rows: Sequence[_Row]) -> Tensor:
        if not rows:
            return torch.zeros(1, 3, self.image_size, self.image_size)
        return normalise([row.picture_3SS for row in rows], mean=self.mean, std=self.std)

    def _reference(self, row: _Row) -> dict[str, Any]:
        # Of the whole right answer: what max_objects or max_length leave no room for is missed, not gone.
        chosen = [row.sample.objects[i] for i in row.text.object_indices]
        return {
            "index": row.item.sample,
            "answer": row.text.answer,
            "caption": row.sample.caption,
            "question": row.text.prompt,
            "size": (row.sample.height, row.sample.width),
            "object_indices": list(row.text.object_indices),
            "masks": [each.mask for each in chosen],
            "names": [each.category for each in chosen],
            "phrases": [],
            "values": [list(values) for values in row.text.values],
            **row.text.reference,
        }


def _longest(words: int, room: int, ids_of: Any) -> list[int]:
    """ids_of(n) for the largest n >= 1 whose ids fit into `room`; ids_of(1) if none does (bisection)."""
    fits, fails = 1, words + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if len(ids_of(middle)) <= room:
            fits = middle
        else:
            fails = middle
    return ids_of(fits)


def _clip_targets(samples: Sequence[Sample]) -> Tensor | None:
    """[G,E] float32 if the data set was packed with embeddings, None if it was not."""
    have = [sample for sample in samples if sample.clip is not None]
    if not have:
        return None
    if len(have) != len(samples):
        lacking = next(sample.key for sample in samples if sample.clip is None)
        raise ValueError(f"some samples hold a CLIP embedding and some, such as {lacking}, do not: pack them alike")
    return torch.from_numpy(np.stack([sample.clip for sample in have if sample.clip is not None]).astype(np.float32))
