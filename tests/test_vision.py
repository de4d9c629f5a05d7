"""The vision tower on a tiny open_clip model in a local folder: features, shapes, texts, and refusals."""

import json
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from pipeline.model.vision import VisionTower, default_taps

MODEL = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def clip_folder(path, **changes):
    path.mkdir()
    config = {"model_cfg": {**MODEL, **changes}, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = open_clip.CLIP(**{**MODEL, **changes})
    save_file(clip.state_dict(), path / "open_clip_model.safetensors")
    return path, clip.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


def test_features_are_the_blocks_outputs(folder):
    path, clip = folder
    tower = VisionTower.from_local(f"local-dir:{path}", taps=(0, 2))
    assert (tower.image_size, tower.patch_size, tower.grid, tower.width) == (32, 8, 4, 32)
    assert (tower.embed_dim, tower.layers, tower.mean, tower.std) == (12, 4, (0.4,) * 3, (0.3,) * 3)
    pixels, blocks = torch.randn(3, 3, 32, 32), []
    for block in clip.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, __, out: blocks.append(out))
    with torch.no_grad():
        want = clip.encode_image(pixels)
    features = tower(pixels)
    assert torch.allclose(features.embedding, want, atol=1e-5) and want.norm(dim=1).sub(1).abs().min() > 1e-3
    assert torch.equal(features.tokens, blocks[3]) and features.tokens.shape == (3, 17, 32)
    assert len(features.taps) == 2
    assert torch.equal(features.taps[0], blocks[0]) and torch.equal(features.taps[1], blocks[2])
    picked = features.select(torch.tensor([2, 2, 0]))
    assert torch.equal(picked.taps[1], blocks[2][[2, 2, 0]])


def test_tower_is_frozen_and_stays_in_eval_mode(folder):
    tower = VisionTower.from_local(f"local-dir:{folder[0]}").train()
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower(torch.randn(1, 3, 32, 32)).tokens.requires_grad
    assert tower.taps == (0, 1, 3)


def test_texts_are_encoded_and_cut(folder):
    path, clip = folder
    tower = VisionTower.from_local(f"local-dir:{path}")
    texts = ["a red circle", "word " * 100]
    with torch.no_grad():
        want = clip.encode_text(open_clip.get_tokenizer(f"local-dir:{path}")(texts))
    assert torch.allclose(tower.encode_text(texts), want, atol=1e-5) and want.shape == (2, 12)


def test_default_taps_reach_the_last_block():
    assert default_taps(24) == (7, 15, 23) and default_taps(3) == (0, 1, 2)
    with pytest.raises(ValueError, match="too few"):
        default_taps(2)


def test_pictures_of_another_size_are_refused(folder):
    with pytest.raises(ValueError, match="32"):
        VisionTower.from_local(f"local-dir:{folder[0]}")(torch.randn(1, 3, 16, 16))


def test_missing_weights_never_become_random_ones(tmp_path, folder):
    with pytest.raises(ValueError, match="clip_weights"):
        VisionTower.from_local("ViT-B-32")
    with pytest.raises(ValueError, match="clip_weights"):
        VisionTower.from_local("ViT-B-32", str(tmp_path / "absent.safetensors"))
    with pytest.raises(ValueError, match="open_clip_config.json"):
        VisionTower.from_local(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match="local-dir"):
        VisionTower.from_local("hf-hub:someone/clip")
    path, _ = clip_folder(tmp_path / "bare")
    (path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not load"):
        VisionTower.from_local(f"local-dir:{path}")
    with pytest.raises(ValueError, match="does not load"):
        VisionTower.from_local("ViT-B-32", str(folder[0] / "open_clip_model.safetensors"))


def test_openai_weights_without_quickgelu_are_refused(tmp_path):
    path, _ = clip_folder(tmp_path / "vit_tiny.openai", quick_gelu=False)
    with pytest.raises(ValueError, match="quickgelu"):
        VisionTower.from_local(f"local-dir:{path}")
    fine, _ = clip_folder(tmp_path / "vit_small.openai")
    VisionTower.from_local(f"local-dir:{fine}")


def test_torchscript_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        archive.writestr("ViT-B-32/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript"):
        VisionTower.from_local("ViT-B-32-quickgelu", str(tmp_path / "ViT-B-32.pt"))


def test_unfit_taps_are_named(folder):
    for taps in ((1, 1), (2, 0), (0, 4), (-1, 2)):
        with pytest.raises(ValueError, match="clip_taps"):
            VisionTower.from_local(f"local-dir:{folder[0]}", taps=taps)
