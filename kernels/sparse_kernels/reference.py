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


def check(
    h: Tensor, wz: Tensor, z_prev: Tensor | None, n_active: int | Tensor, activation: str, norm_weight: Tensor | None
) -> None:
    """Raises ValueError, with the remedy, for arguments that no implementation can take."""
    if wz.dim() != 2 or h.dim() < 1 or h.shape[-1] != wz.shape[1]:
        raise ValueError(f"h must be [..., D] and wz [Z, D] with the same D, not {list(h.shape)} and {list(wz.shape)}")
    z_dim = wz.shape[0]
    if z_prev is not None and z_prev.shape != (*h.shape[:-1], z_dim):
        raise ValueError(f"z_prev must be {[*h.shape[:-1], z_dim]} like zu, not {list(z_prev.shape)}")
    if norm_weight is not None and norm_weight.shape != (z_dim,):
        raise ValueError(f"norm_weight must be [{z_dim}], not {list(norm_weight.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
    if isinstance(n_active, Tensor):
        if n_active.numel() != 1 or n_active.dtype != torch.int32 or n_active.device != h.device:
            raise ValueError(f"n_active as a tensor must be one int32 on {h.device}, not {n_active!r}")
    elif not 1 <= n_active <= z_dim:
        raise ValueError(f"n_active must lie in 1..{z_dim} (the sparse dimension), not {n_active}")


def kth_largest(zu: Tensor, k: int | Tensor) -> Tensor:
    """[..., 1]: the k-th largest of each row, without a gradient; k a number, or a tensor that is not read back."""
    zu = zu.detach()
    if isinstance(k, Tensor):
        return zu.sort(dim=-1, descending=True).values.index_select(-1, k.reshape(1) - 1)
    return zu.kthvalue(zu.shape[-1] - k + 1, dim=-1, keepdim=True).values


def sparse_vector(
    h: Tensor,
    wz: Tensor,
    z_prev: Tensor | None,
    *,
    alpha: float,
    n_active: int | Tensor,
    activation: str = "hard",
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(zu, za), both [..., Z] fp32, of h [..., D], wz [Z, D] and the previous tuned layer's zu (None in the first).

    z = h wz^T (Eq. 1); zu = alpha z_prev + (1 - alpha) z, or z in the first layer (Eq. 2). With `norm_weight` [Z],
    RMSNorm follows and the normed value is zu. Then, per row, with n = n_active in 1..Z:

    - "hard" (Eq. 3): za = zu where zu >= its n-th largest, else 0; ties are kept.
    - "shifted" (released code): za = relu(zu - theta), theta = the (Z - n)-th smallest; n = Z: no threshold, za = zu.
      theta is one of the row's values (of equal ones the first) and carries its gradient.

    n_active may be a tensor of one int32 on h's device, which a CUDA graph needs to see a new draw at each replay; it
    is clamped to 1..Z, since looking at it would wait for the device.

    The product runs in the operands' dtype, everything after it in fp32: the EMA goes over all layers, where bf16 would
    round small changes away. fp64 operands stay fp64 throughout. Raises ValueError for an n_active outside 1..Z, an
    unknown activation, or shapes that do not fit.
    """
    check(h, wz, z_prev, n_active, activation, norm_weight)
    z_dim = wz.shape[0]
    z = F.linear(h, wz)
    dtype = torch.promote_types(z.dtype, torch.float32)
    zu = z.to(dtype)
    if z_prev is not None:
        zu = alpha * z_prev.to(dtype) + (1.0 - alpha) * zu
    if norm_weight is not None:
        zu = zu * torch.rsqrt(zu.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.to(dtype)
    in_memory = isinstance(n_active, Tensor)
    n = n_active.clamp(1, z_dim) if isinstance(n_active, Tensor) else n_active
    if not in_memory and n == z_dim:
        return zu, zu
    if activation == "hard":
        return zu, torch.where(zu >= kth_largest(zu, n), zu, 0.0)
    value = kth_largest(zu, (n + 1).clamp(max=z_dim) if isinstance(n, Tensor) else n + 1)
    # kthvalue's own gradient goes to any one of equal values; this one is the same everywhere.
    theta = zu.gather(-1, (zu == value).to(torch.int8).argmax(-1, keepdim=True))
    za = F.relu(zu - theta)
    return zu, torch.where(n < z_dim, za, zu) if isinstance(n, Tensor) else za
