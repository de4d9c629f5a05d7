"""benchmarks/gpu.sh with a Python and an nvidia-smi of the test: limits, restarts, rows; that its files exist."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "benchmarks/gpu.sh"
PYTHON = """#!/bin/bash
# Stands for the project's Python: versions, a kind of GPU, a part that calls ninja, one that fails and one that hangs.
case "$*" in
    *distributions*) echo "torch 9.9 triton 9.9" ;;
    *of_device*) echo 4090 ;;
    *z2_offload.json*) ninja --version ;;
    *tuned_layer.py*--batch*) exec sleep 60 ;;
    *tuned_layer.py*) echo "no luck"; exit 3 ;;
    *) echo "ran $*" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    folder, venv = tmp_path / "bin", tmp_path / "venv"
    folder.mkdir()
    venv.mkdir()
    (venv / "python").write_text(PYTHON)
    (venv / "ninja").write_text('#!/bin/sh\necho "the venv\'s ninja"\n')
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 24564, 570.1'\n")
    for file in (*folder.iterdir(), *venv.iterdir()):
        file.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(venv / "python"),
        "GPU_OUT": str(tmp_path / "out"),
    }


def run(machine: dict[str, str], *words: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *words], env=machine, capture_output=True, text=True, timeout=200, check=False
    )


def rows(machine: dict[str, str]) -> list[dict[str, str]]:
    with open(Path(machine["GPU_OUT"]) / "parts.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_parts_are_bounded_recorded_and_not_repeated(machine: dict[str, str], tmp_path: Path) -> None:
    # A limit of a second, in a copy that still works in the checkout.
    short = tmp_path / "gpu.sh"
    text = SCRIPT.read_text().replace("part layer_48 120", "part layer_48 1")
    short.write_text(text.replace('"$(dirname "${BASH_SOURCE[0]}")/.."', f'"{REPO}"'))
    done = run(machine, "kernels", "layer", "layer_48", script=short)
    assert done.returncode == 1, done.stderr
    found = {row["part"]: row for row in rows(machine)}
    ended = {name: row["ended"] for name, row in found.items()}
    assert ended == {"kernels": "done", "layer": "failed with 3", "layer_48": "ended at its limit"}
    assert found["kernels"]["gpu"].startswith("NVIDIA GeForce RTX 4090") and "torch 9.9" in found["kernels"]["versions"]
    assert "ran -m pytest" in done.stdout and (tmp_path / "out" / "layer.log").read_text() == "no luck\n"

    again = run(machine, script=short)
    assert "kernels: done before" in again.stdout and "== layer: " in again.stdout
    assert [row["part"] for row in rows(machine)].count("kernels") == 1
    # 13B's step is left out on 24 GiB.
    assert "plan_13b" in {row["part"] for row in rows(machine)} and "step_13b" not in {r["part"] for r in rows(machine)}
    assert run(machine, "kernels").returncode == 0
    assert [row["part"] for row in rows(machine)].count("kernels") == 2
    assert run(machine, "kernel").returncode == 2


def test_a_part_finds_the_programs_beside_its_python(machine: dict[str, str], tmp_path: Path) -> None:
    assert run(machine, "offload").returncode == 0
    assert (tmp_path / "out" / "offload.log").read_text() == "the venv's ninja\n"


def test_without_a_gpu_it_says_so(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = run(machine)
    assert done.returncode == 2 and "no GPU" in done.stderr


def test_commands_name_files_of_the_repository() -> None:
    listed = run(dict(os.environ), "--list").stdout
    assert len(listed.splitlines()) >= 10
    words = {word for line in listed.splitlines() for word in line.split() if word.endswith((".py", ".json"))}
    assert not [word for word in words if not (REPO / word).exists()]
    for line in listed.splitlines():
        if script := next((word for word in line.split() if word.startswith(("benchmarks/", "kernels/bench"))), None):
            known = (REPO / script).read_text()
            assert not [word for word in line.split() if word.startswith("--") and f'"{word}"' not in known], line


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
