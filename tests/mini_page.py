"""The page of demo.py in this process, with a model that says what `mini_answers` makes it say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mini_answers import mini_checkpoint, saying, scene
from PIL import Image

from pipeline.inference import NeuralTuner
from pipeline.inference.page import Page
from pipeline.inference.session import Session
from pipeline.runtime.ranks import free_port

LIMITS = {"max_megapixels": 2, "max_bytes": 1 << 20}


def file_of(image: Image.Image, path: Path, **options) -> Path:
    """`image` as a file."""
    image.save(path, **options)
    return path


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The page's address, while it is served."""
    examples = []
    for i, question in enumerate(("Which object is highest?", "How many circles are there?")):
        path = folder / f"scene-{i}.jpg"
        path.write_bytes(scene(i))
        examples.append((str(path), question, "the red circle"))
    model = NeuralTuner.from_pretrained(mini_checkpoint(folder / "run"))
    page = Page(
        Session(model), name="test", examples=examples, descriptions=["a red circle"], max_new_tokens=20, **LIMITS
    )
    with saying(model):
        try:
            yield page.serve("127.0.0.1", free_port()).rstrip("/")
        finally:
            page.close()
