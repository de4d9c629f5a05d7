"""The one picture transform: file bytes to what CLIP is fed, for training, scoring and inference alike.

The whole picture is squashed to a square, as the masks are, so that a mask's pixel and a picture's patch stay over each
other. Pictures come from strangers: only JPEG and PNG are opened, and their size is checked before any pixel is made.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

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
    except UnidentifiedImageError:
        # Its own text names an object in memory.
        raise ValueError("the picture is no readable JPEG or PNG") from None
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
    return normalise([to_square(data, image_size)], mean=mean, std=std)[0]


def pixels_of(image: Image.Image, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """As to_pixels, of an RGB picture in memory."""
    return normalise([squash(image, image_size)], mean=mean, std=std)[0]


def to_square(data: bytes, image_size: int) -> torch.Tensor:
    """The first half of to_pixels: the picture in bytes, uint8 [3, image_size, image_size]."""
    # Twice the wanted side leaves the bicubic filter something to average, so drafting costs no quality.
    return squash(load(data, draft=2 * image_size), image_size)


def squash(image: Image.Image, image_size: int) -> torch.Tensor:
    """An RGB picture in bytes, uint8 [3, image_size, image_size].

    torch's bicubic filter on bytes is PIL's, which open_clip takes, in a third of the time. Its weights are rounded
    otherwise: three bytes in a hundred differ, almost all of them by 1.
    """
    picture_1CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    if image.size != (image_size, image_size):
        picture_1CHW = interpolate(picture_1CHW, (image_size, image_size), mode="bicubic", antialias=True)
    return picture_1CHW[0]


def normalise(pictures: Sequence[torch.Tensor], *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """CLIP's input [B,3,S,S], float32, of B >= 1 pictures from to_square: the second half of to_pixels."""
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (mean, std))
    scale_C11, shift_C11 = 1 / (255 * std_C11), -mean_C11 / std_C11
    pixels_BCHW = torch.empty(len(pictures), *pictures[0].shape)
    # One picture after the other stays in the processor's cache.
    for pixels_CHW, picture_CHW in zip(pixels_BCHW, pictures, strict=True):
        pixels_CHW.copy_(picture_CHW).mul_(scale_C11).add_(shift_C11)
    return pixels_BCHW


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
