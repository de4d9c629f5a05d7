"""The image prior: a causal transformer over VQGAN codes, given the CLIP embedding of the picture (CLIP-GEN).

The transformer is Hugging Face's GPT-2 (pre-norm, GELU, learned positions, as CLIP-GEN's), so sampling, its KV cache,
top-k, top-p and temperature are those of `generate`. The first slots hold the condition (in CLIP-GEN one), the rest the
codes.

Letters in shapes: B batch, E embedding width, K condition slots, N codes per picture, V codebook size, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.model.folder import load_weights, read_config, save_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorConfig:
    """Sizes of the transformer; the defaults are CLIP-GEN's (24 layers, 1024 wide, ViT-B/32 embeddings)."""

    embed_dim: int = 512
    n_codes: int = 16384
    n_tokens: int = 256
    width: int = 1024
    layers: int = 24
    heads: int = 16
    dropout: float = 0.1
    condition_slots: int = 1
    """Each slot is a linear image of the whole embedding; with several, places in the picture can ask each its own."""
    head_bias: bool = False
    """Whether the output head has a bias, as CLIP-GEN's has."""


class _DrawByRow(LogitsProcessor):
    """Makes the likeliest token a draw from the softmax, with noise of each row's own generator (Gumbel-max).

    generate's own draw takes one generator for the whole batch, so that a picture would depend on its neighbours.
    """

    def __init__(self, seeds: Sequence[Sequence[int]]) -> None:
        self.generators = [np.random.default_rng(list(seed)) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_BV = np.stack([generator.gumbel(size=scores.shape[-1]) for generator in self.generators])
        return scores.float() + torch.from_numpy(noise_BV).to(scores.device, torch.float32)


class ImagePrior(nn.Module):
    """p(codes | CLIP embedding). Embeddings of any length are taken: they are normalised here, as CLIP-GEN's are."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.condition = nn.Linear(config.embed_dim, config.condition_slots * config.width)
        self.transformer: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.n_codes,
                n_positions=config.n_tokens + config.condition_slots - 1,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                activation_function="gelu",
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
                tie_word_embeddings=False,
            )
        )
        if config.head_bias:
            self.transformer.lm_head = nn.Linear(config.width, config.n_codes)

    def start(self, embedding_BE: Tensor) -> Tensor:
        """What the condition's slots hold, [B, K, D]."""
        unit_BE = F.normalize(embedding_BE.float(), dim=-1).to(self.condition.weight.dtype)
        return self.condition(unit_BE).unflatten(-1, (-1, self.config.width))

    def forward(self, embedding_BE: Tensor, codes_BN: Tensor) -> Tensor:
        """Logits [B, N, V] of the codes."""
        start_BKD = self.start(embedding_BE)
        codes_BTD = self.transformer.get_input_embeddings()(codes_BN[:, :-1])
        hidden = self.transformer.transformer(inputs_embeds=torch.cat([start_BKD, codes_BTD], dim=1)).last_hidden_state
        return self.transformer.lm_head(hidden[:, -codes_BN.shape[1] :])

    def loss(self, embedding_BE: Tensor, codes_BN: Tensor) -> Tensor:
        """Mean cross-entropy of the codes, in nats."""
        return F.cross_entropy(self(embedding_BE, codes_BN).flatten(0, 1).float(), codes_BN.flatten())

    @torch.no_grad()
    def sample(
        self,
        embedding_BE: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        keys: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Codes [B, N] drawn with a KV cache.

        Args:
            temperature: divides the logits; 0 takes the likeliest code each time.
            top_k: keep the k likeliest codes (0: all). CLIP-GEN uses 500.
            top_p: keep the likeliest codes whose mass reaches p. CLIP-GEN uses .95.
            seed, keys: of the draw. A row's codes depend on its embedding, the seed and its key (some integers; its
                number unless given), not on the other rows.
        """
        start_BKD = self.start(embedding_BE)
        steps = LogitsProcessorList()
        if temperature > 0:
            steps.append(TemperatureLogitsWarper(float(temperature)))
            steps += [TopKLogitsWarper(top_k)] if top_k else []
            steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
            steps.append(_DrawByRow([(seed, *key) for key in keys or [(row,) for row in range(len(embedding_BE))]]))
        n = self.config.n_tokens
        codes = self.transformer.generate(
            inputs_embeds=start_BKD,
            attention_mask=torch.ones_like(start_BKD[..., 0], dtype=torch.long),
            max_new_tokens=n,
            min_new_tokens=n,
            use_cache=True,
            do_sample=False,
            logits_processor=steps,
        )
        assert isinstance(codes, Tensor)
        return codes

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        save_folder(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path) -> ImagePrior:
        """Reads what `save` wrote; ValueError when a file or a tensor is missing or does not fit."""
        return load_weights(cls(read_config(PriorConfig, folder, "image prior")), folder, "image prior")
