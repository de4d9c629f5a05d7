"""The backward of the sparse vector as two Triton kernels: one over rows of Z, one over H.

`row_gradients` turns the gradients of zu and za into those of z and z_prev: mask (remade from the row's threshold),
norm and both branches of the EMA at once; it never sees H. `weight_and_input_gradients` reads H once for dWz = dz^T H
and writes dH = dz Wz once, the least the arithmetic allows, with dz in the operands' dtype as autograd would have it.
Where the rows are cut into parts, the last program to come adds the parts of dWz up in a fixed order.

Source: Neural Tuning (arXiv 2408.03001) Eq. 1-3. Shape suffixes: M rows, D hidden, Z sparse dimension.
"""

# Triton's language is untyped: its tensors are not torch's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_kernels.forward_kernel import count_in


@triton.jit(do_not_specialize=["m"])
def row_gradients(
    d_zu_ptr,  # [M, Z] fp32, or None
    d_za_ptr,  # [M, Z] fp32, or None
    zu_ptr,  # [M, Z] fp32
    threshold_ptr,  # [M] fp32
    pre_norm_ptr,  # [M, Z] fp32, or None
    norm_ptr,  # [Z] fp32, or None
    dz_ptr,  # [M, Z] in H's dtype, out
    d_prev_ptr,  # [M, Z] fp32, out, or None
    d_norm_ptr,  # [blocks of rows, Z] fp32, out, or None
    m,
    old_share,
    new_share,
    norm_eps,
    Z: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """dz, dz_prev and each block's part of the norm weight's gradient."""
    block = tl.program_id(0)
    rows_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    units_Z = tl.arange(0, BLOCK_Z)
    row_in_M, unit_in_Z = rows_M < m, units_Z < Z
    inside_MZ = row_in_M[:, None] & unit_in_Z[None, :]
    at_MZ = rows_M.to(tl.int64)[:, None] * Z + units_Z[None, :]

    grad_MZ = tl.zeros([BLOCK_M, BLOCK_Z], tl.float32)
    if d_zu_ptr is not None:
        grad_MZ += tl.load(d_zu_ptr + at_MZ, mask=inside_MZ, other=0.0)
    if d_za_ptr is not None:
        d_za_MZ = tl.load(d_za_ptr + at_MZ, mask=inside_MZ, other=0.0)
        zu_MZ = tl.load(zu_ptr + at_MZ, mask=inside_MZ, other=0.0)
        threshold_M = tl.load(threshold_ptr + rows_M, mask=row_in_M, other=0.0)
        if SHIFTED:
            through_MZ = tl.where(zu_MZ > threshold_M[:, None], d_za_MZ, 0.0)
            # theta is one of the row's values and takes what all the others were shifted by; of equal ones, the first.
            is_theta_MZ = (zu_MZ == threshold_M[:, None]) & unit_in_Z[None, :]
            theta_M = tl.min(tl.where(is_theta_MZ, units_Z[None, :], BLOCK_Z), axis=1)
            at_theta_MZ = units_Z[None, :] == theta_M[:, None]
            grad_MZ += through_MZ - tl.where(at_theta_MZ, tl.sum(through_MZ, axis=1)[:, None], 0.0)
        else:
            grad_MZ += tl.where(zu_MZ >= threshold_M[:, None], d_za_MZ, 0.0)

    if norm_ptr is not None:
        pre_MZ = tl.load(pre_norm_ptr + at_MZ, mask=inside_MZ, other=0.0)
        weight_Z = tl.load(norm_ptr + units_Z, mask=unit_in_Z, other=0.0)
        scale_M = tl.rsqrt(tl.sum(pre_MZ * pre_MZ, axis=1) / Z + norm_eps)
        unit_MZ = pre_MZ * scale_M[:, None]
        tl.store(d_norm_ptr + block * Z + units_Z, tl.sum(grad_MZ * unit_MZ, axis=0), mask=unit_in_Z)
        grad_MZ = grad_MZ * weight_Z[None, :]
        along_M = tl.sum(grad_MZ * unit_MZ, axis=1) / Z
        grad_MZ = scale_M[:, None] * (grad_MZ - unit_MZ * along_M[:, None])

    if d_prev_ptr is not None:
        tl.store(d_prev_ptr + at_MZ, old_share * grad_MZ, mask=inside_MZ)
    tl.store(dz_ptr + at_MZ, (new_share * grad_MZ).to(dz_ptr.dtype.element_ty), mask=inside_MZ)


@triton.jit(do_not_specialize=["m"])
def weight_and_input_gradients(
    h_ptr,  # [M, D], or None: then no dWz
    wz_ptr,  # [Z, D], or None: then no dH
    dz_ptr,  # [M, Z] in H's dtype
    dh_ptr,  # [M, D], out, or None
    dwz_ptr,  # [Z, D], out, or None
    part_ptr,  # [SPLITS, Z, D] fp32, scratch, or None
    count_ptr,  # [blocks of D] int32 zeros, or None
    m,
    D: tl.constexpr,
    Z: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dH = dz Wz and dWz = dz^T H for a block of columns and a part of the rows."""
    block, split = tl.program_id(0), tl.program_id(1)
    cols_D = block * BLOCK_D + tl.arange(0, BLOCK_D)
    units_Z = tl.arange(0, BLOCK_Z)
    col_in_D, unit_in_Z = cols_D < D, units_Z < Z
    inside_ZD = unit_in_Z[:, None] & col_in_D[None, :]
    at_ZD = units_Z[:, None] * D + cols_D[None, :]
    if dh_ptr is not None:
        wz_ZD = tl.load(wz_ptr + at_ZD, mask=inside_ZD, other=0.0)
        if UPCAST:
            wz_ZD = wz_ZD.to(tl.float32)

    per_split = tl.cdiv(tl.cdiv(m, BLOCK_M), SPLITS) * BLOCK_M
    first = split * per_split
    dwz_ZD = tl.zeros([BLOCK_Z, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + per_split, m), BLOCK_M):
        rows_M = start + tl.arange(0, BLOCK_M)
        row_in_M = rows_M < m
        far_M = rows_M.to(tl.int64)[:, None]
        inside_MD = row_in_M[:, None] & col_in_D[None, :]
        dz_MZ = tl.load(dz_ptr + far_M * Z + units_Z[None, :], mask=row_in_M[:, None] & unit_in_Z[None, :], other=0.0)
        if UPCAST:
            dz_MZ = dz_MZ.to(tl.float32)
        if dwz_ptr is not None:
            h_MD = tl.load(h_ptr + far_M * D + cols_D[None, :], mask=inside_MD, other=0.0)
            if UPCAST:
                h_MD = h_MD.to(tl.float32)
            dwz_ZD = tl.dot(tl.trans(dz_MZ), h_MD, dwz_ZD, input_precision=PRECISION)
        if dh_ptr is not None:
            dh_MD = tl.dot(dz_MZ, wz_ZD, input_precision=PRECISION)
            tl.store(dh_ptr + far_M * D + cols_D[None, :], dh_MD.to(dh_ptr.dtype.element_ty), mask=inside_MD)

    if dwz_ptr is not None:
        if SPLITS > 1:
            tl.store(part_ptr + split * Z * D + at_ZD, dwz_ZD, mask=inside_ZD)
            if count_in(count_ptr + block) == SPLITS - 1:
                dwz_ZD = tl.zeros([BLOCK_Z, BLOCK_D], tl.float32)
                for part in tl.static_range(SPLITS):
                    # Past the L1 cache, which may hold what stood here before.
                    at = part_ptr + part * Z * D + at_ZD
                    dwz_ZD += tl.load(at, mask=inside_ZD, other=0.0, cache_modifier=".cg")
                tl.store(dwz_ptr + at_ZD, dwz_ZD.to(dwz_ptr.dtype.element_ty), mask=inside_ZD)
        else:
            tl.store(dwz_ptr + at_ZD, dwz_ZD.to(dwz_ptr.dtype.element_ty), mask=inside_ZD)
