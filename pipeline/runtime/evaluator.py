"""Scoring of a tuned model: predictions for every sample and task, then the figures of a report.

One condition is one pass over a split. "tuned" and "untuned" differ in the weights only. "shuffled" shows the tuned
model each question beside another sample's picture, and pairs each text with the picture made from another sample's
text: what is left of a score then never came from the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from pipeline.data import rle
from pipeline.data.batch import PromptBatch, VisionFeatures
from pipeline.data.collate import Collator
from pipeline.data.loader import EvalLoader, SampleSource
from pipeline.data.schema import Sample
from pipeline.data.tokens import TokenMap
from pipeline.model.generation import Generation, full_size
from pipeline.model.painter import Painter
from pipeline.model.tuner import NeuralTuner
from pipeline.model.vision import VisionTower
from pipeline.scoring.captions import score_captions
from pipeline.scoring.masks import score_masks
from pipeline.scoring.objects import caption_object_f1, right_object_accuracy
from pipeline.scoring.pictures import embed_pictures, score_pictures

PROTOCOLS = ("free-running", "teacher-forced")
GROUP = 50
"""Texts among which a picture has to find its own."""
Parse = Callable[[str], Iterable[Hashable]]


@dataclass(kw_only=True)
class Prediction:
    """What the model answered to one prompt, beside what it should have.

    masks: full-resolution COCO RLE by token number (the i-th is that of <OBJ-i>), None where the answer lacks the
    number. picture: PNG bytes of the picture made for <GEN>, None without. reference: see `PromptBatch.references`.
    """

    key: str
    task: str
    text: str
    masks: list[dict[str, Any] | None]
    reference: dict[str, Any]
    picture: bytes | None = None


class OtherPictures:
    """A split in which sample i shows the picture of sample (i + n/2) mod n and keeps all else."""

    def __init__(self, dataset: SampleSource) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, i: int) -> str:
        return self.dataset.key(i)

    def partner(self, i: int) -> int:
        return (i + max(1, len(self) // 2)) % len(self)

    def __getitem__(self, i: int) -> Sample:
        other = self.dataset[self.partner(i)]
        return dataclasses.replace(self.dataset[i], image=other.image, image_format=other.image_format, clip=other.clip)


class Evaluator:
    """Answers every prompt of a split and scores the answers.

    Args:
        painter: makes pictures from CLIP embeddings; None leaves pictures out.
        full_name, colour_shape: read object names in a text (the mini world's grammar); None where a data set has no
            closed vocabulary, and the figures that need them are None then.
        limit: only the split's first so many samples; 0 for all.
    """

    def __init__(
        self,
        *,
        tuner: NeuralTuner,
        vision: VisionTower,
        token_map: TokenMap,
        collator: Collator,
        dataset: SampleSource,
        painter: Painter | None,
        tasks: Sequence[str],
        device: torch.device,
        batch_size: int,
        max_new_tokens: int,
        protocol: str = "free-running",
        limit: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        full_name: Parse | None = None,
        colour_shape: Parse | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
        self.tuner, self.vision, self.token_map, self.collator = tuner, vision, token_map, collator
        self.dataset, self.painter, self.tasks, self.device = dataset, painter, tuple(tasks), device
        self.batch_size, self.max_new_tokens, self.protocol = batch_size, max_new_tokens, protocol
        self.limit, self.num_workers, self.seed = limit, num_workers, seed
        self.full_name, self.colour_shape = full_name, colour_shape
        self.skipped: list[str] = []
        self._drawn: list[Prediction] = []
        self.counts: dict[str, int] = {}

    def predict(self, condition: str) -> list[Prediction]:
        """Answers of one condition ("tuned", "untuned" or "shuffled"), task by task in the split's order.

        Picture generation has no picture in its prompt, so the shuffled condition takes over what "tuned" has drawn.
        """
        shuffled = condition == "shuffled"
        known = self._drawn if shuffled else []
        tasks = [task for task in self.tasks if not (known and task == "generation")]
        if not tasks:
            return known
        loader = EvalLoader(
            OtherPictures(self.dataset) if shuffled else self.dataset,
            self.collator,
            tasks=tasks,
            batch_size=self.batch_size,
            limit=self.limit,
            num_workers=self.num_workers,
        )
        found: list[Prediction] = []
        with tqdm(total=len(loader), desc=f"evaluating ({condition})", unit="batch", mininterval=1) as bar:
            for prompts in loader:
                self.skipped += prompts.skipped
                if prompts.keys:
                    found += self._answer(prompts.to(self.device))
                bar.update()
        if condition == "tuned":
            self._drawn = [p for p in found if p.task == "generation"]
        return found + known

    def _answer(self, prompts: PromptBatch) -> list[Prediction]:
        features = self.vision(prompts.pixel_values)
        generations = self._generate(prompts, features)
        predictions = [
            Prediction(
                key=key,
                task=task,
                text=self.token_map.decode(generation.ids),
                masks=full_masks(generation, reference["size"]),
                reference=reference,
            )
            for key, task, reference, generation in zip(
                prompts.keys, prompts.tasks, prompts.references, generations, strict=True
            )
        ]
        if self.painter is not None:
            drawn = {
                i: g.embedding
                for i, (g, task) in enumerate(zip(generations, prompts.tasks, strict=True))
                if g.embedding is not None and task == "generation"
            }
            if drawn:
                seed = self.seed + prompts.references[next(iter(drawn))]["index"]
                pictures = self.painter.paint(torch.stack(list(drawn.values())), seed)
                for i, picture in zip(drawn, pictures, strict=True):
                    predictions[i].picture = picture
        return predictions

    def _generate(self, prompts: PromptBatch, features: VisionFeatures) -> list[Generation]:
        if self.protocol == "teacher-forced":
            return self.tuner.teacher_forced(prompts, features)
        return self.tuner.generate(
            prompts, features, max_new_tokens=self.max_new_tokens, eos_token_id=self.token_map.eos_id
        )

    def score(self, predictions: Sequence[Prediction], condition: str) -> dict[str, float | None]:
        """The report's figures of one condition; None where a figure cannot be had."""
        by_task = {task: [p for p in predictions if p.task == task] for task in self.tasks}
        self.counts = {task: len(some) for task, some in by_task.items()}
        figures: dict[str, float | None] = {}
        for task, matching in (("referring", "hungarian"), ("reasoning", "hungarian")):
            some = by_task.get(task, [])
            scores = score_masks([p.masks for p in some], [p.reference["masks"] for p in some], matching=matching)
            figures[f"{task}_miou"], figures[f"{task}_oiou"] = scores["miou"], scores["oiou"]
            figures[f"{task}_object_accuracy"] = None
            if self.full_name is not None and some:
                gold = [p.reference["names"] for p in some]
                named = [list(self.full_name(" ".join(names))) for names in gold]
                accuracy = right_object_accuracy([p.text for p in some], named, self.full_name)
                figures[f"{task}_object_accuracy"] = accuracy["accuracy"]
        figures |= self._caption_figures(by_task.get("caption", []))
        figures |= self._picture_figures(by_task.get("generation", []), condition)
        return figures

    def _caption_figures(self, some: list[Prediction]) -> dict[str, float | None]:
        figures: dict[str, float | None] = {"caption_bleu4": None, "caption_cider": None, "caption_object_f1": None}
        if some:
            scores = score_captions({p.key: [p.reference["caption"]] for p in some}, {p.key: p.text for p in some})
            figures["caption_bleu4"], figures["caption_cider"] = scores["bleu4"], scores["cider"]
            if self.colour_shape is not None:
                gold = [list(self.colour_shape(p.reference["caption"])) for p in some]
                figures["caption_object_f1"] = caption_object_f1([p.text for p in some], gold, self.colour_shape)["f1"]
        return figures

    def _picture_figures(self, some: list[Prediction], condition: str) -> dict[str, float | None]:
        """R@1 and cosine by the run's own CLIP; a text whose answer holds no <GEN> has a grey picture."""
        figures: dict[str, float | None] = {f"picture_text_r1_of_{GROUP}": None, "picture_clip_cosine": None}
        if not some or self.painter is None:
            return figures
        shown = embed_pictures(self.vision, [p.picture for p in some])
        texts = torch.cat(
            [self.vision.encode_text([p.reference["caption"] for p in part]).cpu() for part in _chunks(some, 100)]
        )
        if condition == "shuffled":
            shown = shown.roll(len(some) // 2, dims=0)
        scores = score_pictures(shown, texts, group=GROUP, seed=self.seed)
        figures[f"picture_text_r1_of_{GROUP}"] = scores["text_r1"]
        figures["picture_clip_cosine"] = scores["clip_cosine"]
        return figures


def full_masks(generation: Generation, size: tuple[int, int]) -> list[dict[str, Any] | None]:
    """The answer's masks at the picture's own (height, width), by token number; None for a missing number."""
    if generation.mask_logits is None:
        return []
    masks: list[dict[str, Any] | None] = [None] * max(generation.object_numbers)
    for number, mask in zip(generation.object_numbers, full_size(generation.mask_logits, size), strict=True):
        masks[number - 1] = rle.encode(mask.cpu().numpy())
    return masks


def _chunks(rows: Sequence[Any], size: int) -> Iterable[list[Any]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
