"""Block sizes and grids of the Triton kernels, as functions of the shape alone; Triton's driver, for who asks.

There is no autotuning: what runs is decided by the shape, the dtype and the number of multiprocessors, so two ranks, a
resumed run and the tests on a CPU take the same path. The figures behind the choices are a model (waves of programs,
bytes of partial sums), not measurements; `kernels/bench_sparse_vector.py` is what judges them.

Shape letters: M rows (batch x tokens), D hidden, Z sparse dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

MAX_Z = 256
"""A row's Z values lie in registers at once; beyond this, tall blocks no longer fit there."""
RESIDENT = 2
"""Programs that one multiprocessor is assumed to hold at a time."""
MAX_SPLITS = 16
"""The last program of a split sum adds the others' partial sums one by one, so it must not have many."""
COMPILER_OPTIONS = {"enable_fp_fusion": True}
"""Said outright because Triton's default is about to change, and with it the last bit of the EMA."""
INTERPRETED_SMS = 4
"""What a CPU counts as: few, so that tiny test shapes take split and unsplit paths alike."""


def driver() -> object:
    """What Triton starts kernels with: a C module, built at the first call. Raises whatever stops the build."""
    from triton.runtime import driver as triton_driver

    return triton_driver.active.utils


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """How the forward is cut: rows per program, columns of D per step, parts of D, and the compiler's options."""

    block_m: int
    block_d: int
    block_z: int
    splits: int
    num_warps: int
    num_stages: int

    def blocks(self, m: int) -> int:
        """Blocks of rows."""
        return math.ceil(m / self.block_m)


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """How the backward is cut: rows per program of the row kernel; of the H kernel, rows per step, D, parts of M."""

    rows_block_m: int
    block_m: int
    block_d: int
    block_z: int
    splits: int
    num_warps: int
    num_stages: int


@cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small fixed number for the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(z: int) -> int:
    """Z as the kernels hold it: a power of two, at least 16 (the least width of a tensor-core product)."""
    return max(16, 1 << (z - 1).bit_length())


def choose_splits(blocks: int, slots: int, most: int, partial_cost: float) -> int:
    """Into how many parts to cut each block's sum so that `blocks` programs fill `slots` places.

    The time of s parts is modelled as ceil(blocks s / slots) / s waves of whole blocks, plus `partial_cost` (the time
    to write and read one part's sums, in units of reading its operand once) per part and per full wave.
    """
    most = max(1, min(most, MAX_SPLITS))

    def time(parts: int) -> float:
        waves = math.ceil(blocks * parts / slots) / parts
        return waves + (partial_cost * parts * blocks / slots if parts > 1 else 0.0)

    return min(range(1, most + 1), key=time)


@lru_cache(maxsize=4096)
def forward_plan(m: int, d: int, z: int, element_size: int, sms: int) -> ForwardPlan:
    """The forward's plan for H [m,d] of `element_size` bytes, Wz [z,d] and `sms` multiprocessors.

    Every block of rows reads Wz whole (from the L2 cache): tall blocks read it less often, short ones spread better.
    """
    block_z, wide = padded(z), element_size > 2
    block_d = 32 if wide else 64
    if m <= 16:
        block_m = 16
    elif math.ceil(m / 64) * MAX_SPLITS < 2 * RESIDENT * sms or block_z * element_size > 512:
        block_m = 32
    elif math.ceil(m / 128) >= sms and block_z <= 128 and not wide:
        block_m = 128
    else:
        block_m = 64
    blocks = math.ceil(m / block_m)
    # Two steps of D are the least that one program should do.
    most = d // (2 * block_d)
    splits = choose_splits(blocks, RESIDENT * sms, most, 8 * z / (d * element_size))
    return ForwardPlan(
        block_m=block_m,
        block_d=block_d,
        block_z=block_z,
        splits=splits,
        num_warps=8 if block_m * block_z > 8192 or (wide and block_m * block_z > 4096) else 4,
        num_stages=3 if block_m + block_z <= 192 else 2,
    )


@lru_cache(maxsize=4096)
def backward_plan(m: int, d: int, z: int, element_size: int, sms: int) -> BackwardPlan:
    """The backward's plan; its second kernel gives each program some columns of D and a part of the rows."""
    block_z, wide = padded(z), element_size > 2
    block_m = 16 if wide else 32 if block_z > 128 else 64
    block_d = 32 if block_z > 128 else 64
    blocks = math.ceil(d / block_d)
    splits = choose_splits(blocks, RESIDENT * sms, m // (2 * block_m), 4 * z / max(m * element_size, 1))
    return BackwardPlan(
        rows_block_m=max(4096 // block_z, 16),
        block_m=block_m,
        block_d=block_d,
        block_z=block_z,
        splits=splits,
        num_warps=4 if block_z <= 64 else 8,
        num_stages=2,
    )
