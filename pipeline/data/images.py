"""The one picture transform: file bytes to what CLIP is fed, for training, scoring and inference alike.

The whole picture is squashed to a square, as the masks are, so that a mask's pixel and a picture's patch stay over each
other. Pictures come from strangers: only JPEG and PNG are opened, and their size is checked before any pixel is made.
"""

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
FORMATS = {"JPEG": "jpg", "PNG": "png"}


def open_picture(data: bytes) -> Image.Image:
    """The picture, opened but not decoded. ValueError if it is no JPEG or PNG, or larger than MAX_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"the picture is larger than the limit of {MAX_PIXELS} pixels: shrink it first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the picture is no readable JPEG or PNG: {str(error)[:80]}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"the picture has {image.width} x {image.height} pixels, above the limit of {MAX_PIXELS}: shrink it first"
        )
    return image


def load(data: bytes, draft: int | None = None) -> Image.Image:
    """The decoded picture as RGB, turned as its EXIF says, alpha laid over white, 16 bits brought to 8.

    `draft`: decode a JPEG at a fraction of its size, no side below `draft` pixels (much faster for large pictures).
    ValueError if the file is cut or damaged.
    """
    image = open_picture(data)
    try:
        if draft:
            image.draft(None, (draft, draft))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture is cut or damaged: {str(error)[:80]}") from None
    return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in memory as RGB, alpha laid over white, 16 bits brought to 8."""
    if image.mode.startswith("I"):
        # convert() would clip 16-bit grey at 255 and leave a white picture.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # convert() would copy a picture that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as seen, that is with EXIF turning applied; nothing is decoded."""
    image = open_picture(data)
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, TypeError):
        turned = False
    return (image.width, image.height) if turned else (image.height, image.width)


def to_pixels(data: bytes, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """CLIP's input [3, image_size, image_size], float32. `mean` and `std` are per channel, of values in 0..1."""
    # Twice the wanted side leaves the bicubic filter something to average, so drafting costs no quality.
    return pixels_of(load(data, draft=2 * image_size), image_size=image_size, mean=mean, std=std)


def pixels_of(image: Image.Image, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """As to_pixels, of an RGB picture in memory."""
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels_CHW = np.empty((3, image_size, image_size), np.float32)
    for channel, values, out in zip(image.split(), _normalised(tuple(mean), tuple(std)), pixels_CHW, strict=True):
        np.take(values, np.asarray(channel), out=out, mode="clip")
    return torch.from_numpy(pixels_CHW)


@lru_cache(maxsize=8)
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """[3, 256] float32: what each byte of each channel becomes. Looking up is faster than computing, and the same."""
    unit = np.arange(256, dtype=np.float32) / np.float32(255)
    return (unit - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]


def shrink(data: bytes, side: int) -> tuple[bytes, str]:
    """(bytes, "jpg") of the picture with its shorter side brought down to `side` pixels, or the bytes as they are if
    it is no larger. JPEG quality 95."""
    image = open_picture(data)
    if min(image.size) <= side:
        return data, FORMATS[str(image.format)]
    image = load(data)
    scale = side / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue(), "jpg"


def shrink_mask(mask_HW: np.ndarray, side: int) -> torch.Tensor:
    """A mask [H,W] in {0,1} squashed to float32 [side, side] in {0,1}: 1 where at least half is covered.

    An object too thin for that keeps its most covered cells: an empty target would teach that nothing is there.
    """
    cover = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    cover_KK = np.asarray(cover)
    return torch.from_numpy((cover_KK >= min(128, max(1, int(cover_KK.max())))).astype(np.float32))
