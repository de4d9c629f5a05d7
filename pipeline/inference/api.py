"""The Python API: a tuned model that segments, reasons, captions and draws.

    model = NeuralTuner.from_pretrained("runs/7b", base="/models/Llama-2-7b-hf", device="cuda")
    answer = model.reason(picture, "Which of these could boil water?")       # Answer: text, objects with masks
    answers = model.segment(picture, ["the cup", "the kettle on the left"])  # one picture, several texts: a list
    captions = model.caption([one, two, three], batch_size=8)
    drawing = model.generate("a red kettle on a stove", n=4, seed=1)         # Drawing: PNG files

A picture is a path, the bytes of a JPEG or PNG, a PIL image, an array [H,W,3] of uint8, or what `look` made of one of
these. Keyword arguments that are not named here go to transformers' `generate` (do_sample, temperature, top_p,
repetition_penalty, cache_implementation, ...). The model, its decoding and the picture transform are evaluation's own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from pipeline.assembly.loading import Loaded, load
from pipeline.data import prompts, rle
from pipeline.data.batch import VisionFeatures
from pipeline.data.images import as_rgb, pixels_of, size_of, to_pixels
from pipeline.inference.export import save_pretrained
from pipeline.inference.phrases import read_answer
from pipeline.inference.results import Answer, Drawing, SegmentedObject
from pipeline.inference.streaming import AnswerStreamer
from pipeline.model.generation import Generation, full_size

Item = TypeVar("Item")
MAX_TEXT = 20_000
"""Characters of a question at most; far more than any model's room, and tokenised in no time."""


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """A picture that CLIP has seen: features of one row, and its (height, width) as it is shown."""

    features: VisionFeatures
    size: tuple[int, int]


Picture = str | PathLike[str] | bytes | Image.Image | np.ndarray | Look


class NeuralTuner:
    """A tuned model with its frozen foundations. Calls from several threads take turns."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.tuner, self.token_map = loaded.tuner, loaded.token_map
        self.device = loaded.device
        self._turn = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | PathLike[str] = "",
        *,
        base: str = "",
        base_quant: str = "",
        clip: str = "",
        clip_weights: str = "",
        vqgan: str = "",
        prior: str = "",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        mechanism: str | None = None,
    ) -> NeuralTuner:
        """Loads a checkpoint folder, a run's folder (its newest whole checkpoint) or an exported folder.

        Args:
            checkpoint: empty takes runs/mini or runs/quickstart of this checkout.
            base, clip, clip_weights, vqgan, prior: where the frozen models lie, if not where they lay in training.
            base_quant: bits of the frozen LM ("none", "nf4", "int8"), if not those of training.
            device: the first GPU if there is one, else the CPU.
            dtype: of the frozen LM; bfloat16 on a GPU, float32 on the CPU. What was trained stays float32.
            mechanism: refuse a checkpoint that was tuned with another one ("paper", "released").

        Raises:
            ValueError: something is missing, damaged or does not belong together; the message says what to do.
        """
        paths = {"base": base, "clip": clip, "clip_weights": clip_weights, "vqgan": vqgan, "prior": prior}
        paths["base_quant"] = base_quant
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load(str(checkpoint), replaced=paths, device=chosen, dtype=dtype, mechanism=mechanism))

    def save_pretrained(self, folder: str | PathLike[str], *, license: str = "other") -> Path:
        """Exports what was loaded: see `pipeline.inference.export`."""
        return save_pretrained(self.loaded.trained.folder, folder, license=license)

    def streamer(self, timeout: float | None = None) -> AnswerStreamer:
        """A streamer for one call with one text, read from another thread."""
        return AnswerStreamer(self.token_map, timeout)

    def look(self, image: Picture) -> Look:
        """What CLIP sees of a picture, for many calls about it. Raises ValueError for what is no picture."""
        return self._look([image], 1)[0]

    def segment(self, image: Any, text: Any, **options: Any) -> Any:
        """Masks of what `text` names, e.g. "the red circle and the blue star". See `reason` for the rest."""
        template = prompts.REFERRING[0]
        return self._answers(
            "referring", image, text, lambda phrase: template.replace("{phrases}", phrase.strip().rstrip(".")), options
        )

    def reason(self, image: Any, question: Any, **options: Any) -> Any:
        """The answer to a question about a picture, with masks of the objects that it names.

        Args:
            image: a picture, or a list of them.
            question: a text, or a list: as many as there are pictures, or several about the one picture.
            options: max_new_tokens (64), min_score (0): objects below it go to `left_out`; batch_size (8); streamer;
                seed, which makes sampled answers repeatable; what transformers' generate takes.

        Returns:
            An `Answer`; a list of them if either argument was a list.
        """
        return self._answers("reasoning", image, question, str, options)

    def caption(self, image: Any, **options: Any) -> Any:
        """A description of a picture, or of each of a list. See `reason` for the options."""
        return self._answers("caption", image, prompts.CAPTION[0], str, options)

    def generate(self, text: Any, *, n: int = 1, seed: int = 0, **options: Any) -> Any:
        """`n` pictures for a text, or for each of a list; the same text, n and seed give the same pictures.

        Args:
            options: candidates (4) drawn for each picture, the one nearest to the wanted CLIP embedding being kept;
                picture_temperature (1), picture_top_k (None: see `Sampling`), picture_top_p (.95) of the codes' draw;
                batch_size (8).

        Raises:
            ValueError: the model was loaded without a picture decoder.
        """
        painter = self.loaded.painter
        if painter is None:
            raise ValueError(
                f"{self.loaded.trained.folder} names no picture decoder: give prior= and vqgan= (--prior, --vqgan)"
            )
        if n < 1:
            raise ValueError(f"n, the number of pictures, must be at least 1, not {n}")
        sampling = replace(
            painter.sampling,
            candidates=options.pop("candidates", painter.sampling.candidates),
            temperature=options.pop("picture_temperature", painter.sampling.temperature),
            top_k=options.pop("picture_top_k", painter.sampling.top_k),
            top_p=options.pop("picture_top_p", painter.sampling.top_p),
        )
        texts = [text] if isinstance(text, str) else list(text)
        drawings = []
        for part in _chunks(texts, options.pop("batch_size", 8)):
            questions = [prompts.GENERATION[0].replace("{caption}", _checked(each)) for each in part]
            for each, generation in zip(part, self._run("generation", None, questions, seed=seed, **options)):
                pictures = []
                if generation.embedding is not None:
                    # Text by text, so that a picture does not depend on the others of its batch.
                    pictures = painter.paint(generation.embedding.expand(n, -1), seed, sampling)
                answer = self.token_map.decode(generation.ids)
                drawings.append(Drawing(text=each, answer=answer, seed=seed, pictures=pictures))
        return drawings[0] if isinstance(text, str) else drawings

    def _answers(self, task: str, image: Any, text: Any, ask: Any, options: dict[str, Any]) -> Any:
        single = not isinstance(image, list | tuple) and not isinstance(text, list | tuple)
        images = list(image) if isinstance(image, list | tuple) else [image]
        texts = list(text) if isinstance(text, list | tuple) else [text]
        if not images or not texts:
            return []
        rows = max(len(images), len(texts))
        if {len(images), len(texts)} - {1, rows}:
            raise ValueError(f"{len(images)} pictures and {len(texts)} texts: give as many of both, or one of either")
        if options.get("streamer") is not None and rows > 1:
            raise ValueError("a streamer follows one answer: call once for each text")
        size, least = options.pop("batch_size", 8), options.pop("min_score", 0.0)
        questions = [ask(_checked(each)) for each in texts] * (rows // len(texts))
        seen = self._look(images, 1) * rows if len(images) == 1 else []
        answers = []
        for places in _chunks(range(rows), size):
            asked = [questions[place] for place in places]
            looks = [seen[place] for place in places] if seen else self._look([images[place] for place in places], size)
            for question, look, generation in zip(asked, looks, self._run(task, looks, asked, **options), strict=True):
                answers.append(self._answer(task, question, look, generation, least))
        return answers[0] if single else answers

    def _look(self, images: Sequence[Picture], size: int) -> list[Look]:
        fresh = [(place, *self._pixels(image)) for place, image in enumerate(images) if not isinstance(image, Look)]
        looks: dict[int, Look] = {i: image for i, image in enumerate(images) if isinstance(image, Look)}
        for part in _chunks(fresh, size):
            features = self.loaded.vision(torch.stack([pixels for _, pixels, _ in part]).to(self.device))
            for row, (place, _, shape) in enumerate(part):
                looks[place] = Look(features.select(torch.tensor([row])), shape)
        return [looks[place] for place in range(len(images))]

    def _pixels(self, image: Picture) -> tuple[torch.Tensor, tuple[int, int]]:
        """CLIP's input and the picture's (height, width)."""
        collator = self.loaded.collator
        into: Mapping[str, Any] = {"image_size": collator.image_size, "mean": collator.mean, "std": collator.std}
        if isinstance(image, str | PathLike):
            path = Path(image)
            try:
                image = path.read_bytes()
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
        if isinstance(image, bytes):
            return to_pixels(image, **into), size_of(image)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"an array must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}")
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise ValueError(f"a picture is a path, bytes, a PIL image or an array, not {type(image).__name__}")
        return pixels_of(as_rgb(image), **into), (image.height, image.width)

    def _run(
        self,
        task: str,
        looks: Sequence[Look] | None,
        questions: Sequence[str],
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        **options: Any,
    ) -> list[Generation]:
        """One batch through the model; questions about one picture share what comes before them."""
        made, shared = self.loaded.collator.ask(
            [str(i) for i in range(len(questions))], task, questions, answer=max_new_tokens
        )
        made = made.to(self.device)
        if looks is None:
            features, shared, of_row = self._no_pictures(len(questions)), 0, None
        else:
            distinct = list({id(look): look for look in looks}.values())
            place = {id(look): i for i, look in enumerate(distinct)}
            of_row = torch.tensor([place[id(look)] for look in looks], device=self.device)
            features = _joined([look.features for look in distinct])
            shared = shared if len(distinct) < len(looks) else 0
        with self._turn, torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            if seed is not None:
                torch.manual_seed(seed)
            return self.tuner.generate(
                made,
                features,
                max_new_tokens=max_new_tokens,
                pictures=of_row,
                shared=shared,
                eos_token_id=self.token_map.eos_id,
                **options,
            )

    def _no_pictures(self, rows: int) -> VisionFeatures:
        """Features for prompts that show none: every module is still called, as in training."""
        side = self.loaded.collator.image_size
        return self.loaded.vision(torch.zeros(1, 3, side, side, device=self.device)).select(
            torch.zeros(rows, dtype=torch.long)
        )

    def _answer(self, task: str, question: str, look: Look, generation: Generation, least: float) -> Answer:
        tagged = self.token_map.decode(generation.ids)
        text, mentions = read_answer(tagged)
        spans = {mention.number: mention.span for mention in mentions}
        kept: list[SegmentedObject] = []
        left_out: list[SegmentedObject] = []
        logits = generation.mask_logits
        masks = full_size(logits, look.size) if logits is not None else ()
        for k, (number, mask) in enumerate(zip(generation.object_numbers, masks, strict=True)):
            assert logits is not None
            span = spans.get(number)
            inside = logits[k] > 0
            sure = float(logits[k].sigmoid()[inside].mean()) if bool(inside.any()) else 0.0
            full = mask.cpu().numpy()
            found = SegmentedObject(
                number=number,
                phrase=text[slice(*span)] if span else "",
                span=span,
                mask=full,
                box=rle.bounding_box(rle.encode(full)) if full.any() else None,
                score=sure * generation.object_chances[k],
            )
            (kept if found.box is not None and found.score >= least else left_out).append(found)
        return Answer(
            task=task, question=question, text=text, tagged=tagged, size=look.size, objects=kept, left_out=left_out
        )


def _joined(features: Sequence[VisionFeatures]) -> VisionFeatures:
    return VisionFeatures(
        tokens=torch.cat([each.tokens for each in features]),
        taps=tuple(torch.cat(taps) for taps in zip(*(each.taps for each in features), strict=True)),
        embedding=torch.cat([each.embedding for each in features]),
    )


def _checked(text: Any) -> str:
    """`text` if it is one of a sensible length; ValueError otherwise."""
    if not isinstance(text, str):
        raise ValueError(f"a text must be a str, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text has {len(text)} characters, {MAX_TEXT} are allowed: shorten it")
    if not text.strip():
        raise ValueError("there is no text: write a question or a phrase")
    return text


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, not {size}")
    return [items[start : start + size] for start in range(0, len(items), size)]
