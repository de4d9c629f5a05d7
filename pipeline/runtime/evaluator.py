"""Answers of a tuned model to every prompt of a split, gathered from all ranks, and what scoring needs beside them.

One condition is one pass over a split. "tuned" and "untuned" differ in the weights only. "shuffled" shows the tuned
model each question beside another sample's picture, and pairs each text with the picture made from another sample's
text: what is left of a score then never came from the input.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
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
from pipeline.runtime.ranks import Ranks
from pipeline.scoring.distributions import Inception
from pipeline.scoring.pictures import embed_pictures
from pipeline.scoring.predictions import PictureFeatures, Prediction

PROTOCOLS = ("free-running", "teacher-forced")


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


class EachPhrase:
    """A split as RefCOCO's family is scored: one sample for each phrase of each object, with that object alone.

    `skipped` names the samples that cannot be read, as "key: reason".
    """

    def __init__(self, dataset: SampleSource) -> None:
        self.dataset = dataset
        self.places: list[tuple[int, int, int]] = []
        self.skipped: list[str] = []
        for i in range(len(dataset)):
            try:
                objects = dataset[i].objects
            except ValueError as error:
                self.skipped.append(f"{dataset.key(i)}: {error}")
                continue
            self.places += [(i, o, p) for o, each in enumerate(objects) for p in range(len(each.phrases))]

    def __len__(self) -> int:
        return len(self.places)

    def key(self, i: int) -> str:
        sample, o, p = self.places[i]
        return f"{self.dataset.key(sample)}-{o}-{p}"

    def __getitem__(self, i: int) -> Sample:
        place, o, p = self.places[i]
        sample = self.dataset[place]
        one = dataclasses.replace(sample.objects[o], phrases=(sample.objects[o].phrases[p],))
        return dataclasses.replace(sample, key=self.key(i), objects=(one,), question="", answer="")


class Evaluator:
    """Answers every prompt of a split. Each rank answers its share; all of them get all answers.

    Args:
        painter: makes pictures from CLIP embeddings; None leaves pictures out.
        inception: for FID, KID and IS; None leaves them out.
        limit: only the split's first so many samples; 0 for all.
        seed: of the pictures' draw; each picture's draw depends on it and on the sample alone.
        progress: show a bar, on the first rank.
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
        ranks: Ranks,
        batch_size: int,
        max_new_tokens: int,
        inception: Inception | None = None,
        limit: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.progress = progress
        self.tuner, self.vision, self.token_map, self.collator = tuner, vision, token_map, collator
        self.dataset, self.painter, self.inception, self.tasks = dataset, painter, inception, tuple(tasks)
        self.ranks, self.batch_size, self.max_new_tokens = ranks, batch_size, max_new_tokens
        self.limit, self.num_workers, self.seed = limit, num_workers, seed
        self.skipped: list[str] = []
        self.seconds_per_pair: dict[str, float] = {}
        self._drawn: list[Prediction] = []

    def predict(self, condition: str, protocol: str = "free-running") -> list[Prediction]:
        """Answers of one condition ("tuned", "untuned", "shuffled" or "teacher_forced"), by task and the split's order.

        Picture generation has no picture in its prompt, so the shuffled condition takes over what "tuned" has drawn.
        Raises ValueError for an unknown protocol.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
        shuffled = condition == "shuffled"
        known = self._drawn if shuffled else []
        tasks = [task for task in self.tasks if not (known and task == "generation")]
        found, skipped, seconds = self._predict_share(condition, protocol, tasks) if tasks else ([], [], {})
        everyone = self.ranks.gather((found, skipped, seconds))
        self.skipped += [text for _, some, _ in everyone for text in some]
        place = {task: i for i, task in enumerate(self.tasks)}
        predictions = sorted(
            (p for some, _, _ in everyone for p in some), key=lambda p: (place[p.task], p.reference["index"])
        )
        counts = Counter(p.task for p in predictions)
        total = {task: sum(spent.get(task, 0.0) for _, _, spent in everyone) for task in counts}
        self.seconds_per_pair = {task: total[task] / n for task, n in counts.items()}
        if condition == "tuned":
            self._drawn = [p for p in predictions if p.task == "generation"]
        return predictions + known

    def _predict_share(
        self, condition: str, protocol: str, tasks: Sequence[str]
    ) -> tuple[list[Prediction], list[str], dict[str, float]]:
        """This rank's answers, the samples it could not read, and the seconds it took for each task."""
        loader = EvalLoader(
            OtherPictures(self.dataset) if condition == "shuffled" else self.dataset,
            self.collator,
            tasks=tasks,
            rank=self.ranks.rank,
            world=self.ranks.world_size,
            batch_size=self.batch_size,
            limit=self.limit,
            num_workers=self.num_workers,
        )
        found: list[Prediction] = []
        skipped: list[str] = []
        seconds = dict.fromkeys(tasks, 0.0)
        with tqdm(
            total=len(loader),
            desc=f"evaluating ({condition})",
            unit="batch",
            mininterval=1,
            disable=not (self.progress and self.ranks.is_main),
        ) as bar:
            for prompts in loader:
                skipped += prompts.skipped
                if prompts.keys:
                    start = time.perf_counter()
                    # The answers' text, masks and pictures are on the CPU by then: the device has finished.
                    found += self._answer(prompts.to(self.ranks.device), protocol)
                    seconds[prompts.tasks[0]] += time.perf_counter() - start
                bar.update()
        return found, skipped, seconds

    def _answer(self, prompts: PromptBatch, protocol: str) -> list[Prediction]:
        features = self.vision(prompts.pixel_values)
        generations = self._generate(prompts, features, protocol)
        predictions = [
            Prediction(
                key=key,
                task=task,
                text=self.token_map.decode(generation.ids),
                masks=full_masks(generation, reference["size"]),
                values=_by_number(generation),
                reference=reference,
                cut=protocol == "free-running" and len(generation.ids) >= self.max_new_tokens,
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
                keys = [prompts.references[i]["index"] for i in drawn]
                pictures = self.painter.paint(torch.stack(list(drawn.values())), self.seed, keys=keys)
                for i, picture in zip(drawn, pictures, strict=True):
                    predictions[i].picture = picture
        return predictions

    def _generate(self, prompts: PromptBatch, features: VisionFeatures, protocol: str) -> list[Generation]:
        if protocol == "teacher-forced":
            return self.tuner.teacher_forced(prompts, features)
        return self.tuner.generate(
            prompts, features, max_new_tokens=self.max_new_tokens, eos_token_id=self.token_map.eos_id
        )

    def picture_features(self, predictions: Sequence[Prediction]) -> PictureFeatures | None:
        """Features of the drawn and the true pictures, in fixed batches and the split's order; None without a painter
        or without picture generation. An answer without <GEN> has a grey picture."""
        some = [p for p in predictions if p.task == "generation"]
        if not some or self.painter is None:
            return None
        texts = [self.vision.encode_text([p.reference["caption"] for p in part]) for part in _chunks(some, 100)]
        true = [self.dataset[p.reference["index"]].image for p in some]
        features = PictureFeatures(
            clip_pictures=embed_pictures(self.vision, [p.picture for p in some]).numpy(),
            clip_texts=torch.cat(texts).float().cpu().numpy(),
            clip_true=embed_pictures(self.vision, true).numpy(),
        )
        if self.inception is not None:
            features.pool, features.logits = self.inception([p.picture or _grey() for p in some])
            features.pool_true, _ = self.inception(true)
        return features


def full_masks(generation: Generation, size: tuple[int, int]) -> list[dict[str, Any] | None]:
    """The answer's masks at the picture's own (height, width), by token number; None for a missing number."""
    if generation.mask_logits is None:
        return []
    masks: list[dict[str, Any] | None] = [None] * max(generation.object_numbers)
    for number, mask in zip(generation.object_numbers, full_size(generation.mask_logits, size), strict=True):
        masks[number - 1] = rle.encode(mask.cpu().numpy())
    return masks


def _by_number(generation: Generation) -> list[list[float] | None]:
    """The task's own values of each <OBJ-i>, by token number; None for a missing number."""
    if generation.values is None:
        return []
    values: list[list[float] | None] = [None] * max(generation.object_numbers)
    for number, row in zip(generation.object_numbers, generation.values.tolist(), strict=True):
        values[number - 1] = row
    return values


def _chunks(rows: Sequence[Any], size: int) -> Iterable[list[Any]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def _grey() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
