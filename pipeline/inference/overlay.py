"""Masks over pictures: each object in a colour of its own, the same in every place where the object is shown."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageFilter

from pipeline.inference.results import SegmentedObject
from pipeline.scoring.contact_sheet import PALETTE

ALPHA, DIM = 0.55, 0.45
"""How strong a mask's colour is, and what is left of the light outside all masks."""


def colour_of(number: int) -> str:
    """The colour of <OBJ-number>, as #rrggbb; from the ninth on they repeat."""
    return PALETTE[(number - 1) % len(PALETTE)]


def layer(mask_HW: np.ndarray, number: int, size: tuple[int, int] | None = None) -> bytes:
    """One mask as a PNG to lay over its picture: its colour half transparent inside, opaque at the rim.

    size: (width, height) to shrink to, for a page; the mask's own otherwise.
    """
    inside = Image.fromarray(mask_HW.astype(np.uint8) * 255)
    if size is not None:
        inside = inside.resize(size, Image.Resampling.BILINEAR)
    rim = rim_of(inside)
    alpha = np.maximum(np.asarray(inside) * ALPHA, np.asarray(rim)).astype(np.uint8)
    image = Image.new("RGBA", inside.size, colour_of(number))
    image.putalpha(Image.fromarray(alpha))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rim_of(inside: Image.Image) -> Image.Image:
    """The rim just inside a mask ("L", 0..255), about a two-hundredth of the picture wide."""
    hard = inside.point(lambda value: 255 if value > 127 else 0)
    width = max(1, round(min(hard.size) / 200))
    # A frame of zeros, so that objects cut by the picture's edge get a rim there too.
    framed = Image.new("L", (hard.width + 2, hard.height + 2), 0)
    framed.paste(hard, (1, 1))
    inner = framed.filter(ImageFilter.MinFilter(2 * width + 1)).crop((1, 1, hard.width + 1, hard.height + 1))
    return Image.fromarray(np.asarray(hard) & ~np.asarray(inner))


def overlay(picture: Image.Image, objects: Sequence[SegmentedObject]) -> Image.Image:
    """The picture, dimmed where no object is, with every mask in its colour."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    covered = np.zeros(pixels.shape[:2], bool)
    for each in objects:
        covered |= each.mask
    shown = np.where(covered[..., None], pixels, pixels * DIM) if objects else pixels
    for each in objects:
        colour = np.asarray(ImageColor.getrgb(colour_of(each.number)), dtype=np.float32)
        rim = np.asarray(rim_of(Image.fromarray(each.mask.astype(np.uint8) * 255))) > 0
        shown = np.where(each.mask[..., None], shown * (1 - ALPHA) + colour * ALPHA, shown)
        shown = np.where(rim[..., None], colour, shown)
    return Image.fromarray(shown.round().astype(np.uint8))
