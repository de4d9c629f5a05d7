"""A run from its schedule to its end: engine, checkpoint to go on from, tracker, trainer, and what run.json keeps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.assembly.schedule import Schedule
from pipeline.config import REPO
from pipeline.data.loader import MakeBatch
from pipeline.data.mixture import absolute_folders
from pipeline.model.losses import LossWeights
from pipeline.runtime.checkpoint import load_checkpoint, set_aside
from pipeline.runtime.engine import Engine
from pipeline.runtime.provenance import flatten, git_diff, write_json
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.stopping import DONE
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.trainer import Trainer

_PATHS = ("base", "clip_weights", "vqgan", "prior", "output_dir", "task_module")
_LOCAL_CLIP = "local-dir:"

Validate = Callable[[int], Mapping[str, float] | None]


def announce(schedule: Schedule, what: str, resume: Path | None) -> None:
    """Says what is about to happen; with --resume never, an earlier run's files are set aside."""
    run = schedule.run
    if not schedule.ranks.is_main:
        return
    if run.resume == "never" and (earlier := set_aside(run.output_dir)):
        print(f"Starting anew; the earlier run's files are now in {earlier}.")
    print(what)
    if resume is not None:
        print(f"Going on from {resume}; give --resume never to start anew.")


def train(
    schedule: Schedule,
    model: nn.Module,
    groups: list[dict[str, Any]],
    *,
    resume: Path | None,
    collator: MakeBatch[Any],
    features: Callable[[Any], Any],
    record: Mapping[str, Any],
    make_validation: Callable[[Engine, Tracker], Validate | None],
    flops_per_token: float,
    finish: Callable[[Tracker], str],
    began: float,
    weights: LossWeights | None = None,
) -> str:
    """Trains to the end or until a signal, tracked; returns how the run ended (DONE or REQUEUE).

    groups: of the optimizer. resume: the checkpoint to go on from. features: of the frozen models, from a batch's
    pictures. record: run.json. finish: called by every rank after the last step, for the line that the first one
    prints. began: `time.perf_counter()` when loading began. The errors are those of `Trainer.train`.
    """
    run, ranks = schedule.run, schedule.ranks
    engine = Engine(model, groups, schedule.deepspeed, ranks, optimizer=schedule.optimizer)
    state = load_checkpoint(engine, resume) if resume is not None else {}
    first = state.get("step", 0)
    tracker = Tracker(
        run.output_dir,
        experiment=run.mlflow_experiment,
        run_name=run.run_name or Path(run.output_dir).name,
        resume_step=first,
        run_id=state.get("mlflow_run_id"),
        enabled=ranks.is_main,
    )
    ended = "FAILED"
    try:
        _log_record(tracker, record, run.output_dir, ranks, first)
        trainer = Trainer(
            engine,
            schedule.batches(collator, first),
            features,
            tracker,
            output_dir=run.output_dir,
            first_step=first,
            last_step=schedule.steps,
            weights=weights,
            seed=run.seed,
            logging_steps=run.logging_steps,
            save_steps=run.save_steps,
            keep=run.save_total_limit,
            eval_steps=run.eval_steps,
            on_validate=make_validation(engine, tracker),
            state=record,
            max_bad_share=schedule.reading.max_bad_share,
            max_bad_steps=run.max_bad_steps,
            bad_steps=state.get("bad_steps"),
            hang_timeout=run.hang_timeout,
            flops_per_token=flops_per_token,
        )
        loaded = time.perf_counter()
        marker = trainer.train()
        ended = "FINISHED" if marker == DONE else "KILLED"
        _log_seconds(run.output_dir, ranks, load=loaded - began, tune=time.perf_counter() - loaded)
        if marker == DONE:
            closing = finish(tracker)
            if ranks.is_main:
                print(closing)
        return marker
    finally:
        tracker.close(ended)


def with_absolute_paths(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`to_dict`'s answer with every path absolute, so that a checkpoint can be scored from any folder."""

    def absolute(name: str, value: Any) -> Any:
        if name == "clip" and value.startswith(_LOCAL_CLIP):
            return _LOCAL_CLIP + os.path.abspath(value.removeprefix(_LOCAL_CLIP))
        if name == "data":
            return absolute_folders(value)
        return os.path.abspath(value) if name in _PATHS and value else value

    return {kind: {name: absolute(name, v) for name, v in values.items()} for kind, values in config.items()}


def _log_record(tracker: Tracker, record: Mapping[str, Any], output_dir: str, ranks: Ranks, first: int) -> None:
    """run.json and, of a changed checkout, git.diff into the run's folder, and both to MLflow.

    first: the step that this start of the run goes on from; a tag of that name says where and by what it ran.
    """
    if not ranks.is_main:
        return
    path = write_json(Path(output_dir) / "run.json", record)
    tracker.log_params(flatten(record["config"]) | flatten(record["deepspeed"], "deepspeed"))
    tracker.set_tags(
        {
            "git": record["git"],
            "versions": record["versions"],
            "base": record["base"],
            "mlflow.source.name": record["command"][1],
            "mlflow.source.git.commit": record["git"]["commit"],
            f"start.{first}": {**record["machine"], "world_size": record["world_size"], "git": record["git"]},
        }
    )
    if parent := record["config"].get("TrainArguments", {}).get("mlflow_parent"):
        tracker.set_tags({"mlflow.parentRunId": parent})
    tracker.log_artifact(path)
    if changed := git_diff(REPO):
        diff = path.with_name("git.diff")
        diff.write_text(changed, encoding="utf-8")
        tracker.log_artifact(diff)


def _log_seconds(output_dir: str, ranks: Ranks, **seconds: float) -> None:
    """Adds the seconds of this start's stages to run.json: those of an earlier, stopped start stay counted."""
    path = Path(output_dir) / "run.json"
    if ranks.is_main:
        record = json.loads(path.read_text())
        before = record.get("seconds", {})
        record["seconds"] = {stage: round(before.get(stage, 0.0) + s, 1) for stage, s in seconds.items()}
        write_json(path, record)
