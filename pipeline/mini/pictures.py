"""Pretraining of the mini VQGAN and of the mini image prior, and their gates.

The VQGAN is trained as a plain autoencoder first; its codebook then starts from latents of real pictures. The prior
learns the codes given the mini CLIP's embedding of the same picture, blurred by noise in half of the cases so that it
takes the slightly wrong embeddings that a tuned LLM will hand it. Both gates ask the mini CLIP which of 50 captions a
picture shows.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.mini import training
from pipeline.mini.contrast import normalise
from pipeline.model.painter import Painter, Sampling
from pipeline.model.prior import ImagePrior, PriorConfig
from pipeline.model.vision import VisionTower
from pipeline.model.vqgan import VQGAN, VQGANConfig
from pipeline.scoring.pictures import embed_pictures, retrieval_r1

VQGAN_CONFIG = VQGANConfig(
    resolution=64,
    ch=32,
    ch_mult=(1, 1, 2, 3),
    num_res_blocks=1,
    attn_resolutions=(),
    z_channels=64,
    embed_dim=16,
    n_embed=512,
)
PRIOR_CONFIG = PriorConfig(
    embed_dim=128, n_codes=512, n_tokens=64, width=192, layers=5, heads=6, dropout=0.0, condition_slots=16
)
CONDITION_NOISE = 0.5
"""Length of the noise added to half of the (unit-length) conditions."""
GROUP = 50


def _signed(pictures: Tensor) -> Tensor:
    """uint8 [B,3,S,S] -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def text_r1(clip: VisionTower, pictures: Tensor, captions: list[str]) -> float:
    """R@1 of each picture's own caption among `GROUP`, by the mini CLIP; pictures float [N,3,S,S] in [-1, 1]."""
    shown = normalise((pictures + 1) * 127.5)
    image_NE = torch.cat([clip(part).embedding for part in shown.split(100)])
    return retrieval_r1(image_NE, clip.encode_text(captions), group=GROUP, seed=0)


def pretrain_vqgan(
    out: Path,
    pool: training.ScenePool,
    held_out: training.ScenePool,
    clip: VisionTower,
    *,
    steps: int,
    seed: int,
    batch: int = 32,
    lr: float = 1.0e-3,
) -> dict[str, float]:
    """Trains and saves the VQGAN to `out`; returns the gate's figures."""
    torch.manual_seed(seed)
    model = VQGAN(VQGAN_CONFIG).to(training.device())
    batches = pool.batches(batch, seed)
    quantised_from = int(0.35 * steps)

    def step_loss(step: int) -> dict[str, Tensor]:
        pictures = _signed(pool.pictures[next(batches)]).to(training.device())
        if step == quantised_from:
            start_codebook(model, _signed(pool.pictures[:512]).to(training.device()), seed)
        with training.autocast():
            if step < quantised_from:
                rebuilt, codebook = model.decode(model.encode(pictures)), torch.zeros(())
            else:
                rebuilt, codebook, _ = model(pictures)
        error = rebuilt.float() - pictures
        return {"picture": error.abs().mean() + 2 * error.square().mean(), "codebook": 0.25 * codebook.float()}

    def check() -> dict[str, float]:
        model.save(out)
        return vqgan_gate(model, held_out, clip)

    training.fit("mini VQGAN", model, steps, step_loss, lr=lr, weight_decay=0.0, check=check)
    return check()


@torch.no_grad()
def start_codebook(model: VQGAN, pictures: Tensor, seed: int) -> None:
    """Sets the codebook to k-means centres of the latents of some pictures (ten rounds of Lloyd's algorithm)."""
    latents_ND = torch.cat([model.encode(p).permute(0, 2, 3, 1).flatten(0, 2) for p in pictures.split(64)])
    order = np.random.default_rng([seed, 3]).permutation(len(latents_ND))
    centres_KD = latents_ND[torch.from_numpy(order[: model.config.n_embed])].clone()
    for _ in range(10):
        nearest_N = torch.cdist(latents_ND, centres_KD).argmin(1)
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, nearest_N, latents_ND)
        counts_K = torch.bincount(nearest_N, minlength=len(centres_KD)).unsqueeze(1)
        centres_KD = torch.where(counts_K > 0, sums_KD / counts_K.clamp(min=1), centres_KD)
    model.quantize.embedding.weight.copy_(centres_KD)


@torch.no_grad()
def vqgan_gate(model: VQGAN, held_out: training.ScenePool, clip: VisionTower) -> dict[str, float]:
    """Reconstructions of held-out pictures: caption R@1 of 50, mean absolute error (0-1 scale), codes in use."""
    pictures = _signed(held_out.pictures).to(next(model.parameters()).device)
    codes = torch.cat([model.codes(p) for p in pictures.split(50)])
    rebuilt = torch.cat([model.pictures(c) for c in codes.split(50)])
    return {
        "text_r1_of_50": text_r1(clip, rebuilt, [s.caption() for s in held_out.scenes]),
        "mean_absolute_error": (rebuilt - pictures).abs().mean().item() / 2,
        "codes_used": float(codes.unique().numel()),
    }


def pretrain_prior(
    out: Path,
    pool: training.ScenePool,
    held_out: training.ScenePool,
    clip: VisionTower,
    vqgan: VQGAN,
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 3.0e-3,
) -> dict[str, float]:
    """Trains and saves the image prior to `out`; returns the gate's figures."""
    torch.manual_seed(seed)
    dev = training.device()
    model = ImagePrior(PRIOR_CONFIG).to(dev)
    codes_PN, embedding_PE = _encode_pool(pool, clip, vqgan)
    batches = pool.batches(batch, seed)

    def step_loss(_: int) -> dict[str, Tensor]:
        index = torch.from_numpy(next(batches))
        condition_BE = F.normalize(embedding_PE[index].to(dev), dim=-1)
        noise_BE = F.normalize(torch.randn_like(condition_BE), dim=-1) * CONDITION_NOISE
        blurred_B1 = torch.rand(len(index), 1, device=dev) < 0.5
        with training.autocast():
            return {"codes": model.loss(condition_BE + blurred_B1 * noise_BE, codes_PN[index].to(dev))}

    def check() -> dict[str, float]:
        model.save(out)
        return prior_gate(model, held_out, clip, vqgan)

    training.fit("mini prior", model, steps, step_loss, lr=lr, check=check)
    return check()


@torch.no_grad()
def _encode_pool(pool: training.ScenePool, clip: VisionTower, vqgan: VQGAN) -> tuple[Tensor, Tensor]:
    """Codes [P, N] and CLIP embeddings [P, E] of every picture of a pool, on the CPU."""
    dev = next(vqgan.parameters()).device
    with training.autocast():
        codes = [vqgan.codes(_signed(p).to(dev)).cpu() for p in pool.pictures.split(128)]
        embeddings = [clip(normalise(p).to(dev)).embedding.float().cpu() for p in pool.pictures.split(128)]
    return torch.cat(codes), torch.cat(embeddings)


@torch.no_grad()
def prior_gate(model: ImagePrior, held_out: training.ScenePool, clip: VisionTower, vqgan: VQGAN) -> dict[str, float]:
    """Pictures from the true embeddings of held-out ones, caption R@1 of 50: drawn as the pipeline draws them (the best
    of 4 candidates, by CLIP), and single draws."""
    training_mode = model.training
    model.eval()
    shown = normalise(held_out.pictures[: 4 * GROUP]).to(next(model.parameters()).device)
    texts = [s.caption() for s in held_out.scenes[: 4 * GROUP]]
    embed, found = partial(embed_pictures, clip), {}
    for name, candidates in (("text_r1_of_50", 4), ("text_r1_of_50_single_draw", 1)):
        sampling = Sampling(candidates=candidates)
        drawn = Painter(model, vqgan, embed, clip.embed_dim, sampling).paint(clip(shown).embedding, seed=0)
        found[name] = retrieval_r1(embed(drawn), clip.encode_text(texts).cpu(), group=GROUP, seed=0)
    model.train(training_mode)
    return found
