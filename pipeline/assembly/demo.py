"""The page of demo.py out of its flags: the model, its examples, the page."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config import DemoArguments, LoadArguments
from pipeline.inference.api import NeuralTuner
from pipeline.inference.session import Session
from pipeline.mini.source import MiniSource

if TYPE_CHECKING:
    from pipeline.inference.page import Page

_EXAMPLES = (65, 89, 28, 6)
"""Scenes of the mini world's test split, which no model was tuned on."""


def make_page(where: LoadArguments, asked: DemoArguments) -> Page:
    """Loads the model and builds the page. Raises ValueError for what a user can mend, gradio's absence included."""
    try:
        from pipeline.inference.page import Page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs gradio: pip install -e .[demo]") from None
    model = NeuralTuner.from_pretrained(**where.model, dtype=getattr(torch, where.dtype, None))
    trained = model.loaded.trained
    mini = trained.model.preset == "mini"
    with tempfile.TemporaryDirectory() as folder:
        return Page(
            Session(model),
            name=f"{trained.folder.parent.name}/{trained.folder.name}",
            examples=_mini_examples(Path(folder)) if mini else [],
            descriptions=[MiniSource().load("test", i).caption for i in _EXAMPLES] if mini else [],
            max_megapixels=asked.max_megapixels,
            max_bytes=asked.max_upload_mb << 20,
            max_new_tokens=asked.max_new_tokens,
        )


def _mini_examples(folder: Path) -> list[tuple[str, str, str]]:
    """(picture, question, phrase) of scenes drawn into `folder`; gradio copies them into the page's own."""
    examples = []
    for i in _EXAMPLES:
        sample = MiniSource().load("test", i)
        path = folder / f"scene-{i}.{sample.image_format}"
        path.write_bytes(sample.image)
        phrases = [thing.phrases[0] for thing in sample.objects if thing.phrases][:2]
        examples.append((str(path), sample.question, " and ".join(phrases)))
    return examples
