"""The files of a training run that test_train.py starts, and command lines that name them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_run import CLIP, REPO, clip_file, llama

from pipeline.runtime.ranks import free_port


class World:
    """The files of one session, and command lines that name them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.other_base = llama(root / "llama"), llama(root / "other", seed=1)
        self.clip = clip_file(root / "clip.safetensors")
        self.shards = root / "shards"
        self.one, self.two = root / "one", root / "two"
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        self.env = {name: value for name, value in os.environ.items() if name not in names}
        self.env |= {
            "PATH": f"{Path(sys.executable).parent}:{self.env.get('PATH', '')}",
            "OMP_NUM_THREADS": "1",
            # Making a database takes seconds: all runs share one, as they would share a server.
            "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
        }

    def start(self, *command: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """A command that must succeed, or with `ok` False fail, run in the checkout."""
        done = subprocess.run(
            [str(word) for word in command], env=self.env, cwd=REPO, capture_output=True, text=True, timeout=550
        )
        assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    def flags(self, output: Path, *more: str | Path, leave_out: str = "", **changed: Any) -> list[str]:
        """Of a run of 4 steps by --preset 7b; `changed` replaces values, `leave_out` drops one flag."""
        values: dict[str, Any] = {
            "preset": "7b",
            "base": self.base,
            "clip": CLIP,
            "clip_weights": self.clip,
            "data": self.shards,
            "output_dir": output,
            "bf16": "false",
            "global_batch": 4,
            "max_steps": 4,
            "lr": 5e-3,
            "save_steps": 2,
            "logging_steps": 1,
            "num_workers": 0,
            "max_length": 320,
        }
        values |= changed
        words = [str(word) for name, value in values.items() if name != leave_out for word in (f"--{name}", value)]
        return words + [str(word) for word in more]


def launcher() -> list[str | Path]:
    """deepspeed with two ranks."""
    return [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
