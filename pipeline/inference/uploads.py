"""Picture files from strangers: what the page takes, and what it says of the rest.

A picture is judged by its first bytes, never by its name or what a browser called it, and its size is read before any
pixel is made.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.images import load, open_picture, size_of

SHOWN = 1024
"""Longest side of a picture as the page shows it, in pixels."""


@dataclass(frozen=True, slots=True)
class Upload:
    """data: the file. size: (height, width) as seen. shown: an RGB copy no larger than SHOWN."""

    data: bytes
    size: tuple[int, int]
    shown: Image.Image

    def shown_jpeg(self) -> bytes:
        """The copy as a file for the page."""
        file = io.BytesIO()
        self.shown.save(file, "JPEG", quality=92)
        return file.getvalue()


def read_upload(path: str | Path | None, *, max_megapixels: int, max_bytes: int) -> Upload:
    """The picture in a file; EXIF turning applied, CMYK and alpha brought to RGB for show.

    Raises:
        ValueError: there is none, it is no JPEG or PNG, it moves, it is too large, or it is damaged.
    """
    if not path:
        raise ValueError("There is no picture yet: upload one, or click an example.")
    file = Path(path)
    if file.stat().st_size > max_bytes:
        raise ValueError(f"The file is larger than {max_bytes >> 20} MB: shrink the picture first.")
    data = file.read_bytes()
    image = open_picture(data)
    height, width = size_of(data)
    if height * width > max_megapixels * 1_000_000:
        raise ValueError(
            f"The picture has {width} x {height} pixels, more than the {max_megapixels} million that this page takes: "
            "shrink it first."
        )
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        raise ValueError("The picture is an animation: give a still picture.")
    shown = load(data, draft=2 * SHOWN)
    shown.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    return Upload(data, (height, width), shown)
