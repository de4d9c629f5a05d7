"""What goes wrong in train.py itself, on its own ranks: memory, loaders, losses, a base that lacks a tensor, folders
that not all ranks see. And what a validation draws, which must change nothing. The other faults are in test_faults.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import REPO, Job, start
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.data.mmud import MmudSource
from pipeline.data.writer import pack
from pipeline.runtime import checkpoint, stopping
from pipeline.runtime.ranks import free_port

MMUD = REPO / "tests" / "data" / "mmud"
TRAIN = REPO / "pipeline" / "train.py"

LIMITED = f"""
import re, resource, runpy, sys
held = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (600 << 20), held + (600 << 20)))
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""
"""train.py with 600 MiB more than Python and its imports take; the kernel refuses the rest, as a GPU does."""

ELSEWHERE = f"""
import os, runpy, sys
alone, other, here = sys.argv[1:4]
del sys.argv[1:4]
os.chdir(other if os.environ["RANK"] == alone else here)
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""
"""train.py in one folder, and in another for one rank: with a path that is not absolute the ranks see two folders under
one name, as those of two nodes with a disk each do."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "valid"):
        pack(MmudSource(MMUD, MMUD / "images"), split, folder, progress=False)
    return folder


def begin(folder: Path, shards: Path, *, name: str = "run", script: str = "", world: int = 1, **changed: Any) -> Job:
    """train.py on the mini models and MMUD's pictures: 2 steps of 2 samples into `folder`/run unless told otherwise.

    script: what runs in train.py's place, its own arguments before the flags.
    """
    values: dict[str, Any] = {
        "data": shards,
        "output_dir": folder / "run",
        "bf16": "false",
        "global_batch": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "num_workers": 0,
        "deepspeed": "ds_configs/z2.json",
    }
    values |= changed
    first = values.pop("first", [])
    flags = [word for flag, value in values.items() for word in (f"--{flag}", value)]
    target = TRAIN
    if script:
        target = folder / f"{name}.py"
        target.write_text(script)
    away = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return start(target, [*first, *flags], world=world, log=folder / f"{name}.log", env=away)


def ends(job: Job, status: int) -> str:
    assert job.end() == status, job.said[-4000:]
    assert "Traceback" not in job.said, job.said[-4000:]
    return job.said


def figures(run: Path) -> list[dict[str, float]]:
    """What depends on each step's computation alone."""
    lines = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = ("loss", "grad_norm", "activation/")
    return [{k: v for k, v in line.items() if k.startswith(kinds)} for line in lines if "loss" in line]


def test_out_of_memory_names_the_numbers_to_change(tmp_path: Path, shards: Path) -> None:
    """All samples of a pass stand in one row: eager attention's scores grow with the square of --micro_batch."""
    options = {"script": LIMITED, "attn": "eager", "global_batch": 32, "max_steps": 1}
    said = ends(begin(tmp_path, shards, micro_batch=32, **options), 1)
    assert said.count("train.py: error: out of memory with --micro_batch 32 (x 1 passes)") == 1
    assert "Change, in this order: --micro_batch 16 (the global batch stays" in said
    assert "you tried to allocate" in said
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / stopping.DONE).exists()
    # The numbers are those that count: with a smaller one the same run fits.
    ends(begin(tmp_path, shards, name="smaller", micro_batch=4, **options), 0)
    assert checkpoint.verify(tmp_path / "run/checkpoint-1") == []


def test_a_loader_process_that_is_killed(tmp_path: Path, shards: Path) -> None:
    job = begin(tmp_path, shards, num_workers=1, max_steps=10_000, save_steps=1)
    job.until(lambda: (tmp_path / "run/checkpoint-2").exists())
    workers = [process for process in job.members()["worker"] if process.status() != "zombie"]
    # Of the server that forks all jobs: what it imports asks for CUDA, which its children could not use any more.
    assert workers[0].environ()["CUDA_VISIBLE_DEVICES"] == ""
    assert len(workers) == 1
    workers[0].kill()
    said = ends(job, 1)
    assert said.count("train.py: error: a loader process has ended") == 1 and "--num_workers" in said
    assert checkpoint.find_latest(tmp_path / "run") is not None
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_losses_that_overflow_stop_the_run(tmp_path: Path, shards: Path) -> None:
    flags = {"lr": 1e30, "lr_mask": 1e30, "warmup_ratio": 0, "max_bad_steps": 2, "max_steps": 9, "save_steps": 1}
    said = ends(begin(tmp_path, shards, **flags), 2)
    assert said.count("--max_bad_steps 2 in a row") == 1 and "the weights are those of step 0" in said
    assert "no finite loss and is skipped (1 in a row, 1 in all)" in said
    record = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in record] == [1, 2]
    for key in record[-1]["micro_batches"][0]["keys"]:
        assert key in said
    assert not (tmp_path / "run" / stopping.DONE).exists()


def base_without(folder: Path, tensor: str, *, pickled: bool) -> Path:
    """The mini LM less one tensor."""
    base = Path(shutil.copytree(REPO / "models/mini/llm", folder / "llm"))
    (file,) = base.glob("*.safetensors")
    weights = load_file(file)
    del weights[tensor]
    if pickled:
        file.unlink()
        torch.save(weights, base / "pytorch_model.bin")
    else:
        save_file(weights, file, metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_base_that_lacks_a_tensor_is_refused_on_every_rank(tmp_path: Path, shards: Path, pickled: bool) -> None:
    """Told from the headers before anything is loaded; of pickled files, which have none, when they are loaded."""
    tensor = "model.layers.1.input_layernorm.weight"
    base = base_without(tmp_path, tensor, pickled=pickled)
    said = ends(begin(tmp_path, shards, world=2, base=base, deepspeed="ds_configs/z3.json"), 2)
    assert said.count("its files lack tensors that config.json describes") == 1
    assert str(base) in said and tensor in said and "fetch the model again" in said
    assert ("Tuning llm" in said) == pickled
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("alone", [1, 0])
def test_ranks_that_see_other_folders_do_not_start(tmp_path: Path, shards: Path, alone: int) -> None:
    ends(begin(tmp_path, shards, max_steps=1), 0)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    other = tmp_path / "other"
    other.mkdir()
    where = [alone, other, tmp_path]
    options = {"script": ELSEWHERE, "first": where, "output_dir": "run", "world": 2, "max_steps": 1}
    said = ends(begin(tmp_path, shards, name="again", **options), 2)
    assert said.count("train.py: error: rank 1 on ") == 1
    told = "which rank 0 goes on from, is not whole here" if alone else "holds checkpoint-1 here, which rank 0 does not"
    assert told in said and f"{other if alone else tmp_path}/run" in said
    assert "file system that all nodes share" in said and "--resume never" in said
    assert "Tuning llm" not in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_validation_draws_answers_and_changes_nothing(tmp_path: Path, shards: Path) -> None:
    """Two ranks under ZeRO-3, with a validation after each step and without."""
    drawn, plain = tmp_path / "drawn", tmp_path / "plain"
    for folder in (drawn, plain):
        folder.mkdir()
    options = {"world": 2, "max_steps": 3, "deepspeed": "ds_configs/z3.json"}
    ends(begin(drawn, shards, eval_steps=1, eval_samples=2, **options), 0)
    ends(begin(plain, shards, **options), 0)
    assert figures(drawn / "run") == figures(plain / "run")
    assert len(figures(plain / "run")) == 3 and "activation/mean" in figures(plain / "run")[2]
    sheets = sorted((drawn / "run/artifacts/validation").iterdir())
    assert [path.name for path in sheets] == [f"step-00000{step}.png" for step in (1, 2, 3)]
    with Image.open(sheets[0]) as one, Image.open(sheets[2]) as three:
        # All four tasks have a row; the answers change with the weights.
        assert one.width == 1640 and one.height > 1000
        assert one.tobytes() != three.tobytes()
    sent = [json.loads(line) for line in (drawn / "run/outbox.jsonl").read_text().splitlines()]
    assert [event["path"] for event in sent if event.get("folder") == "validation"] == [
        str(path.relative_to(drawn / "run")) for path in sheets
    ]
    assert not (plain / "run/artifacts/validation").exists()
