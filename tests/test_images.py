"""The one picture transform and the shrinking of masks: kinds of pictures, bombs, and what is lost beside full size."""

from __future__ import annotations

import io

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import images, rle
from pipeline.data.mmud import MmudSource
from pipeline.data.schema import Sample

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


@pytest.fixture(scope="module")
def samples(data_dir) -> list[Sample]:
    source = MmudSource(data_dir / "mmud", data_dir / "mmud" / "images")
    return [each for split in source.splits() for each in source.iterate(split) if isinstance(each, Sample)]


@pytest.fixture(scope="module")
def pictures(samples) -> list[bytes]:
    return [sample.image for sample in samples]


def encoded(image: Image.Image, form: str, **more) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **more)
    return out.getvalue()


def test_pictures_of_every_mode_become_rgb():
    red = Image.new("RGB", (40, 30), (200, 10, 10))
    clear = Image.new("RGBA", (40, 30), (200, 10, 10, 0))
    deep = Image.fromarray(np.full((30, 40), 0x8000, np.uint16))
    for data, colour in (
        (encoded(red, "JPEG", quality=95), (200, 10, 10)),
        (encoded(red.convert("CMYK"), "JPEG", quality=95), (200, 10, 10)),
        (encoded(red.convert("L"), "JPEG"), (67, 67, 67)),
        (encoded(red.convert("P"), "PNG"), (200, 10, 10)),
        (encoded(clear, "PNG"), (255, 255, 255)),
        (encoded(deep, "PNG"), (128, 128, 128)),
    ):
        assert np.abs(np.asarray(images.load(data)).mean((0, 1)) - colour).max() < 8
        assert images.to_pixels(data, image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3).shape == (3, 16, 16)


def test_pictures_are_turned_as_their_exif_says():
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture, "JPEG", exif=exif)
    turned = images.load(data)
    assert turned.size == (20, 40)
    assert images.size_of(data) == (40, 20)
    assert turned.getpixel((10, 5)) == (255, 255, 255)


def test_bombs_are_refused_before_they_are_decoded():
    data = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(data) < 100_000
    with pytest.raises(ValueError, match="limit of 64000000 pixels"):
        images.load(data)


def test_draft_decoding_is_close_to_full_decoding(pictures):
    full = images.pixels_of(images.load(pictures[0]), image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    fast = images.to_pixels(pictures[0], image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert 0 < (full - fast).abs().mean() < 0.03


def levels_from_open_clip(pictures, originals) -> list[np.ndarray]:
    """Per picture, how many of 255 levels our pixels are away from open_clip's of the original."""
    theirs = open_clip.image_transform(224, is_train=False, mean=MEAN, std=STD, resize_mode="squash")
    to_levels = 255 * torch.tensor(STD)[:, None, None]
    pairs = zip(pictures, originals, strict=True)
    ours = ((images.to_pixels(data, image_size=224, mean=MEAN, std=STD), original) for data, original in pairs)
    return [((pixels - theirs(Image.open(io.BytesIO(o)))) * to_levels).abs().numpy() for pixels, o in ours]


def test_pixels_are_those_of_open_clips_own_preprocessing(pictures):
    """JPEGs decoded at full size, as all of COCO's are for CLIP's 224 pixels; what README states."""
    found = levels_from_open_clip(pictures, pictures)
    print(f"mean {np.mean(found):.4f}, most {np.max(found):.3f}")
    assert np.mean(found) < 0.04
    assert np.mean([(each > 1.01).mean() for each in found]) < 1e-4
    assert np.max(found) < 10


def test_a_picture_of_the_wanted_size_is_not_resampled(pictures):
    small = images.load(pictures[0]).resize((224, 224))
    pixels = images.pixels_of(small, image_size=224, mean=MEAN, std=STD)
    want = (np.asarray(small) / 255 - MEAN) / STD
    assert np.allclose(pixels.permute(1, 2, 0), want, atol=1e-6)


def test_pictures_resized_at_packing_lose_little(pictures):
    resized = [images.shrink(data, 224)[0] for data in pictures]
    assert all(min(images.size_of(data)) == 224 for data in resized)
    assert sum(map(len, resized)) < sum(map(len, pictures)) / 2
    found = levels_from_open_clip(resized, pictures)
    print(f"mean {np.mean(found):.3f}, most {np.max(found):.1f}")
    assert np.mean(found) < 2
    assert np.max(found) < 60


def overlaps(cells: int, pixels: int) -> np.ndarray:
    """[cells, pixels] how much of each cell is of each pixel."""
    edges, at = np.arange(cells + 1) / cells * pixels, np.arange(pixels)
    inner = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return np.maximum(inner, 0) * cells / pixels


def cover_of(mask_HW: np.ndarray, side: int) -> np.ndarray:
    """[side, side] the covered share of each cell, from the mask at full size."""
    return overlaps(side, mask_HW.shape[0]) @ mask_HW @ overlaps(side, mask_HW.shape[1]).T


def test_masks_shrunk_from_their_runs_are_those_shrunk_at_full_size(samples):
    """By exact area; beside a box filter of whole pixels, of which README states the difference."""
    ious = []
    for found in (each.mask for sample in samples for each in sample.objects):
        full = rle.decode(found)
        cover, small = cover_of(full, 144), rle.shrink(found, 144)
        doubtful = np.abs(cover - 0.5) < 1e-9
        assert np.array_equal(small[~doubtful], cover[~doubtful] > 0.5)
        box = np.asarray(Image.fromarray(full * 255).resize((144, 144), Image.Resampling.BOX)) >= 128
        ious.append((small * box).sum() / np.maximum(small, box).sum())
    print(f"IoU with a box filter: mean {np.mean(ious):.4f}, least {min(ious):.4f}")
    assert np.mean(ious) > 0.98


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 10), st.integers(0, 2**32))
def test_a_shrunk_mask_is_the_half_covered_cells_or_the_most_covered(height, width, side, tenths, seed):
    mask = (np.random.default_rng(seed).random((height, width)) < tenths / 10).astype(np.uint8)
    # Whole numbers throughout: each pixel as side x side smaller ones, counted by cell.
    fine = mask.repeat(side, 0).repeat(side, 1).reshape(side, height, side, width).sum((1, 3), dtype=np.int64)
    wanted = fine >= min(height * width / 2, max(1, fine.max()))
    assert np.array_equal(rle.shrink(rle.encode(mask), side), wanted)


def test_a_thin_object_keeps_a_target():
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 50] = 1
    small = rle.shrink(rle.encode(mask), 10)
    assert small[:, 5].tolist() == [1.0] * 10
    assert small.sum() == 10
