"""Compiles the kernels ahead of time, without a GPU, and reads what they need: registers, shared memory, spills.

    python kernels/compiled_resources.py          # the table of kernels/README.md, made anew

The cases are what `launch` chooses for a LLaMA-2-7B layer (D = 4096) on 108 multiprocessors, compiled as at run time:
16-byte-aligned pointers, the sizes D and Z fixed, the number of rows and of active units not. Must run without
TRITON_INTERPRET, which turns kernels into Python functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_kernels import launch
from sparse_kernels.backward_kernel import row_gradients, weight_and_input_gradients
from sparse_kernels.forward_kernel import sparse_vector_forward

ARCHS = (80, 89, 90)
"""A100, RTX 4090, H100."""
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may take (CUDA programming guide, table of compute capabilities)."""
SMS, D = 108, 4096
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel as it is launched: its name in the table, the function, its constants, warps and stages."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Resources:
    """Registers per thread, bytes of shared memory per program, and spills.

    A spill is an instruction of the machine code that stores to or loads from local memory (STL, LDL).
    """

    registers: int
    shared: int
    spills: int


def forward_case(m: int, z: int, dtype: str, *, released: bool = False) -> Case:
    """The forward for m rows; `released` has norm and shifted activation, the paper neither."""
    plan = launch.forward_plan(m, D, z, ELEMENT[dtype], SMS)
    constants: dict[str, Any] = {
        "D": D,
        "Z": z,
        "SHIFTED": released,
        "SPLITS": plan.splits,
        "BLOCK_M": plan.block_m,
        "BLOCK_D": plan.block_d,
        "BLOCK_Z": plan.block_z,
        "PRECISION": "ieee",
        "UPCAST": False,
        "n_ptr": None,
    }
    constants |= {} if released else {"norm_ptr": None, "pre_norm_ptr": None}
    constants |= {"part_ptr": None, "count_ptr": None} if plan.splits == 1 else {}
    name = f"forward, M = {m}, Z = {z}, {dtype}{', released' if released else ''}"
    return Case(name, sparse_vector_forward, constants, plan.num_warps, plan.num_stages, dtype)


def backward_cases(m: int, z: int, dtype: str, *, released: bool = False) -> Iterator[Case]:
    """Both kernels of the backward for m rows; the kernel over H does not know of `released`."""
    plan = launch.backward_plan(m, D, z, ELEMENT[dtype], SMS)
    label = f"M = {m}, Z = {z}, {dtype}"
    rows: dict[str, Any] = {"Z": z, "SHIFTED": released, "BLOCK_M": plan.rows_block_m, "BLOCK_Z": plan.block_z}
    rows |= {} if released else {"norm_ptr": None, "pre_norm_ptr": None, "d_norm_ptr": None}
    yield Case(f"backward rows, {label}{', released' if released else ''}", row_gradients, rows, 4, 3, dtype)
    if released:
        return
    constants: dict[str, Any] = {
        "D": D,
        "Z": z,
        "SPLITS": plan.splits,
        "BLOCK_M": plan.block_m,
        "BLOCK_D": plan.block_d,
        "BLOCK_Z": plan.block_z,
        "PRECISION": "ieee",
        "UPCAST": False,
    }
    constants |= {"part_ptr": None, "count_ptr": None} if plan.splits == 1 else {}
    yield Case(f"backward H, {label}", weight_and_input_gradients, constants, plan.num_warps, plan.num_stages, dtype)


def cases() -> list[Case]:
    """What the README's table lists: few, many and very many rows; each Z; fp32; the released mechanism."""
    chosen = [forward_case(m, 128, "bf16") for m in (1, 4404, 65536)]
    chosen += [forward_case(4404, z, "bf16") for z in (64, 256)]
    chosen += [forward_case(4404, 128, "bf16", released=True), forward_case(4404, 128, "fp32")]
    for z, dtype in ((128, "bf16"), (64, "bf16"), (256, "bf16"), (128, "fp32")):
        chosen += backward_cases(4404, z, dtype)
    return [*chosen, *backward_cases(4404, 128, "bf16", released=True)]


def type_of(argument: str, dtype: str) -> str:
    """Triton's name of an argument's type, by the argument's name in the kernels."""
    if argument in ("m", "n_active"):
        return "i32"
    if argument in ("old_share", "new_share", "norm_eps"):
        return "fp32"
    if argument in ("count_ptr", "n_ptr"):
        return "*i32"
    return f"*{dtype}" if argument in ("h_ptr", "wz_ptr", "dz_ptr", "dh_ptr", "dwz_ptr") else "*fp32"


def compile_case(case: Case, arch: int) -> Resources:
    """Compiles a case for sm_<arch> down to machine code."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else type_of(n, case.dtype) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **launch.COMPILER_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(option, path) for option in ("--dump-resource-usage", "-sass"))
    registers = re.search(r"\bREG:(\d+)", usage)
    assert registers and "EXIT" in code, "cuobjdump's output has changed"
    return Resources(int(registers.group(1)), compiled.metadata.shared, len(re.findall(r"\b(?:STL|LDL)\b", code)))


def _cuobjdump(option: str, path: Path) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(measure: Callable[[Case, int], Resources] = compile_case) -> list[str]:
    """The README's table, a line each: registers per thread, KiB of shared memory, spills for each target."""
    head = ["kernel", "warps", *[f"sm_{arch}" for arch in ARCHS]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases():
        found = [measure(case, arch) for arch in ARCHS]
        cells = [f"{f.registers} · {f.shared / 1024:.1f} · {f.spills}" for f in found]
        lines.append("| " + " | ".join([case.name, str(case.num_warps), *cells]) + " |")
    return lines
