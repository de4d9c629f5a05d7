"""The four tasks: what is asked of a sample, and what the right answer is.

A task turns a Sample into a TaskText and knows nothing of tokens or tensors. Its draws come from the generator it is
given, so that the same sample in the same epoch always asks the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.data import prompts
from pipeline.data.schema import OBJECT_TAG, Sample
from pipeline.data.tokens import strip_tags

MaskTokens = Literal["inline", "end"]
_SPACED_TAG = re.compile(r"\s*" + OBJECT_TAG.pattern)
_FOREIGN_TAG = re.compile(r"\s*<(?:LCL-[0-9]+|GEN|GLB|image)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """referring_objects: most objects one referring prompt asks for. max_objects: most <OBJ-i> there are.
    mask_tokens: "inline" after each mention (the paper), "end" all behind the answer (the released code)."""

    referring_objects: int = 3
    max_objects: int = 8
    mask_tokens: MaskTokens = "inline"

    def __post_init__(self) -> None:
        if self.referring_objects < 1 or self.max_objects < 1:
            raise ValueError("referring_objects and max_objects must be at least 1")
        if self.mask_tokens not in ("inline", "end"):
            raise ValueError(f"mask_tokens must be 'inline' or 'end', found {self.mask_tokens!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskText:
    """prompt      the question, without the dialogue's frame
    answer         holds <OBJ-1>..<OBJ-k>, each once and in this order, or <GEN>
    object_indices the sample's objects that <OBJ-1>..<OBJ-k> stand for, 0-based, then those that the right answer is
                   about and that have no tag: beyond max_objects there is no token for them, but they are there
    values         what the task's own decoder should say of each of them: `Task.values` numbers apiece
    reference      task-specific facts for scoring
    """

    prompt: str
    answer: str
    object_indices: tuple[int, ...] = ()
    values: tuple[tuple[float, ...], ...] = ()
    wants_picture: bool = False
    reference: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """What the collator asks of a task.

    needs_image: whether the prompt holds the picture. values: numbers that the task's own decoder gives for each
    <OBJ-i>, beside its mask; 0 without such a decoder.
    """

    name: str
    needs_image: bool
    values: int

    def available(self, sample: Sample) -> bool:
        """Whether the sample has what the task needs."""

    def build(self, sample: Sample, rng: np.random.Generator, options: TaskOptions) -> TaskText:
        """Question and answer for an available sample."""


def renumber(answer: str, options: TaskOptions) -> tuple[str, tuple[int, ...]]:
    """The answer with tags <OBJ-1>, <OBJ-2>, ... by first mention, and the objects that it mentions (0-based).

    Only the first mention of an object keeps its tag: one object has one mask. Objects after the first max_objects lose
    their tags and stand at the list's end: no token is tuned by them, but an answer without them has missed them.
    """
    mentioned: list[int] = []

    def tag(found: re.Match[str]) -> str:
        index = int(found[1]) - 1
        if index in mentioned:
            return ""
        mentioned.append(index)
        if len(mentioned) > options.max_objects:
            return ""
        return f" <OBJ-{len(mentioned)}>" if found.start() else f"<OBJ-{len(mentioned)}>"

    text = _SPACED_TAG.sub(tag, _FOREIGN_TAG.sub("", answer))
    if options.mask_tokens == "end":
        tagged = min(len(mentioned), options.max_objects)
        text = " ".join([_SPACED_TAG.sub("", text).strip(), *(f"<OBJ-{i}>" for i in range(1, tagged + 1))])
    return text.strip(), tuple(mentioned)


class Reasoning:
    """A question that takes thought; the answer names the objects it rests on."""

    name = "reasoning"
    needs_image = True
    values = 0

    def available(self, sample: Sample) -> bool:
        return bool(sample.question)

    def build(self, sample: Sample, rng: np.random.Generator, options: TaskOptions) -> TaskText:
        answer, objects = renumber(sample.answer, options)
        return TaskText(prompt=strip_tags(sample.question), answer=answer, object_indices=objects)


class Referring:
    """Some objects by phrases; the answer names and marks each."""

    name = "referring"
    needs_image = True
    values = 0

    def available(self, sample: Sample) -> bool:
        return bool(sample.objects)

    def build(self, sample: Sample, rng: np.random.Generator, options: TaskOptions) -> TaskText:
        most = min(options.referring_objects, len(sample.objects), options.max_objects)
        count = int(rng.integers(1, most + 1))
        chosen = [int(i) for i in rng.permutation(len(sample.objects))[:count]]
        objects = [sample.objects[i] for i in chosen]
        phrases = [strip_tags(each.phrases[int(rng.integers(len(each.phrases)))]) for each in objects]
        template = prompts.REFERRING[int(rng.integers(len(prompts.REFERRING)))]
        mentions = [f"the {strip_tags(each.category)} <OBJ-{i}>" for i, each in enumerate(objects, start=1)]
        answer, order = renumber(prompts.join_phrases(mentions) + ".", options)
        assert order == tuple(range(count))
        return TaskText(
            prompt=template.replace("{phrases}", prompts.join_phrases(phrases)),
            answer=answer,
            object_indices=tuple(chosen),
            reference={"phrases": phrases},
        )


class Caption:
    """A description of the picture."""

    name = "caption"
    needs_image = True
    values = 0

    def available(self, sample: Sample) -> bool:
        return bool(strip_tags(sample.caption))

    def build(self, sample: Sample, rng: np.random.Generator, options: TaskOptions) -> TaskText:
        prompt = prompts.CAPTION[int(rng.integers(len(prompts.CAPTION)))]
        return TaskText(prompt=prompt, answer=strip_tags(sample.caption))


class Generation:
    """The picture from its description. The prompt holds no picture; the answer is <GEN>."""

    name = "generation"
    needs_image = False
    values = 0

    def available(self, sample: Sample) -> bool:
        return bool(strip_tags(sample.caption))

    def build(self, sample: Sample, rng: np.random.Generator, options: TaskOptions) -> TaskText:
        template = prompts.GENERATION[int(rng.integers(len(prompts.GENERATION)))]
        prompt = template.replace("{caption}", strip_tags(sample.caption))
        return TaskText(prompt=prompt, answer="<GEN>", wants_picture=True)


TASKS: dict[str, Task] = {task.name: task for task in (Reasoning(), Referring(), Caption(), Generation())}
"""The registry, in the order in which a sample that lacks one task falls to the next."""


def add_task(task: Task) -> None:
    """Enters a task of one's own. Raises ValueError if its name is taken by another."""
    known = TASKS.get(task.name)
    if known is not None and type(known) is not type(task):
        raise ValueError(f"there is a task named {task.name} already: choose another name")
    TASKS[task.name] = task


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """`names` as a tuple; ValueError if one is no task."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"no such task: {', '.join(unknown) or '(none given)'}; choose from {', '.join(TASKS)}")
    return tuple(names)


def resolve(sample: Sample, name: str, allowed: Sequence[str]) -> Task:
    """The task `name` if the sample has what it needs, else the next one in the registry that is allowed and possible.

    ValueError if the sample serves none.
    """
    order = list(TASKS)
    start = order.index(name)
    for candidate in order[start:] + order[:start]:
        if candidate in allowed and TASKS[candidate].available(sample):
            return TASKS[candidate]
    raise ValueError(f"the sample has nothing for any of the tasks {', '.join(allowed)}")
