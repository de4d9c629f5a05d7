"""The sparse vector in plain PyTorch: the meaning that every faster version is tested against.

Source: Neural Tuning (arXiv 2408.03001) Eq. 1-3, and the authors' released code where it differs. Autograd does the
backward.

Shape suffixes: D hidden, Z sparse dimension; "..." stands for any leading dimensions (batch, tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("hard", "shifted")


def sparse_vector(
    h: Tensor,
    wz: Tensor,
    z_prev: Tensor | None,
    *,
    alpha: float,
    n_active: int,
    activation: str = "hard",
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(zu, za), both [..., Z] fp32, of h [..., D], wz [Z, D] and the previous tuned layer's zu (None in the first).

    z = h wz^T (Eq. 1); zu = alpha z_prev + (1 - alpha) z, or z in the first layer (Eq. 2). With `norm_weight` [Z],
    RMSNorm follows and the normed value is zu. Then, per row, with n = n_active in 1..Z:

    - "hard" (Eq. 3): za = zu where zu >= its n-th largest, else 0; ties are kept.
    - "shifted" (released code): za = relu(zu - theta), theta = the (Z - n)-th smallest; n = Z: no threshold, za = zu.
      theta is a function of zu and carries its gradient.

    The product runs in the operands' dtype, everything after it in fp32: the EMA goes over all layers, where bf16 would
    round small changes away. Raises ValueError for an n_active outside 1..Z or an unknown activation.
    """
    z_dim = wz.shape[0]
    if not 1 <= n_active <= z_dim:
        raise ValueError(f"n_active must lie in 1..{z_dim} (the sparse dimension), not {n_active}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
    zu = F.linear(h, wz).float()
    if z_prev is not None:
        zu = alpha * z_prev.float() + (1.0 - alpha) * zu
    if norm_weight is not None:
        zu = zu * torch.rsqrt(zu.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.float()
    if n_active == z_dim:
        return zu, zu
    if activation == "shifted":
        return zu, F.relu(zu - zu.kthvalue(z_dim - n_active, dim=-1, keepdim=True).values)
    kept = zu >= zu.detach().kthvalue(z_dim - n_active + 1, dim=-1, keepdim=True).values
    return zu, torch.where(kept, zu, 0.0)
