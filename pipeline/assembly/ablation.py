"""One run of ablate.py: every row of a study at every seed, by train.py and evaluate_mmud.py, and the table of them.

A row at a seed is a run of its own in <output_dir>/<row>/seed<n>. What is finished (its report.json stands) is not run
again, what was stopped goes on from its checkpoint. A run with every setting of one which another study in the same
parent folder has finished (Table 3's whole and Table 5's first pattern, say) is not made twice: its folder is a link to
the other. In MLflow the study is a parent run and each run that is made here a child; a linked one stands in the other
study.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from pipeline.assembly.studies import Study, make_study
from pipeline.config import (
    REPO,
    AblationArguments,
    DataArguments,
    EvalArguments,
    ModelArguments,
    TrainArguments,
    parse,
    to_dict,
)
from pipeline.data.joining import parse_part
from pipeline.runtime.provenance import write_json
from pipeline.runtime.tracking import Tracker
from pipeline.scoring.ablation_table import Row, write_table
from pipeline.scoring.records import make_folder, read_object, read_report


@dataclass(frozen=True, slots=True)
class Job:
    """One row at one seed: its folder and its two commands, without MLflow's parent."""

    row: Row
    seed: int
    folder: Path
    train: tuple[str, ...]
    evaluate: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it has been scored."""
        return (self.folder / "report.json").is_file()

    def describe(self) -> str:
        """The two commands."""
        return f"{shlex.join(self.train)}\n{shlex.join(self.evaluate)}"


class Ablation:
    """A study as asked for. Raises ValueError for flags that do not fit."""

    def __init__(self, args: AblationArguments) -> None:
        self.args, self.folder = args, args.folder
        self.study: Study = make_study(args.study, self.folder, args.train_flags, args.eval_flags)
        asked = [name.strip() for name in args.rows.split(",") if name.strip()]
        names = [row.name for row in self.study.rows]
        if unknown := [name for name in asked if name not in names]:
            raise ValueError(f"--rows names {', '.join(unknown)}; {args.study} has {', '.join(names)}")
        rows = [row for row in self.study.rows if not asked or row.name in asked]
        # Seed by seed, so that a study that is stopped early has the whole table at fewer seeds.
        self.jobs = [self._job(row, seed) for seed in args.seed_list for row in rows]
        self.whole = [self._job(row, seed) for seed in args.seed_list for row in self.study.rows]

    def _job(self, row: Row, seed: int) -> Job:
        folder = self.folder / row.name / f"seed{seed}"
        start = shlex.split(self.args.launcher) or [sys.executable]
        train = [*start, str(REPO / "pipeline" / "train.py"), *shlex.split(self.args.train_flags), *row.flags]
        train += ["--seed", str(seed), "--output_dir", str(folder), "--run_name", f"{row.name}/seed{seed}"]
        score = [sys.executable, str(REPO / "pipeline" / "evaluate_mmud.py"), "--split", self.study.split]
        score += [*shlex.split(self.args.eval_flags), "--checkpoint", str(folder)]
        return Job(row, seed, folder, tuple(train), tuple(score))

    def own_jobs(self) -> list[Job]:
        """The jobs of this --part."""
        first, step = parse_part(self.args.part)
        return self.jobs[first - 1 :: step]

    def run(self) -> str:
        """Runs what is not finished, and returns the table; of a --part without a run, a line that says so.

        Raises RuntimeError naming the command if one fails (what is finished stays), ValueError if a folder holds runs
        of other flags or cannot be made.
        """
        own = self.own_jobs()
        if not own:
            return f"--part {self.args.part} has nothing to do: {self.args.study} has {len(self.jobs)} runs."
        for job in own:
            self._check_flags(job)
        make_folder(self.folder)
        # One store for the parent and all children, unless there is a server.
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.folder.resolve() / 'mlflow.db'}"
        parent = self._parent_run()
        for job in tqdm(own, desc=self.args.study, unit="run", dynamic_ncols=True):
            if not job.finished and not self._take_from_sister(job):
                write_json(job.folder / "job.json", _facts(job))
                _command([*job.train, *(["--mlflow_parent", parent] if parent else [])], job.folder / "train.log")
                _command(job.evaluate, job.folder / "evaluate.log")
        text = self.table()
        self._close_parent()
        return text

    def table(self) -> str:
        """The table of every finished run of the study, whoever ran it and whatever --rows names.

        Raises ValueError if there is none, or one of other flags.
        """
        if not any(job.finished for job in self.whole):
            raise ValueError(f"{self.folder} holds no finished run of {self.args.study}")
        # Parts may end together: the last one to write has read all that the others finished.
        with self._lock():
            return self._write_table()

    def _write_table(self) -> str:
        reports: dict[str, dict[int, Any]] = {}
        for job in self.whole:
            if job.finished:
                self._check_flags(job)
                report = read_report(job.folder, "remove it, and ablate.py scores that run again")
                reports.setdefault(job.row.name, {})[job.seed] = report
        done = sum(map(len, reports.values()))
        flags = {"train_flags": self.args.train_flags, "eval_flags": self.args.eval_flags}
        own = [word for name, value in flags.items() if value for word in (f"--{name}", value)]
        command = shlex.join(["python", "pipeline/ablate.py", self.args.study, "--seeds", self.args.seeds, *own])
        note = f"{done} of {len(self.whole)} runs, scored on the split {self.study.split}. Made by `{command}`."
        note += f" {self.study.note}" if self.study.note else ""
        study = self.study
        return write_table(self.folder, study.title, study.rows, reports, note, study.reference, **flags)

    def _lock(self) -> FileLock:
        """Held by one part of an array at a time."""
        return FileLock(self.folder / "parent.lock")

    def _check_flags(self, job: Job) -> None:
        record = job.folder / "job.json"
        if record.is_file() and _settings(record) != _facts(job)["settings"]:
            raise ValueError(
                f"{job.folder} holds a run with other flags ({record.name} there has them): give another --output_dir, "
                "or remove the folder"
            )

    def _take_from_sister(self, job: Job) -> bool:
        """Links the job's folder to that of a finished run of the same settings in another study, if there is one."""
        if job.folder.is_symlink() and not job.folder.exists():
            job.folder.unlink()  # What it led to has been removed.
        if job.folder.exists():
            return False
        wanted = _facts(job)["settings"]
        for record in sorted(self.folder.parent.glob("*/*/seed*/job.json")):
            other = record.parent
            same = not other.is_symlink() and _settings(record) == wanted
            if same and (other / "report.json").is_file():
                job.folder.parent.mkdir(parents=True, exist_ok=True)
                job.folder.symlink_to(os.path.relpath(other, job.folder.parent), target_is_directory=True)
                return True
        return False

    def _tracker(self, resume_step: int | None) -> Tracker:
        return Tracker(
            self.folder,
            experiment="neural-tuning",
            run_name=self.args.study,
            resume_step=resume_step,
            system_metrics=False,
        )

    def _parent_run(self) -> str | None:
        """MLflow's id of the study's run; None if the server does not answer. The parts of an array share it."""
        with self._lock():
            tracker = self._tracker(None)
            tracker.set_tags({"study": self.args.study, "title": self.study.title})
            tracker.close()
            return tracker.run_id

    def _close_parent(self) -> None:
        """The table into the study's run, which ends with its last run."""
        with self._lock():
            tracker = self._tracker(0 if all(job.finished for job in self.jobs) else None)
            for name in ("table.md", "table.csv", "table.json"):
                tracker.log_artifact(self.folder / name)
            tracker.close("FINISHED")


@cache
def _facts(job: Job) -> dict[str, Any]:
    """What a run's folder remembers: its commands' flags, and the settings that they come to, by which runs compare."""
    first = next(i for i, word in enumerate(job.train) if word.endswith("train.py"))
    train, evaluate = list(job.train[first + 1 :]), list(job.evaluate[2:])
    settings = to_dict(
        *parse(ModelArguments, DataArguments, TrainArguments, argv=train), *parse(EvalArguments, argv=evaluate)
    )
    values = settings["TrainArguments"]
    for name in ("output_dir", "run_name"):
        del values[name]
    del settings["EvalArguments"]["checkpoint"]
    # A group's rate that is unset is lr.
    for name in [name for name in values if name.startswith("lr_") and values[name] is None]:
        values[name] = values["lr"]
    return {"train": train, "evaluate": evaluate, "settings": settings}


def _settings(record: Path) -> Any:
    """The settings in a job.json, None without. ValueError if it is damaged."""
    return read_object(record, f"remove the folder {record.parent}").get("settings")


def _command(words: list[str] | tuple[str, ...], log: Path) -> None:
    """Runs a command; all that it prints goes to `log`. RuntimeError with the end of it if it fails."""
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode} ({log} has all of it):\n{tail}")
