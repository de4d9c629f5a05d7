"""The image prior and the painter: cached sampling against the full forward, files, the choice among candidates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.image_decoder import load_decoder
from pipeline.model.painter import Painter, Sampling
from pipeline.model.prior import ImagePrior, PriorConfig
from pipeline.model.vqgan import VQGAN, VQGANConfig

EMBED = 3


def tiny_prior(slots: int = 1, **changes: int) -> ImagePrior:
    torch.manual_seed(0)
    sizes = {"embed_dim": EMBED, "n_codes": 7, "n_tokens": 4, "width": 16, "layers": 2, "heads": 2} | changes
    prior = ImagePrior(PriorConfig(**sizes, dropout=0.0, condition_slots=slots)).eval()
    # Far from uniform, so that the likeliest code is clear.
    prior.transformer.lm_head.weight.data.mul_(40)
    return prior


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    config = VQGANConfig(
        resolution=8,
        ch=32,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        attn_resolutions=(),
        z_channels=8,
        embed_dim=4,
        n_embed=7,
    )
    return VQGAN(config).eval().requires_grad_(False)


def mean_colour(pictures: list[bytes]) -> Tensor:
    shown = [np.asarray(Image.open(io.BytesIO(p)), dtype=np.float32) / 127.5 - 1 for p in pictures]
    return torch.from_numpy(np.stack(shown)).mean((1, 2))


@pytest.mark.parametrize("slots", [1, 3])
def test_cached_sampling_follows_the_full_forward(slots: int) -> None:
    prior, embedding = tiny_prior(slots), torch.randn(5, EMBED)
    codes = prior.sample(embedding, temperature=0)
    assert codes.shape == (5, 4)
    assert torch.equal(prior(embedding, codes).argmax(-1), codes)
    assert len({tuple(row) for row in codes.tolist()}) > 1, "the condition decides the codes"
    assert torch.equal(prior.sample(7 * embedding, temperature=0), codes), "an embedding's length does not count"


def test_position_i_never_sees_code_i() -> None:
    prior, embedding, codes = tiny_prior(2), torch.randn(1, EMBED), torch.tensor([[1, 2, 3, 4]])
    other = codes.clone()
    other[0, 2] = 6
    same = (prior(embedding, codes) - prior(embedding, other)).abs().amax(-1)[0] < 1e-6
    assert same.tolist() == [True, True, True, False]


def test_the_seed_decides_the_draw_and_nothing_else_moves() -> None:
    prior, embedding = tiny_prior(), torch.randn(8, EMBED)
    prior.transformer.lm_head.weight.data.div_(40)
    state = torch.random.get_rng_state()
    first = prior.sample(embedding, seed=1)
    assert torch.equal(first, prior.sample(embedding, seed=1))
    assert not torch.equal(first, prior.sample(embedding, seed=2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_row_is_drawn_alike_whatever_stands_beside_it() -> None:
    prior, embedding = tiny_prior(), torch.randn(8, EMBED)
    prior.transformer.lm_head.weight.data.div_(40)
    codes = prior.sample(embedding, top_k=6, top_p=0.9)
    assert torch.equal(prior.sample(embedding[5:7], top_k=6, top_p=0.9, keys=[(5,), (6,)]), codes[5:7])


def test_draws_follow_the_softmax() -> None:
    prior = tiny_prior()
    wanted = prior(embedding := torch.randn(1, EMBED), torch.zeros(1, 4, dtype=torch.long))[0, 0].softmax(-1)
    first = prior.sample(embedding.expand(4000, -1), temperature=1.0)[:, 0]
    found = torch.bincount(first, minlength=len(wanted)) / 4000
    assert (found - wanted).abs().max() < 0.03
    kept = prior.sample(embedding.expand(500, -1), top_k=2)[:, 0]
    assert set(kept.tolist()) == set(wanted.topk(2).indices.tolist())


def test_saved_and_read_again(tmp_path: Path) -> None:
    prior, embedding = tiny_prior(2), torch.randn(2, EMBED)
    prior.save(tmp_path)
    read = ImagePrior.load(tmp_path)
    assert read.config == prior.config
    assert torch.equal(read.sample(embedding, temperature=0), prior.sample(embedding, temperature=0))
    config = (tmp_path / "config.json").read_text()
    for changed, message in (
        (config.replace('"layers": 2', '"layers": 3'), "does not fit its config.json"),
        (config.replace('"layers"', '"storeys"'), "names storeys; it may hold condition_slots"),
        (config[:20], "is no JSON"),
        ("[]", "must hold an object, found a list"),
    ):
        (tmp_path / "config.json").write_text(changed)
        with pytest.raises(ValueError, match=message):
            ImagePrior.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cut off or no safetensors file"):
        ImagePrior.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        ImagePrior.load(tmp_path)


def test_a_decoder_is_named_by_its_folder(vqgan: VQGAN, tmp_path: Path) -> None:
    vqgan.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for named in ({}, {"decoder": "vqgan"}):
        (tmp_path / "config.json").write_text(json.dumps(config | named))
        assert isinstance(load_decoder(tmp_path), VQGAN)
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder": "brush"}))
    with pytest.raises(ValueError, match="names the decoder 'brush', but there are vqgan"):
        load_decoder(tmp_path)


def test_the_candidate_nearest_to_the_wish_is_kept(vqgan: VQGAN) -> None:
    wanted = torch.randn(6, EMBED)

    def near(candidates: int) -> Tensor:
        prior = tiny_prior()
        prior.transformer.lm_head.weight.data.zero_()  # every code is as likely as another
        painter = Painter(prior, vqgan, mean_colour, EMBED, Sampling(top_k=0, top_p=1.0, candidates=candidates))
        drawn = painter.paint(wanted, seed=3)
        assert drawn == painter.paint(wanted, seed=3)
        return F.cosine_similarity(mean_colour(drawn), wanted)

    assert near(32).mean() > near(1).mean()
    # All candidates of the first picture, drawn one by one from the same codes: the kept one is the best of them.
    prior = tiny_prior()
    prior.transformer.lm_head.weight.data.zero_()
    codes = prior.sample(wanted[:1].repeat(32, 1), top_k=0, top_p=1.0, seed=3, keys=[(0, i) for i in range(32)])
    pixels = ((vqgan.pictures(codes) + 1) * 127.5).round() / 127.5 - 1
    best = F.cosine_similarity(pixels.mean((2, 3)), wanted[:1]).max()
    painter = Painter(prior, vqgan, mean_colour, EMBED, Sampling(top_k=0, top_p=1.0, candidates=32))
    kept = F.cosine_similarity(mean_colour(painter.paint(wanted[:1], seed=3)), wanted[:1])
    assert kept.item() == pytest.approx(best.item(), abs=1e-5)


def test_models_that_do_not_belong_together_are_refused(vqgan: VQGAN) -> None:
    with pytest.raises(ValueError, match="give a prior that was trained on this decoder"):
        Painter(tiny_prior(n_codes=9), vqgan, mean_colour, EMBED, Sampling())
    with pytest.raises(ValueError, match="give a prior that was trained on this CLIP"):
        Painter(tiny_prior(), vqgan, mean_colour, EMBED + 1, Sampling())
