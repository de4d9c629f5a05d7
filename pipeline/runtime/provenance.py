"""What a run was made of: settings, versions, commit, command line, machine. Written as run.json in its folder."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "open_clip_torch",
    "taming-transformers",
    "webdataset",
    "safetensors",
    "triton",
    "mlflow",
    "torchmetrics",
    "numpy",
)


def package_versions() -> dict[str, str | None]:
    """Version of Python and of each package a result may depend on; None if it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(root: str | Path) -> dict[str, Any]:
    """{"commit": hash or None, "dirty": whether tracked files differ from it or None} of a checkout."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    changed = ask("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def git_diff(root: str | Path) -> str:
    """What tracked files of a checkout have beyond its commit, by `git diff HEAD`; "" for nothing or no git."""
    words = ["git", "-C", str(root), "diff", "--no-ext-diff", "--no-color", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def run_record(
    config: Mapping[str, Any], *, deepspeed: Mapping[str, Any] | None = None, world_size: int = 1, **facts: Any
) -> dict[str, Any]:
    """The content of run.json. `facts` are added as they are (counts of parameters, digest of the data, ...)."""
    cuda = torch.cuda.is_available()
    return {
        "config": dict(config),
        "deepspeed": dict(deepspeed or {}),
        "world_size": world_size,
        **facts,
        "versions": package_versions(),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "command": [sys.executable, *sys.argv],
        "machine": {
            "host": platform.node(),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "cuda": torch.version.cuda if cuda else None,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        },
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes JSON in one stroke: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings, for MLflow's flat parameters."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat |= flatten(value, name)
        else:
            flat[name] = value
    return flat
