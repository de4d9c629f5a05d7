"""--clip_features: embeddings made while packing are CLIP's own, the same in any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.assembly.embedding import EmbeddedSource
from pipeline.data.images import to_pixels
from pipeline.data.mmud import MmudSource
from pipeline.data.reader import ShardDataset
from pipeline.data.writer import pack
from pipeline.model.vision import VisionTower

CLIP = f"local-dir:{Path(__file__).resolve().parents[1] / 'models' / 'mini' / 'clip'}"


def test_packed_embeddings_are_clips(data_dir, tmp_path):
    plain = MmudSource(data_dir / "mmud", data_dir / "mmud" / "images")
    source = EmbeddedSource(plain, CLIP)
    pack(source, "train", tmp_path / "a", samples_per_shard=3, progress=False)
    pack(source, "train", tmp_path / "b", samples_per_shard=3, workers=2, progress=False)
    one, two = (ShardDataset(tmp_path / name, "train") for name in "ab")
    assert one.digest == two.digest
    tower = VisionTower.from_local(CLIP)
    for sample in one:
        pixels = to_pixels(sample.image, image_size=tower.image_size, mean=tower.mean, std=tower.std)
        want = tower(pixels[None]).embedding[0]
        assert sample.clip is not None and sample.clip.shape == (tower.embed_dim,)
        assert torch.allclose(torch.from_numpy(sample.clip.astype(np.float32)), want, rtol=2e-3, atol=1e-4)
    assert source.fingerprint() != plain.fingerprint()
    with pytest.raises(ValueError, match="packed from another source"):
        pack(plain, "train", tmp_path / "a", samples_per_shard=3, progress=False)


def test_a_model_that_does_not_load_is_named_at_once(data_dir, tmp_path):
    plain = MmudSource(data_dir / "mmud", data_dir / "mmud" / "images")
    with pytest.raises(ValueError, match="no open_clip_config"):
        EmbeddedSource(plain, f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match="needs clip_weights"):
        EmbeddedSource(plain, "ViT-L-14-quickgelu")
