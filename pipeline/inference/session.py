"""What the page does with a model, however the page is drawn: looks once at each picture, streams, packs."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.images import load
from pipeline.inference.api import Look, NeuralTuner
from pipeline.inference.neurons import Firing, recorded
from pipeline.inference.overlay import overlay
from pipeline.inference.results import Answer, Drawing
from pipeline.inference.uploads import Upload

_KEPT = 16
"""Pictures whose features are kept: a second question about one costs no second look."""


class Session:
    """A model that answers a page's visitors, one at a time."""

    def __init__(self, model: NeuralTuner) -> None:
        self.model = model
        self._looks: OrderedDict[str, Look] = OrderedDict()
        self._turn = threading.Lock()

    def look(self, upload: Upload) -> Look:
        """What CLIP sees of a picture, computed once."""
        key = hashlib.sha256(upload.data).hexdigest()
        if key not in self._looks:
            self._looks[key] = self.model.look(upload.data)
        self._looks.move_to_end(key)
        while len(self._looks) > _KEPT:
            self._looks.popitem(last=False)
        return self._looks[key]

    def answer(self, task: str, upload: Upload, text: str, **options: Any) -> Iterator[str | tuple[Answer, Firing]]:
        """The text so far after each word, and at last the answer with the neurons that fired.

        task: "reason", "segment" or "caption". Raises ValueError as the model does.
        """
        streamer = self.model.streamer(timeout=600)
        ask = getattr(self.model, task)
        found: list[tuple[Answer, Firing]] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with self._turn, recorded(self.model.tuner.networks) as firing:
                    arguments = (self.look(upload),) if task == "caption" else (self.look(upload), text)
                    answer = ask(*arguments, streamer=streamer, **options)
                found.append((answer, firing))
            except BaseException as error:
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=run, name="answer", daemon=True)
        thread.start()
        written = ""
        for piece in streamer:
            written += piece
            yield written
        thread.join()
        if errors:
            raise errors[0]
        yield found[0]


def pack_answer(answer: Answer, upload: Upload, path: Path) -> Path:
    """A zip of answer.json (masks as COCO RLE), the overlay and the masks, at the picture's own resolution."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("answer.json", json.dumps(answer.to_json(), indent=1, ensure_ascii=False))
        archive.writestr("overlay.png", _png(overlay(load(upload.data), answer.objects)))
        for each in answer.objects:
            archive.writestr(f"mask-{each.number}.png", _png(Image.fromarray(each.mask)))
    return path


def pack_drawing(drawing: Drawing, path: Path) -> Path:
    """A zip of drawing.json and the pictures."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("drawing.json", json.dumps(drawing.to_json(), indent=1, ensure_ascii=False))
        for place, data in enumerate(drawing.pictures):
            archive.writestr(f"picture-{place}.png", data)
    return path


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
