"""Projector, mask decoder, CLIP head and losses: shapes, geometry, values by hand, dtypes."""

import pytest
import torch
from torch import nn

from pipeline.model import losses
from pipeline.model.decoders import ClipHead, ImageProjector, MaskDecoder
from pipeline.model.initialise import initialise


@pytest.mark.parametrize("use_cls", [True, False])
@pytest.mark.parametrize("merge", [1, 2, 4])
def test_projector_keeps_patches_in_their_squares(merge, use_cls):
    projector = ImageProjector(6, 10, merge=merge, use_cls=use_cls)
    initialise(projector, 0)
    tokens = torch.randn(2, 17, 6)
    want = projector(tokens)
    assert want.shape == (2, projector.n_tokens(4), 10)
    for patch in (0, 5, 11, 15):
        moved = tokens.clone()
        moved[:, 1 + patch] += torch.randn(6)
        changed = (projector(moved) != want).any(-1).any(0).nonzero().flatten().tolist()
        row, column = patch // 4 // merge, patch % 4 // merge
        assert changed == [row * (4 // merge) + column + int(use_cls)]
    moved = tokens.clone()
    moved[:, 0] += torch.randn(6)
    assert (projector(moved) != want).any(-1).any(0).nonzero().flatten().tolist() == ([0] if use_cls else [])


def test_projector_merges_by_hand():
    projector = ImageProjector(3, 5, merge=2, use_cls=False)
    initialise(projector, 1)
    tokens = torch.randn(1, 17, 3)
    square = torch.cat([tokens[0, 1 + i] for i in (2, 3, 6, 7)])
    normed = (square - square.mean()) / (square.var(correction=0) + 1e-5).sqrt()
    want = projector.patches.weight @ normed + projector.patches.bias
    assert torch.allclose(projector(tokens)[0, 1], want, atol=1e-6)


def test_projector_counts_tokens_and_starts_at_the_embeddings_scale():
    assert ImageProjector(8, 8).n_tokens(16) == 257 and ImageProjector(8, 8, merge=2, use_cls=False).n_tokens(16) == 64
    with pytest.raises(ValueError, match="image_merge"):
        ImageProjector(8, 8, merge=3).n_tokens(16)
    with pytest.raises(ValueError, match="image_merge"):
        ImageProjector(8, 8, merge=0)
    projector = ImageProjector(64, 256, output_rms=0.05)
    initialise(projector, 0)
    assert projector(torch.randn(2, 17, 64)).square().mean().sqrt().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("grid, upsample, side", [(4, 8, 16), (16, 14, 144), (2, 16, 32)])
def test_mask_decoder_reaches_its_mask_size(grid, upsample, side):
    decoder = MaskDecoder(24, 10, grid, dim=16, upsample=upsample)
    initialise(decoder, 0)
    taps = tuple(torch.randn(2, 1 + grid * grid, 24) for _ in range(3))
    logits = decoder(taps, torch.randn(2, 10))
    assert decoder.mask_size == side and logits.shape == (2, side, side)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_mask_decoder_has_a_layer_for_each_tap_and_drops_cls_at_the_end(layers):
    decoder = MaskDecoder(24, 10, 4, dim=16, layers=layers, upsample=8)
    initialise(decoder, 0)
    assert len(decoder.decoder.layers) == len(decoder.decoder.reduces) == layers
    taps, state = [torch.randn(1, 17, 24) for _ in range(layers)], torch.randn(1, 10)
    want = decoder(tuple(taps), state)
    for index in range(layers):
        moved = list(taps)
        moved[index] = taps[index] + 1.0
        assert not torch.equal(decoder(tuple(moved), state), want), "every tap counts"
    assert not torch.equal(decoder(tuple(taps), state + 1.0), want)
    with pytest.raises(AssertionError):
        decoder((*taps, taps[0]), state)


def test_mask_decoder_learns_one_mask():
    decoder = MaskDecoder(24, 10, 4, dim=16, upsample=8)
    initialise(decoder, 0)
    generator = torch.Generator().manual_seed(0)
    taps = tuple(torch.randn(2, 17, 24, generator=generator) for _ in range(3))
    states, masks = torch.randn(2, 10, generator=generator), torch.zeros(2, 16, 16)
    masks[0, :8, :8] = masks[1, 4:, 9:] = 1.0
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(120):
        loss = losses.dice_losses(decoder(taps, states), masks).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_mask_decoder_names_unfit_sizes():
    with pytest.raises(ValueError, match="mask_upsample"):
        MaskDecoder(24, 10, 4, upsample=3)
    with pytest.raises(ValueError, match="mask_dim"):
        MaskDecoder(24, 10, 4, dim=10)


def test_clip_head_kinds():
    linear = ClipHead(10, 6)
    assert [tuple(p.shape) for p in linear.parameters()] == [(6, 10)]
    mlp = ClipHead(10, 6, kind="mlp", mlp_width=7)
    assert sum(isinstance(module, nn.Linear) for module in mlp.modules()) == 4
    assert mlp(torch.randn(3, 10)).shape == linear(torch.randn(3, 10)).shape == (3, 6)
    with pytest.raises(ValueError, match="clip_head"):
        ClipHead(10, 6, kind="conv")


@pytest.mark.parametrize("mine, theirs", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_modules_take_inputs_of_another_dtype(mine, theirs):
    taps = tuple(torch.randn(2, 17, 24, dtype=theirs) for _ in range(3))
    state = torch.randn(2, 10, dtype=theirs)
    assert MaskDecoder(24, 10, 4, dim=16, upsample=8).to(mine)(taps, state).dtype == mine
    assert ImageProjector(24, 10, merge=2).to(mine)(taps[0]).dtype == mine
    assert ClipHead(10, 6, kind="mlp").to(mine)(state).dtype == mine


def test_initial_values_do_not_hang_on_the_global_generator():
    def made(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"m": MaskDecoder(24, 10, 4, dim=16), "p": ImageProjector(8, 8), "c": ClipHead(8, 4)})
        initialise(model, 3)
        return model.state_dict()

    first, second = made(0), made(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_losses_by_hand():
    logits, masks = torch.tensor([[[0.0, 2.0], [-1.0, 3.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    p = 1 / (1 + torch.exp(-logits))
    want = 1 - (2 * (p[0, 0, 1] + p[0, 1, 1]) + 1) / (p.sum() + 2 + 1)
    assert torch.allclose(losses.dice_losses(logits, masks), want)
    pixels = -(masks * p.log() + (1 - masks) * (1 - p).log())
    assert torch.allclose(losses.bce_losses(logits, masks), pixels.mean())
    assert losses.dice_losses(torch.full((1, 4, 4), -50.0), torch.zeros(1, 4, 4)).item() == pytest.approx(0.0)
    assert losses.picture_losses(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])).tolist() == [2.5]
    scores = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    ce = losses.answer_losses(scores.bfloat16(), torch.tensor([1, -100]), -100)
    assert ce.tolist() == pytest.approx([torch.logsumexp(scores[0], 0).item() - 2.0, 0.0])
    assert losses.share(torch.tensor(3.0), 2.0).item() == 1.5 and losses.share(torch.tensor(3.0), 0.0).item() == 0.0
