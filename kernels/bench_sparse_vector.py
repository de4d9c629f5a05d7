"""Times the sparse vector: Triton against eager PyTorch and torch.compile, beside what the device could do at best.

    python kernels/bench_sparse_vector.py             # every shape, on a GPU: adds rows to kernels/results.csv, draws
    python kernels/bench_sparse_vector.py --d 4096 --z 128 --m 512 4404 --dtype fp16
    python kernels/bench_sparse_vector.py --smoke     # toy shapes, anywhere; writes to a temporary folder

Before a shape is timed, the kernels' values and gradients there are compared with the reference in float64: a wrong
kernel ends the run. Rows are written shape by shape; a shape that the file has of this GPU, these versions and this
commit is not timed again. Times are the median, p20 and p80 of single calls with a cold L2 cache. Beside them stand
three limits: reading H once and all bytes that must move, both at the measured rate of a copy, and all FLOPs at the
measured rate of a large product. On a CPU the kernels are interpreted, and such times are never written as results.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    # Triton reads it when the kernels are defined.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["SPARSE_KERNELS"] = "triton"

from sparse_kernels import reference, sparse_vector  # noqa: E402
from sparse_kernels.timing import Limits, limits, measure  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.csv"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 1e-4}
MODES = ("forward", "forward+backward")
PROVIDERS = ("triton", "compile", "eager")
ALPHA, BETA = 0.9, 0.4
FULL = {"d": [4096, 5120], "z": [64, 128, 256], "m": [1, 64, 512, 4404, 16384, 65536]}
SMOKE = {"d": [96], "z": [16], "m": [1, 20]}


def operands(m: int, d: int, z: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """H, Wz, z_prev and the gradients of zu and za, as a middle layer meets them."""
    torch.manual_seed(0)
    h, wz = torch.randn(m, d, device=device), torch.randn(z, d, device=device) * d**-0.5
    return [h.to(dtype), wz.to(dtype), *(torch.randn(m, z, device=device) for _ in range(3))]


def gate(given: list[torch.Tensor], n: int, dtype: str) -> None:
    """Ends the run unless values and gradients equal the float64 reference's."""
    wide = [x.double().requires_grad_() for x in given[:3]]
    mine = [x.clone().requires_grad_() for x in given[:3]]
    zu, za = sparse_vector(*mine, alpha=ALPHA, n_active=n)
    zu64, za64 = reference.sparse_vector(*wide, alpha=ALPHA, n_active=n)
    # A near tie may fall either way in fp32; such a row gets no gradient.
    same = ((za != 0) == (za64 != 0)).all(-1, keepdim=True)
    if same.float().mean() < 0.99:
        sys.exit(f"wrong: {(~same).sum()} rows keep other units than the reference")
    d_zu, d_za = (x * same for x in given[3:])
    got = [zu, za * same, *torch.autograd.grad((zu * d_zu + za * d_za).sum(), mine)]
    want = [zu64, za64 * same, *torch.autograd.grad((zu64 * d_zu + za64 * d_za).sum(), wide)]
    for name, a, b in zip(("zu", "za", "dH", "dWz", "dz_prev"), got, want, strict=True):
        error = ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        bound = TOLERANCE[dtype] if name in ("dH", "dWz") else 1e-4 if dtype == "fp32" else 1e-5
        if not error <= bound:
            sys.exit(f"wrong: {name} is off by {error:.1e} of its largest value, more than {bound:.0e}")


def caller(provider: str, mode: str, given: list[torch.Tensor], n: int, *, smoke: bool) -> Callable[[], Any]:
    """What is timed: one forward without a graph, or one forward and backward for all three gradients."""
    if provider == "triton":
        function: Callable[..., Any] = sparse_vector
    else:
        function = reference.sparse_vector
        if provider == "compile":
            torch._dynamo.reset()
            function = torch.compile(function, dynamic=False, backend="aot_eager" if smoke else "inductor")
    if mode == "forward":
        inputs = given[:3]

        def forward() -> Any:
            with torch.no_grad():
                return function(*inputs, alpha=ALPHA, n_active=n)

        return forward
    leaves = [x.clone().requires_grad_() for x in given[:3]]

    def both() -> Any:
        return torch.autograd.grad(function(*leaves, alpha=ALPHA, n_active=n), leaves, given[3:])

    return both


def bounds(mode: str, m: int, d: int, z: int, element: int, rates: Limits) -> dict[str, float]:
    """Milliseconds of reading H once, of all bytes that must move, and of all FLOPs, at the measured rates."""
    h, wz, row = m * d * element, z * d * element, 4 * m * z
    moved = h + wz + 3 * row  # in: H, Wz, z_prev; out: zu, za
    if mode != "forward":
        moved += 2 * h + 2 * wz + 4 * row  # in: H, Wz, zu and two gradients; out: dH, dWz, dz_prev
    products = 1 if mode == "forward" else 3
    return {
        "read_h_ms": 1e3 * h / rates.bandwidth,
        "bytes_ms": 1e3 * moved / rates.bandwidth,
        "flops_ms": 1e3 * 2 * m * d * z * products / rates.flops,
    }


def origin(device: torch.device) -> dict[str, str]:
    """GPU, date, versions and commit, for every row."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    # Rows that were added are no other program.
    changed = git("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude,glob)**/results.*")
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(device) if CUDA else "none (CPU, Triton's interpreter)",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda or "",
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if changed else ""),
    }


def time_shape(m: int, d: int, z: int, options: argparse.Namespace, device: torch.device, rates: Limits) -> list[dict]:
    """The rows of one shape."""
    dtype = DTYPES[options.dtype]
    given, n = operands(m, d, z, dtype, device), max(round(BETA * z), 1)
    gate(given, n, options.dtype)
    rows = []
    for mode in MODES:
        limit = bounds(mode, m, d, z, given[0].element_size(), rates)
        for provider in PROVIDERS:
            call = caller(provider, mode, given, n, smoke=options.smoke)
            timing = measure(call, device, runs=5 if options.smoke else 50, warm_up=1 if options.smoke else 10)
            times = {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80, **limit}
            shape = {"dtype": options.dtype, "d": d, "z": z, "m": m, "mode": mode, "provider": provider}
            rows.append(shape | {name: f"{value:.5g}" for name, value in times.items()})
            print(f"D {d:5d}  Z {z:4d}  M {m:6d}  {mode:17s} {provider:8s} {timing.median:9.4f} ms  ", end="")
            print(f"H once {limit['read_h_ms']:.4f}  bytes {limit['bytes_ms']:.4f}  FLOPs {limit['flops_ms']:.4f}")
    return rows


def known(path: Path, facts: dict[str, str], dtype: str) -> dict[tuple[int, int, int], list[dict]]:
    """By (d, z, m): the whole sets of rows that the file has already; none of a tree with changes or without git."""
    found: dict[tuple[int, int, int], list[dict]] = {}
    if path.exists() and facts["commit"] and not facts["commit"].endswith("+changes"):
        wanted = facts | {"dtype": dtype}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if all(row[name] == value for name, value in wanted.items() if name != "date"):
                    shape = {name: int(row[name]) for name in ("d", "z", "m")}
                    found.setdefault((shape["d"], shape["z"], shape["m"]), []).append(row | shape)
    return {shape: rows for shape, rows in found.items() if len(rows) == len(MODES) * len(PROVIDERS)}


def append(path: Path, rows: list[dict]) -> None:
    """Adds rows to a CSV file, with a head line if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, rows: list[dict]) -> None:
    """One picture: times over M for each mode, at the first D and the middle Z, with the limit of all bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    widths = sorted({row["z"] for row in rows})
    d, z = rows[0]["d"], widths[len(widths) // 2]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, mode in zip(axes, MODES, strict=True):
        shown = [row for row in rows if (row["d"], row["z"], row["mode"]) == (d, z, mode)]
        for provider in PROVIDERS:
            mine = [row for row in shown if row["provider"] == provider]
            axis.plot([row["m"] for row in mine], [float(row["median_ms"]) for row in mine], "o-", label=provider)
        limit = [row for row in shown if row["provider"] == PROVIDERS[0]]
        axis.plot(
            [row["m"] for row in limit], [float(row["bytes_ms"]) for row in limit], "k:", label="bytes moved once"
        )
        axis.set(xscale="log", yscale="log", xlabel="rows M", title=f"{mode}, D = {d}, Z = {z}, {rows[0]['dtype']}")
    axes[0].set_ylabel("ms (median)")
    axes[0].legend()
    figure.suptitle(f"{rows[0]['gpu']}, {rows[0]['date']}, commit {rows[0]['commit']}")
    figure.savefig(path, bbox_inches="tight")


def verdict(rows: list[dict]) -> list[str]:
    """Each bar of the project that the rows miss, in words; the bars hold for Z = 128 and bf16."""
    missed = []
    times = {(r["d"], r["z"], r["m"], r["mode"], r["provider"]): float(r["median_ms"]) for r in rows}
    for (d, z, m, mode, provider), mine in times.items():
        if provider != "triton":
            continue
        shape = f"D {d}, Z {z}, M {m}"
        rivals = {other: times[d, z, m, mode, other] / mine for other in ("compile", "eager")}
        if mode != "forward" and m >= 512 and rivals["compile"] <= 1.0:
            missed.append(f"{shape}: forward+backward is not faster than torch.compile ({rivals['compile']:.2f}x)")
        if mode != "forward" and m >= 512 and rivals["eager"] < 2.0:
            missed.append(f"{shape}: forward+backward is {rivals['eager']:.2f}x eager, not 2x")
        once = next(float(r["read_h_ms"]) for r in rows if (r["d"], r["z"], r["m"], r["mode"]) == (d, z, m, mode))
        if mode == "forward" and m >= 16384 and mine > 1.5 * once:
            missed.append(f"{shape}: the forward takes {mine / once:.2f}x the time to read H once, not 1.5x")
    return missed


def main() -> None:
    """Times every shape, adds the rows and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, meaning in (("--d", "hidden sizes"), ("--z", "sparse dimensions"), ("--m", "numbers of rows")):
        parser.add_argument(flag, type=int, nargs="+", help=f"{meaning} (default: {FULL[flag[2:]]})")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of H and Wz (default: bf16)")
    parser.add_argument("--out", type=Path, help="CSV file the rows go to (default: kernels/results.csv)")
    parser.add_argument("--smoke", action="store_true", help="toy shapes into a temporary folder, on any machine")
    options = parser.parse_args()
    if not CUDA and not options.smoke:
        parser.error("no CUDA device: times of interpreted kernels mean nothing (--smoke runs toy shapes)")
    out = options.out or (Path(tempfile.mkdtemp()) / "results.csv" if options.smoke else RESULTS)
    if options.smoke and out.resolve() == RESULTS:
        parser.error("a --smoke run has no place in kernels/results.csv: give another --out")
    shapes = {name: getattr(options, name) or (SMOKE if options.smoke else FULL)[name] for name in FULL}
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
    rates = limits(device, DTYPES[options.dtype], small=options.smoke)
    facts = origin(device)
    print(f"{facts['gpu']}: copy {rates.bandwidth / 1e9:.0f} GB/s, product {rates.flops / 1e12:.1f} TFLOP/s")
    rows, there = [], known(out, facts, options.dtype)
    for d, z, m in itertools.product(shapes["d"], shapes["z"], shapes["m"]):
        new = there.get((d, z, m), [])
        if new:
            print(f"D {d:5d}  Z {z:4d}  M {m:6d}  timed before, in {out}")
        else:
            new = [facts | row for row in time_shape(m, d, z, options, device, rates)]
            append(out, new)
        rows += new
    draw(out.with_suffix(".svg"), rows)
    print(f"rows in {out}, picture in {out.with_suffix('.svg')}")
    for line in [] if options.smoke else verdict(rows):
        print("bar missed:", line)


if __name__ == "__main__":
    main()
