"""Every file of ds_configs/ as DeepSpeed sees it: each key known, and two steps of the toy on two CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime import ds_config
from pipeline.runtime.engine import config_problems
from pipeline.runtime.ranks import free_port

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in (REPO / "ds_configs").glob("*.json"))


def full(stem: str, **changed: Any) -> dict[str, Any]:
    """The file as it would be run on GPUs by four ranks, less what its key in `changed` replaces."""
    raw = ds_config.read_json(REPO / "ds_configs" / f"{stem}.json")
    for name, value in changed.items():
        section, _, key = name.rpartition("__")
        (raw[section] if section else raw)[key] = value
    plan = ds_config.plan_batch(4, 1)
    return ds_config.resolve(
        raw, plan=plan, optimizer=ds_config.OptimizerSettings(lr=1e-3), bf16=True, hidden_size=5120
    )


@pytest.mark.parametrize("stem", FILES)
def test_deepspeed_knows_every_key(stem: str) -> None:
    assert config_problems(full(stem)) == []


def test_a_misspelt_key_is_named() -> None:
    # DeepSpeed itself says nothing of the first.
    assert config_problems(full("z2", gradient_cliping=1.0)) == ["DeepSpeed knows no key `gradient_cliping`"]
    (said,) = config_problems(full("z3", zero_optimization__overlap_com=True))
    assert "overlap_com" in said and "\n" not in said
    (said,) = config_problems(full("z3", zero_optimization__reduce_bucket_size="many"))
    assert "reduce_bucket_size" in said
    (said,) = config_problems(full("z2") | {"train_batch_size": 5})
    assert "5" in said
    # Sections that the engine takes itself are not DeepSpeed's to know.
    assert config_problems(full("z2", optimizer={"type": "AdamW", "params": {"lr": "auto"}})) == []


def test_every_file_trains(tmp_path: Path) -> None:
    # z3_hpz last: DeepSpeed makes its groups of ranks once per process, and never undoes them.
    files = sorted(FILES, key=lambda stem: ("hpz" in stem, stem))
    (tmp_path / "plan.json").write_text(json.dumps([{"name": f, "file": f, "last": 2, "hidden": 24} for f in files]))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    bin_dir = Path(sys.executable).parent
    env |= {"PATH": f"{bin_dir}:{env.get('PATH', '')}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [bin_dir / "deepspeed", "--num_gpus", "2", "--master_port", free_port(), REPO / "tests/engine_job.py"]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "plan.json"), str(tmp_path / "facts.json")],
        env=env,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert list(facts) == files
    for file in files:
        # The bound of test_engine.py; measured there: 2e-7 at most.
        assert facts[file]["losses"] == pytest.approx(facts["z2"]["losses"], rel=2e-6)
        assert facts[file]["norms"] == pytest.approx(facts["z2"]["norms"], rel=2e-6)
        assert len(facts[file]["losses"]) == 2
        assert facts[file]["before"] == facts[file]["after"]
