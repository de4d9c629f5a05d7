"""The Triton kernels as PyTorch operators: `sparse_kernels::forward` and `sparse_kernels::backward`.

Being operators with a shape function and a backward of their own, they pass through torch.compile as one node, are
recomputed under activation checkpointing, and hold Wz as the parameter it is, so that ZeRO-3 may take its values away
between forward and backward. Nothing in here waits for the device and every buffer is allocated by torch: a CUDA graph
can capture it (with n_active in device memory, or the graph would repeat the draw it was captured with).

Shape suffixes: M rows, D hidden, Z sparse dimension.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from sparse_kernels import launch
from sparse_kernels.backward_kernel import row_gradients, weight_and_input_gradients
from sparse_kernels.forward_kernel import sparse_vector_forward

INTERPRETED = isinstance(sparse_vector_forward, InterpretedFunction)
"""Whether the kernels were defined under TRITON_INTERPRET=1, and so run on a CPU."""


def _arithmetic(h: Tensor) -> dict[str, Any]:
    """How products are formed: torch's own setting for fp32, and never bf16 in the interpreter, which gets it wrong."""
    exact = h.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "PRECISION": "ieee" if exact else "tf32",
        "UPCAST": INTERPRETED and h.dtype == torch.bfloat16,
    }


def _scratch(parts: int, blocks: int, size: tuple[int, ...], device: torch.device) -> tuple[Tensor | None, ...]:
    """(partial sums, counters) of a sum in several parts; (None, None) of one in a single part."""
    if parts == 1:
        return None, None
    partial = torch.empty((parts, *size), dtype=torch.float32, device=device)
    return partial, torch.zeros(blocks, dtype=torch.int32, device=device)


def _on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds H."""

    @functools.wraps(operator)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return operator(*args, **kwargs)

    return guarded


@torch.library.custom_op("sparse_kernels::forward", mutates_args=())
@_on_its_device
def forward(
    h: Tensor,
    wz: Tensor,
    z_prev: Tensor | None,
    norm_weight: Tensor | None,
    n_tensor: Tensor | None,
    n_active: int,
    alpha: float,
    norm_eps: float,
    shifted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(zu [M,Z], za [M,Z], threshold [M], zu before its norm [M,Z] or empty), all fp32.

    h [M,D] and wz [Z,D] of one dtype, z_prev [M,Z] fp32, norm_weight [Z], n_tensor [1] int32 (n_active counts without
    it). A threshold of -inf says that none was applied.
    """
    m, d = h.shape
    z = wz.shape[0]
    zu, za = (torch.empty((m, z), dtype=torch.float32, device=h.device) for _ in range(2))
    threshold = torch.empty(m, dtype=torch.float32, device=h.device)
    pre_norm = torch.empty((m, z) if norm_weight is not None else (0,), dtype=torch.float32, device=h.device)
    if m == 0:
        return zu, za, threshold, pre_norm
    plan = launch.forward_plan(m, d, z, h.element_size(), launch.sm_count(h.device))
    partial, counts = _scratch(plan.splits, plan.blocks(m), (m, z), h.device)
    sparse_vector_forward[(plan.blocks(m), plan.splits)](
        h.contiguous(),
        wz.contiguous(),
        None if z_prev is None else z_prev.contiguous(),
        None if norm_weight is None else norm_weight.float().contiguous(),
        n_tensor,
        zu,
        za,
        threshold,
        None if norm_weight is None else pre_norm,
        partial,
        counts,
        m,
        n_active,
        alpha,
        1.0 - alpha,
        norm_eps,
        D=d,
        Z=z,
        SHIFTED=shifted,
        SPLITS=plan.splits,
        BLOCK_M=plan.block_m,
        BLOCK_D=plan.block_d,
        BLOCK_Z=plan.block_z,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **launch.COMPILER_OPTIONS,
        **_arithmetic(h),
    )
    return zu, za, threshold, pre_norm


@forward.register_fake
def _(h, wz, z_prev, norm_weight, n_tensor, n_active, alpha, norm_eps, shifted):
    m, z = h.shape[0], wz.shape[0]
    fp32 = {"dtype": torch.float32}
    pre_norm = h.new_empty((m, z) if norm_weight is not None else (0,), **fp32)
    return h.new_empty((m, z), **fp32), h.new_empty((m, z), **fp32), h.new_empty((m,), **fp32), pre_norm


@torch.library.custom_op("sparse_kernels::backward", mutates_args=())
@_on_its_device
def backward(
    d_zu: Tensor | None,
    d_za: Tensor | None,
    h: Tensor,
    wz: Tensor,
    zu: Tensor,
    threshold: Tensor,
    pre_norm: Tensor,
    norm_weight: Tensor | None,
    alpha: float,
    norm_eps: float,
    shifted: bool,
    has_prev: bool,
    need_h: bool,
    need_wz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dH [M,D], dWz [Z,D], dz_prev [M,Z] fp32, dnorm_weight [Z] fp32); empty ([0]) where not needed or not there."""
    m, d = h.shape
    z = wz.shape[0]
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": h.device}
    d_h = torch.empty((m, d) if need_h else (0,), dtype=h.dtype, device=h.device)
    d_wz = torch.empty((z, d) if need_wz else (0,), dtype=wz.dtype, device=h.device)
    d_prev = torch.empty((m, z) if has_prev else (0,), **fp32)
    normed = norm_weight is not None
    if m == 0:
        return d_h, d_wz.zero_(), d_prev, torch.zeros(z if normed else 0, **fp32)
    plan = launch.backward_plan(m, d, z, h.element_size(), launch.sm_count(h.device))
    arithmetic = _arithmetic(h)
    row_blocks = math.ceil(m / plan.rows_block_m)
    dz = torch.empty((m, z), dtype=h.dtype, device=h.device)
    d_norm = torch.empty((row_blocks, z) if normed else (0, 0), **fp32)
    row_gradients[(row_blocks,)](
        None if d_zu is None else d_zu.contiguous(),
        None if d_za is None else d_za.contiguous(),
        zu,
        threshold,
        pre_norm if normed else None,
        None if norm_weight is None else norm_weight.float().contiguous(),
        dz,
        d_prev if has_prev else None,
        d_norm if normed else None,
        m,
        alpha,
        1.0 - alpha if has_prev else 1.0,
        norm_eps,
        Z=z,
        SHIFTED=shifted,
        BLOCK_M=plan.rows_block_m,
        BLOCK_Z=plan.block_z,
        num_warps=4,
        **launch.COMPILER_OPTIONS,
    )
    if need_h or need_wz:
        blocks = math.ceil(d / plan.block_d)
        splits = plan.splits
        partial, counts = _scratch(splits if need_wz else 1, blocks, (z, d), h.device)
        weight_and_input_gradients[(blocks, splits)](
            h.contiguous() if need_wz else None,
            wz.contiguous() if need_h else None,
            dz,
            d_h if need_h else None,
            d_wz if need_wz else None,
            partial,
            counts,
            m,
            D=d,
            Z=z,
            SPLITS=splits,
            BLOCK_M=plan.block_m,
            BLOCK_D=plan.block_d,
            BLOCK_Z=plan.block_z,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            **launch.COMPILER_OPTIONS,
            **arithmetic,
        )
    return d_h, d_wz, d_prev, d_norm.sum(0)


@backward.register_fake
def _(d_zu, d_za, h, wz, zu, threshold, pre_norm, norm_weight, alpha, norm_eps, shifted, has_prev, need_h, need_wz):
    (m, d), z = h.shape, wz.shape[0]
    return (
        h.new_empty((m, d) if need_h else (0,)),
        wz.new_empty((z, d) if need_wz else (0,)),
        h.new_empty((m, z) if has_prev else (0,), dtype=torch.float32),
        h.new_empty((z if norm_weight is not None else 0,), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, wz, z_prev, norm_weight, _, _, alpha, norm_eps, shifted = inputs
    zu, _, threshold, pre_norm = output
    ctx.save_for_backward(h, wz, zu, threshold, pre_norm, norm_weight)
    ctx.mark_non_differentiable(threshold, pre_norm)
    # The last layer's zu has no gradient: None saves writing and reading zeros.
    ctx.set_materialize_grads(False)
    ctx.alpha, ctx.norm_eps, ctx.shifted, ctx.has_prev = alpha, norm_eps, shifted, z_prev is not None


def _backward(ctx: Any, d_zu: Tensor | None, d_za: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h, wz, zu, threshold, pre_norm, norm_weight = ctx.saved_tensors
    need_h, need_wz, need_prev, need_norm = ctx.needs_input_grad[:4]
    d_h, d_wz, d_prev, d_norm = backward(
        d_zu,
        d_za,
        h,
        wz,
        zu,
        threshold,
        pre_norm,
        norm_weight,
        ctx.alpha,
        ctx.norm_eps,
        ctx.shifted,
        ctx.has_prev,
        need_h,
        need_wz,
    )
    return (
        d_h if need_h else None,
        d_wz if need_wz else None,
        d_prev if need_prev else None,
        d_norm.to(norm_weight.dtype) if need_norm else None,
        *[None] * 5,
    )


forward.register_autograd(_backward, setup_context=_save)
