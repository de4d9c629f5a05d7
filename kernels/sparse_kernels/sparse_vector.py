"""The door to the sparse vector: chooses the implementation, by SPARSE_KERNELS in the environment or by itself.

`SPARSE_KERNELS=reference python pipeline/train.py` takes the plain PyTorch one, which runs on any device.
"""

from __future__ import annotations

import os

from torch import Tensor

from sparse_kernels import reference

IMPLEMENTATIONS = {"reference": reference.sparse_vector}


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
    """(zu, za), both [..., Z] fp32; the meaning of every argument stands at `sparse_kernels.reference.sparse_vector`.

    Raises ValueError when SPARSE_KERNELS names no implementation.
    """
    name = os.environ.get("SPARSE_KERNELS") or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"SPARSE_KERNELS={name!r} is unknown: unset it or choose one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](
        h,
        wz,
        z_prev,
        alpha=alpha,
        n_active=n_active,
        activation=activation,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )
