"""The new tokens' rows, beside the frozen input embedding and output head of the LM.

The rows are small parameters of their own: a frozen table stays untouched under ZeRO-3 and the checkpoint holds just
the rows. Ids: 0..base-1 the LM's own, base..base+n_new-1 the new tokens, anything above a slot (for a picture's tokens)
that has neither an embedding nor a head row.

Shape suffixes: B batch, T tokens, D hidden, V base vocabulary, N new tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.model.initialise import Resettable, normal, write

NOISE = 0.1
"""Standard deviation of a new row around the mean row, relative to the root mean square of the base table."""


def _reset_rows(rows: nn.Parameter, table: Tensor, name: str, seed: int) -> None:
    # Sums in fp32 without an fp32 copy of the table, which would take 655 MB for LLaMA-2-13B.
    mean = table.detach().mean(dim=0, dtype=torch.float32)
    rms = torch.linalg.vector_norm(table.detach(), dtype=torch.float32) / math.sqrt(table.numel())
    noise = normal(name, seed, rows.shape, NOISE).to(mean.device)
    write(rows, mean + noise * rms)


class NewTokenEmbedding(Resettable):
    """An embedding whose ids from base.num_embeddings on are looked up in `rows` [N, D]; slots above give zeros."""

    def __init__(self, base: nn.Embedding, n_new: int) -> None:
        super().__init__()
        self.base = base
        self.n_base, self.n_new = base.num_embeddings, n_new
        self.num_embeddings, self.embedding_dim = self.n_base + n_new, base.embedding_dim
        self.rows = nn.Parameter(torch.zeros(n_new, base.embedding_dim))

    def reset(self, name: str, seed: int) -> None:
        """Mean of the base rows plus small noise."""
        _reset_rows(self.rows, self.base.weight, f"{name}.rows", seed)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B,T,D] in the base table's dtype."""
        embeds_BTD = self.base(ids_BT.clamp(max=self.n_base - 1))
        new = (ids_BT - self.n_base).clamp(0, self.n_new - 1)
        # Both tables are read for every id, so that each parameter takes part in every forward.
        new_BTD = F.embedding(new, self.rows).to(embeds_BTD.dtype)
        is_new = (ids_BT >= self.n_base).unsqueeze(-1)
        is_slot = (ids_BT >= self.n_base + self.n_new).unsqueeze(-1)
        return torch.where(is_slot, 0.0, torch.where(is_new, new_BTD, embeds_BTD))


class ExtendedHead(Resettable):
    """An output head with N more logits after the base vocabulary's V; takes the place of llm.lm_head."""

    def __init__(self, base: nn.Linear, n_new: int) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features + n_new
        self.rows = nn.Parameter(torch.zeros(n_new, base.in_features))

    def reset(self, name: str, seed: int) -> None:
        """Mean of the base rows plus small noise: a new token starts with about the average logit."""
        _reset_rows(self.rows, self.base.weight, f"{name}.rows", seed)

    def forward(self, h: Tensor) -> Tensor:
        """[..., V + N] logits of h [..., D]."""
        logits = self.base(h)
        return torch.cat([logits, F.linear(h.to(self.rows.dtype), self.rows).to(logits.dtype)], dim=-1)


def install_new_tokens(llm: PreTrainedModel, n_new: int) -> tuple[NewTokenEmbedding, ExtendedHead]:
    """Puts n_new tokens after the LM's vocabulary, in place; `generate` then works with them.

    Tied tables stay tied among themselves; the new rows of embedding and head are separate. Raises ValueError when the
    LM's embedding and head are of unequal height, which would give a new token two different ids.
    """
    base: Any = llm.get_input_embeddings()
    head: Any = llm.get_output_embeddings()
    if isinstance(base, NewTokenEmbedding) or isinstance(head, ExtendedHead):
        raise ValueError("the new tokens are installed already: load the base model again")
    if base.num_embeddings != head.out_features:
        raise ValueError(
            f"the LM embeds {base.num_embeddings} ids but predicts {head.out_features}: take a base model whose "
            "input embedding and output head have the same number of rows"
        )
    embedding, extended = NewTokenEmbedding(base, n_new), ExtendedHead(head, n_new)
    llm.set_input_embeddings(embedding)
    llm.set_output_embeddings(extended)
    llm.config.vocab_size = extended.out_features
    if hasattr(llm, "vocab_size"):
        llm.vocab_size = extended.out_features
    return embedding, extended
