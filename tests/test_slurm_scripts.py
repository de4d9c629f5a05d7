"""The job scripts of slurm/ without SLURM: shellcheck, the command lines they make, what the READMEs say of them."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.config import AblationArguments, DataArguments, EvalArguments, ModelArguments, TrainArguments, parse
from pipeline.runtime import command_line
from pipeline.shard_mmud import ShardArguments

REPO = Path(__file__).resolve().parent.parent
KINDS: dict[str, tuple[type, ...]] = {
    "pipeline/train.py": (ModelArguments, DataArguments, TrainArguments),
    "pipeline/shard_mmud.py": (ShardArguments,),
    "pipeline/evaluate_mmud.py": (EvalArguments,),
    "pipeline/ablate.py": (AblationArguments,),
}
RUNS = {
    "train_13b.sh": "pipeline/train.py",
    "train_7b.sh": "pipeline/train.py",
    "mini.sh": "pipeline/train.py",
    "shard_mmud.sh": "pipeline/shard_mmud.py",
    "evaluate.sh": "pipeline/evaluate_mmud.py",
    "ablate.sh": "pipeline/ablate.py",
}
# Options of srun that lib.sh and the scripts give.
SRUN = {"--kill-on-bad-exit=1", "--unbuffered"}


def start(tmp_path: Path, script: str, *flags: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a job script beside commands that stand for SLURM's; returns how it ended and what it gave to srun."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir(exist_ok=True)
    srun = f'printf "%s\\0" "$MASTER_ADDR:$MASTER_PORT" "$@" > {tmp_path}/srun'
    srun += '; touch "${MARK:-/dev/null}"; exit ${RC:-0}'
    commands = {
        "srun": srun,
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; echo n7; echo n8',
        "getent": "exit 0",
        "venv/bin/python": f'printf "%s\\0" - python "$@" > {tmp_path}/srun',
    }
    for name, body in commands.items():
        (bin_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (bin_dir / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_CPUS_PER_TASK": "6"}
    job |= {"SLURM_SUBMIT_DIR": str(REPO), "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "8"}
    job |= {"NT_RUNS": str(tmp_path / "runs"), "NT_VENV": str(bin_dir / "venv")}
    job |= {"PATH": f"{bin_dir}:{os.environ['PATH']}"} | env
    done = subprocess.run(
        ["bash", REPO / "slurm" / script, *flags], env=job, capture_output=True, text=True, timeout=60, check=False
    )
    given = (tmp_path / "srun").read_text().split("\0")[:-1] if (tmp_path / "srun").exists() else []
    return done, given


@pytest.mark.parametrize("script", RUNS)
def test_each_script_makes_a_command_line_that_the_program_takes(tmp_path: Path, script: str) -> None:
    done, (rendezvous, *words) = start(tmp_path, script)
    assert done.returncode == 0, done.stderr
    while words[0] in SRUN:
        words.pop(0)
    assert words[:2] == ["python", RUNS[script]]
    kinds = KINDS[RUNS[script]]
    if RUNS[script] == "pipeline/shard_mmud.py":
        (shard,) = command_line.parse(kinds, argv=words[2:], peek=())
        assert (shard.part, shard.source, shard.workers) == ("2/8", "mmud", 6)
        return
    if RUNS[script] == "pipeline/ablate.py":
        (study,) = parse(*kinds, argv=["--study", *words[2:]])
        assert (study.study, study.part) == ("table4", "2/8")
        return
    parsed = parse(*kinds, argv=words[2:])
    if RUNS[script] == "pipeline/train.py":
        assert rendezvous == "n7:17345"
        model, _, train = parsed
        assert model.preset == script.removesuffix(".sh").removeprefix("train_")
        assert train.output_dir == f"{tmp_path}/runs/job-12345"
        assert (REPO / train.deepspeed).is_file()


def test_flags_behind_a_script_count_more(tmp_path: Path) -> None:
    _, (_, *words) = start(tmp_path, "train_13b.sh", "--global_batch", "32", f"--output-dir={tmp_path}/x y")
    _, _, train = parse(*KINDS["pipeline/train.py"], argv=words[words.index("pipeline/train.py") + 1 :])
    assert train.global_batch == 32
    assert train.output_dir == f"{tmp_path}/x y"
    # The script looks for markers where the run leaves them.
    assert (tmp_path / "x y").is_dir()
    _, (_, *words) = start(tmp_path, "shard_mmud.sh", "--source", "mini", NT_PARTS="3")
    (shard,) = command_line.parse([ShardArguments], argv=words[2:], peek=())
    assert (shard.source, shard.mmud_root, shard.part) == ("mini", "", "2/3")


@pytest.mark.parametrize(
    "env, code, requeued",
    [
        ({"MARK": "REQUEUE"}, 0, True),
        ({"MARK": "DONE", "RC": "143"}, 0, False),
        ({"MARK": "REQUEUE", "SLURM_RESTART_COUNT": "30"}, 1, False),
        ({"MARK": "REQUEUE", "SLURM_RESTART_COUNT": "29"}, 0, True),
        ({"RC": "2"}, 2, False),
        ({"RC": "140"}, 140, False),
    ],
)
def test_the_marker_file_decides(tmp_path: Path, env: dict[str, str], code: int, requeued: bool) -> None:
    out = tmp_path / "runs" / "job-12345"
    if "MARK" in env:
        env = env | {"MARK": str(out / env["MARK"])}
    done, _ = start(tmp_path, "train_7b.sh", **env)
    assert done.returncode == code, done.stderr
    assert ("requeue 12345" in (tmp_path / "scontrol").read_text()) == requeued


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    done, given = start(tmp_path, "mini.sh", NT_VENV=str(tmp_path / "none"))
    assert done.returncode == 2 and not given
    assert done.stderr.splitlines() == [
        f"error: no Python in {tmp_path}/none/bin: run `make install`, or set NT_VENV in slurm/site.sh"
    ]
    done, given = start(tmp_path, "mini.sh", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and not given
    assert "submit from the root of the checkout" in done.stderr
    done, given = start(tmp_path, "mini.sh", SLURM_JOB_ID="")
    assert done.returncode == 2 and not given
    assert "submit it with sbatch" in done.stderr
    done, _ = start(tmp_path, "mini.sh", SBATCH_PARTITION="gpu", SLURM_JOB_PARTITION="cpu")
    assert "names partition gpu, this job is in cpu" in done.stderr


def told() -> list[tuple[str, list[str]]]:
    """(script, flags behind it) of every `sbatch` that a README or a script's head shows."""
    found = []
    for path in [REPO / "README.md", *(REPO / "slurm").iterdir()]:
        for line in path.read_text(encoding="utf-8").splitlines():
            for command in re.findall(r"sbatch (?:[^`#]* )?(slurm/\w+\.sh[^`#|]*)", line):
                script, *words = shlex.split(command.replace("...", ""))
                found.append((Path(script).name, [word for word in words if word.startswith("--")]))
    return found


def test_every_flag_that_the_texts_name_exists() -> None:
    commands = told()
    assert len(commands) > 15
    assert {script for script, _ in commands} >= set(RUNS)
    for script, flags in commands:
        if script not in RUNS:
            pytest.fail(f"{script} is told of, but not there")
        known = {field.name for kind in KINDS[RUNS[script]] for field in dataclasses.fields(kind)}
        unknown = [flag for flag in flags if flag.removeprefix("--").split("=")[0] not in known]
        assert not unknown, f"{script}: {unknown}"


def test_every_script_is_known() -> None:
    scripts = {path.name for path in (REPO / "slurm").glob("*.sh")}
    assert scripts == set(RUNS) | {"site.sh", "lib.sh"}
    text = (REPO / "slurm" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in scripts)
    files = {path.name for path in (REPO / "ds_configs").glob("*.json")}
    assert set(re.findall(r"^\| `(\w+\.json)` \|", text, re.MULTILINE)) == files


def test_long_jobs_can_be_continued() -> None:
    for script, program in RUNS.items():
        text = (REPO / "slurm" / script).read_text(encoding="utf-8")
        lines = re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)
        options = dict(line.partition("=")[::2] for line in lines)
        assert options["open-mode"] == "append" and "requeue" in options and "time" in options
        assert ("signal" in options) == (program == "pipeline/train.py")
        assert options.get("signal", "B:USR2@").startswith("B:USR2@")


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = sorted(path.name for path in (REPO / "slurm").glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "-x", *(f"slurm/{name}" for name in scripts)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
