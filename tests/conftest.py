"""Shared set-up of the tests: Triton's interpreter where there is no GPU, one thread, paths and small helpers.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set here, before any test module imports one. Helpers
are fixtures because `tests` cannot be a package: torch_fidelity installs one of that name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

assert "triton" not in sys.modules, "triton was imported before conftest could set TRITON_INTERPRET"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Training runs that tests start stay on the CPU, where any number of ranks can: one GPU is not enough for two, and runs
# whose figures are compared must be on one kind of device. Unlike CUDA_VISIBLE_DEVICES, it outlives the launcher.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tests start ranks and workers of their own: more than one thread each slows them down, and sums differ by thread
# count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

REPO = Path(__file__).resolve().parent.parent
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        # Not by its keywords, among which is the name of the checkout's folder.
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    """A script that runs within this process leaves no launcher's variables to the processes of later tests."""
    yield
    for name in LAUNCHER:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The tests' own small data, `tests/data`."""
    return REPO / "tests" / "data"


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with the same seed for every test; torch is seeded with it."""
    torch.manual_seed(0)
    return np.random.default_rng(0)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python(*args, cwd=tmp_path, timeout=300, env=None)` runs this interpreter; it returns the finished process.

    The environment has .venv/bin first on PATH (DeepSpeed looks for ninja there) and none of a launcher's variables.
    """

    def run(
        *args: str | Path, cwd: Path = tmp_path, timeout: float = 300, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
        command = [sys.executable, *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=clean | (env or {}), capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The train split of tests/data/mmud, packed; not to be changed."""
    from pipeline.data.mmud import MmudSource
    from pipeline.data.writer import pack

    root = Path(__file__).parent / "data" / "mmud"
    out = tmp_path_factory.mktemp("packed")
    pack(MmudSource(root, root / "images"), "train", out, progress=False)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of `packed` to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))
