"""The door to the sparse vector: chooses the implementation, by SPARSE_KERNELS in the environment or by itself.

Unset, CUDA tensors that the Triton kernels can take go to them and everything else to plain PyTorch.
`SPARSE_KERNELS=reference python pipeline/train.py` takes plain PyTorch everywhere; `SPARSE_KERNELS=triton` insists on
the kernels and says why where they cannot run; tensors without content (device meta, by which memory and work are
counted) always take plain PyTorch. On a CPU the kernels run in Triton's interpreter, for tests, when TRITON_INTERPRET=1
is set before the start. The path taken is logged once (logger "sparse_kernels").
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch
from torch import Tensor

from sparse_kernels import launch, reference

IMPLEMENTATIONS = ("reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger("sparse_kernels")
_told: set[str] = set()


def refusal(h: Tensor, wz: Tensor) -> str | None:
    """Why the Triton kernels cannot take these operands, with the remedy; None if they can."""
    if h.dtype not in DTYPES or wz.dtype != h.dtype:
        return f"they take h and wz of one dtype, fp32, bf16 or fp16, not {h.dtype} and {wz.dtype}: cast both"
    if wz.shape[0] > launch.MAX_Z:
        return f"they hold at most Z = {launch.MAX_Z} units in registers, not {wz.shape[0]}: take a smaller z_dim"
    if h.device != wz.device:
        return f"h is on {h.device} and wz on {wz.device}: move one"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install -e .[gpu]`"
    if not h.is_cuda and not (h.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"they need CUDA tensors, not {h.device}, or TRITON_INTERPRET=1 set before the start (slow, for tests)"
    return None


def choose(h: Tensor, wz: Tensor) -> str:
    """The implementation for these operands: "triton" or "reference".

    Raises ValueError when SPARSE_KERNELS names no implementation, or names triton and that cannot run.
    """
    asked = os.environ.get("SPARSE_KERNELS") or None
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(f"SPARSE_KERNELS={asked!r} is unknown: unset it or choose one of {sorted(IMPLEMENTATIONS)}")
    if h.is_meta and wz.is_meta:
        return "reference"
    why = None if asked == "reference" or (asked is None and not h.is_cuda) else refusal(h, wz)
    if why is not None and asked == "triton":
        raise ValueError(f"SPARSE_KERNELS=triton: the Triton kernels cannot run: {why}; or unset SPARSE_KERNELS")
    taken = "triton" if why is None and (asked == "triton" or (asked is None and h.is_cuda)) else "reference"
    _tell(f"sparse vector: {taken} on {h.device.type}", why)
    return taken


def _tell(line: str, why: str | None) -> None:
    """Logs each line once per process, as a warning if the kernels were wanted; not from within a compiled graph."""
    if not torch.compiler.is_compiling() and line not in _told:
        _told.add(line)
        if why is None:
            log.info(line)
        else:
            log.warning("%s; the Triton kernels were passed over: %s", line, why)


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
    """(zu, za), both [..., Z] fp32; the meaning of every argument stands at `sparse_kernels.reference.sparse_vector`.

    Raises ValueError for arguments that do not fit one another and for a SPARSE_KERNELS that cannot be followed.
    """
    if choose(h, wz) == "reference":
        return reference.sparse_vector(
            h,
            wz,
            z_prev,
            alpha=alpha,
            n_active=n_active,
            activation=activation,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
        )
    # Triton need not be there where nothing asks for it.
    from sparse_kernels import ops

    reference.check(h, wz, z_prev, n_active, activation, norm_weight)
    z_dim = wz.shape[0]
    in_memory = isinstance(n_active, Tensor)
    zu_MZ, za_MZ, _, _ = ops.forward(
        h.reshape(-1, h.shape[-1]),
        wz,
        None if z_prev is None else z_prev.float().reshape(-1, z_dim),
        norm_weight,
        n_active if in_memory else None,
        0 if in_memory else n_active,
        alpha,
        norm_eps,
        activation == "shifted",
    )
    shape = (*h.shape[:-1], z_dim)
    return zu_MZ.reshape(shape), za_MZ.reshape(shape)
