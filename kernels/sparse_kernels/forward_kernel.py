"""The forward of the sparse vector as one Triton kernel: projection, EMA, norm, threshold, activation.

A program owns a block of rows and a part of D. It sums its part of H Wz^T in fp32 registers; where D is cut into
parts, it writes that sum to memory and counts itself in, and the program that comes last adds the parts up in a fixed
order (so results do not depend on timing). What follows needs a row's Z values and nothing else, so it happens in the
same registers: zu, then its n-th largest per row, then za. H is read once; z never goes to memory.

The n-th largest is exact. fp32 values are mapped to unsigned integers of the same order, and the largest key that at
least n units reach is built bit by bit, 32 counts over the row: no sort, no index, ties are equal keys.

Source: Neural Tuning (arXiv 2408.03001) Eq. 1-3. Shape suffixes: M rows, D hidden, Z sparse dimension.
"""

# Triton's language is untyped: its tensors are not torch's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_in(count_ptr):
    """How many programs came before this one, whose earlier writes every later one then sees."""
    # The barrier orders the whole program's writes before the one thread that counts.
    tl.debug_barrier()
    before = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def order_key(x):
    """uint32 keys in the order of fp32 values (IEEE 754: flip the sign bit, or all bits of a negative number)."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def value_of_key(key):
    """The fp32 value of an order key."""
    bits = tl.where((key >> 31) != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def kth_largest_key(key_MZ, k, BLOCK_M: tl.constexpr):
    """The k-th largest of each row's keys, exactly; k counts from 1 and may differ from call to call."""
    found_M = tl.zeros([BLOCK_M], tl.uint32)
    bit_M = tl.full([BLOCK_M], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate_M = found_M | bit_M
        reach_M = tl.sum((key_MZ >= candidate_M[:, None]).to(tl.int32), axis=1)
        found_M = tl.where(reach_M >= k, candidate_M, found_M)
        bit_M = bit_M >> 1
    return found_M


@triton.jit(do_not_specialize=["m", "n_active"])
def sparse_vector_forward(
    h_ptr,  # [M, D]
    wz_ptr,  # [Z, D]
    z_prev_ptr,  # [M, Z] fp32, or None
    norm_ptr,  # [Z] fp32, or None
    n_ptr,  # [1] int32, or None: then n_active counts
    zu_ptr,  # [M, Z] fp32, out
    za_ptr,  # [M, Z] fp32, out
    threshold_ptr,  # [M] fp32, out
    pre_norm_ptr,  # [M, Z] fp32, out, or None
    part_ptr,  # [SPLITS, M, Z] fp32, scratch, or None
    count_ptr,  # [blocks of rows] int32 zeros, or None
    m,
    n_active,
    old_share,
    new_share,
    norm_eps,
    D: tl.constexpr,
    Z: tl.constexpr,
    SHIFTED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """zu, za and the rows' thresholds; UPCAST only where bf16 has no arithmetic (Triton's interpreter)."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    units_Z = tl.arange(0, BLOCK_Z)
    steps_D = tl.arange(0, BLOCK_D)
    row_in_M, unit_in_Z = rows_M < m, units_Z < Z
    # M D may pass 2^31 elements.
    h_at_M = h_ptr + rows_M.to(tl.int64)[:, None] * D
    wz_at_Z = wz_ptr + units_Z[None, :] * D

    PER_SPLIT: tl.constexpr = tl.cdiv(tl.cdiv(D, BLOCK_D), SPLITS) * BLOCK_D
    z_MZ = tl.zeros([BLOCK_M, BLOCK_Z], tl.float32)
    for step in range(0, PER_SPLIT, BLOCK_D):
        cols_D = split * PER_SPLIT + step + steps_D
        in_D = cols_D < D
        h_MD = tl.load(h_at_M + cols_D[None, :], mask=row_in_M[:, None] & in_D[None, :], other=0.0)
        wz_DZ = tl.load(wz_at_Z + cols_D[:, None], mask=in_D[:, None] & unit_in_Z[None, :], other=0.0)
        if UPCAST:
            h_MD, wz_DZ = h_MD.to(tl.float32), wz_DZ.to(tl.float32)
        z_MZ = tl.dot(h_MD, wz_DZ, z_MZ, input_precision=PRECISION)

    inside_MZ = row_in_M[:, None] & unit_in_Z[None, :]
    at_MZ = rows_M.to(tl.int64)[:, None] * Z + units_Z[None, :]
    last = True
    if SPLITS > 1:
        size = m.to(tl.int64) * Z
        tl.store(part_ptr + split * size + at_MZ, z_MZ, mask=inside_MZ)
        last = count_in(count_ptr + block) == SPLITS - 1
    if last:
        if SPLITS > 1:
            z_MZ = tl.zeros([BLOCK_M, BLOCK_Z], tl.float32)
            for part in tl.static_range(SPLITS):
                # Past the L1 cache, which may hold what stood here before.
                z_MZ += tl.load(part_ptr + part * size + at_MZ, mask=inside_MZ, other=0.0, cache_modifier=".cg")
        zu_MZ = z_MZ
        if z_prev_ptr is not None:
            z_prev_MZ = tl.load(z_prev_ptr + at_MZ, mask=inside_MZ, other=0.0)
            zu_MZ = old_share * z_prev_MZ + new_share * z_MZ
        if norm_ptr is not None:
            tl.store(pre_norm_ptr + at_MZ, zu_MZ, mask=inside_MZ)
            weight_Z = tl.load(norm_ptr + units_Z, mask=unit_in_Z, other=0.0)
            scale_M = tl.rsqrt(tl.sum(zu_MZ * zu_MZ, axis=1) / Z + norm_eps)
            zu_MZ = zu_MZ * scale_M[:, None] * weight_Z[None, :]
        tl.store(zu_ptr + at_MZ, zu_MZ, mask=inside_MZ)
        n = n_active
        if n_ptr is not None:
            n = tl.load(n_ptr)
        n = tl.minimum(tl.maximum(n, 1), Z)
        # No finite value has key 0, so what lies outside never counts. Values are made from keys again after the
        # search: a block of them fewer in registers while it runs.
        key_MZ = tl.where(inside_MZ, order_key(zu_MZ), 0)
        if SHIFTED:
            # The (Z - n)-th smallest is the (n + 1)-th largest; with n = Z there is none, written as -inf.
            theta_M = value_of_key(kth_largest_key(key_MZ, tl.minimum(n + 1, Z), BLOCK_M))
            again_MZ = value_of_key(key_MZ)
            za_MZ = tl.where(n < Z, tl.maximum(again_MZ - theta_M[:, None], 0.0), again_MZ)
            threshold_M = tl.where(n < Z, theta_M, float("-inf"))
        else:
            threshold_M = value_of_key(kth_largest_key(key_MZ, n, BLOCK_M))
            again_MZ = value_of_key(key_MZ)
            za_MZ = tl.where(again_MZ >= threshold_M[:, None], again_MZ, 0.0)
        tl.store(za_ptr + at_MZ, za_MZ, mask=inside_MZ)
        tl.store(threshold_ptr + rows_M, threshold_M, mask=row_in_M)
