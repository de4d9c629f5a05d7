"""Compiles the kernels for sm_80, sm_89 and sm_90, without a GPU, and prints the table of kernels/README.md.

    python kernels/compiled_resources.py            # print the table
    python kernels/compiled_resources.py --write    # put it into kernels/README.md
    python kernels/compiled_resources.py --check    # compile and compare with the README: no more spills than it says

Takes about half a minute; what Triton has compiled before comes from its cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Interpreted kernels are Python functions; there is nothing to compile in them.
os.environ.pop("TRITON_INTERPRET", None)

from sparse_kernels import aot

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- resources: python kernels/compiled_resources.py --write -->", "<!-- end of resources -->"


def parsed(lines: list[str]) -> dict[tuple[str, int], tuple[int, float, int]]:
    """{(kernel, architecture): (registers, KiB of shared memory, spills)} of the table's lines."""
    found = {}
    for line in lines[2:]:
        name, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for arch, cell in zip(aot.ARCHS, cells, strict=True):
            registers, shared, spills = cell.split("·")
            found[name, arch] = int(registers), float(shared), int(spills)
    return found


def complaints(made: list[str], written: list[str]) -> list[str]:
    """What is wrong with the table made now: too much shared memory, or more spills than the README's table says."""
    now, said = parsed(made), parsed(written)
    wrong = [f"{name}: not in the README for sm_{arch}" for name, arch in now.keys() - said.keys()]
    wrong += [f"{name}: in the README for sm_{arch}, but gone" for name, arch in said.keys() - now.keys()]
    for key in sorted(now.keys() & said.keys()):
        name, arch = key
        if now[key][1] * 1024 > aot.SHARED_LIMIT[arch]:
            wrong.append(f"{name}: {now[key][1]} KiB of shared memory do not fit on sm_{arch}")
        if now[key][2] > said[key][2]:
            wrong.append(f"{name}: {now[key][2]} spills on sm_{arch}, the README says {said[key][2]}")
    return wrong


def main() -> int:
    """Prints, writes or checks the table; 1 if the check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    parser.add_argument("--check", action="store_true", help="compare with the table in kernels/README.md")
    options = parser.parse_args()
    made = aot.table()
    print("\n".join(made))
    if not (options.write or options.check):
        return 0
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN + "\n")
    written, after = rest.split(END)
    if options.write:
        README.write_text(before + BEGIN + "\n" + "\n".join(made) + "\n" + END + after, encoding="utf-8")
        return 0
    wrong = complaints(made, written.splitlines())
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
