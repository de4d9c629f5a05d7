"""One run of evaluate_mmud.py: what a checkpoint names is loaded, its answers are saved and scored.

Saved answers can be scored again without a model: both ways lead through `score_saved`, so the figures are the same.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.assembly import parts
from pipeline.assembly.loading import check_base, default_dtype, load_painter, open_checkpoint, untrained_tuner
from pipeline.config import REPO, EvalArguments
from pipeline.data.loader import SampleSource
from pipeline.data.task_module import load_task_module
from pipeline.mini import grammar
from pipeline.model.painter import Sampling
from pipeline.runtime.checkpoint import is_exported, load_trained
from pipeline.runtime.evaluator import EachPhrase, Evaluator
from pipeline.runtime.journal import METRICS
from pipeline.runtime.provenance import git_state, package_versions
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.reporting import contact_sections
from pipeline.runtime.tracking import Tracker
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.contact_sheet import draw_sheet
from pipeline.scoring.distributions import Inception
from pipeline.scoring.paper_tables import write_tables
from pipeline.scoring.predictions import Prediction, load_predictions, read_about, save_about, save_predictions
from pipeline.scoring.report import build_report, format_table, write_report
from pipeline.scoring.suite import Rules, Scored, score_predictions

TABLE_ROWS = 1000
"""Answers in MLflow's table; predictions/ has all."""
CONDITIONS_IN_ORDER = ("untuned", "tuned", "shuffled")
SHEET = "contact_sheet.png"


class Evaluation:
    """Loads what a checkpoint names, answers its conditions, saves the answers, and scores them.

    Every rank answers a share of the prompts; the first one saves, scores and writes.

    Raises:
        ValueError: a path, a file or a setting does not fit; the message says what to do.
    """

    def __init__(self, args: EvalArguments, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.trained = trained = open_checkpoint(args.checkpoint, args.replaced)
        if is_exported(trained.folder) and not args.report_dir:
            raise ValueError(f"--report_dir names the folder of the report: {trained.folder} is an export, not a run")
        self.folder = Path(args.report_dir or trained.folder.parent)
        self.predictions = self.folder / "predictions"
        check_base(trained)
        whole = parts.open_split(trained.data.data, args.split)
        self.dataset: SampleSource = EachPhrase(whole) if args.each_phrase else whole
        self.tasks = ("referring",) if args.each_phrase else trained.data.task_names
        device = ranks.device
        inception = Inception(args.inception_weights, device) if args.inception_weights else None
        token_map = parts.load_token_map(trained.model)
        vision = parts.load_vision(trained.model, device)
        sampling = Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, candidates=args.candidates
        )
        painter = load_painter(trained.model, vision, sampling, device)
        if painter is None and ranks.is_main:
            print("No --vqgan and --prior: pictures are neither drawn nor scored.")
        self.seed = trained.seed
        self.tuner = untrained_tuner(trained, vision, device, default_dtype(device))
        self.evaluator = Evaluator(
            tuner=self.tuner,
            vision=vision,
            token_map=token_map,
            collator=parts.make_collator(trained.model, trained.data, token_map, vision, self.seed),
            dataset=self.dataset,
            painter=painter,
            inception=inception,
            tasks=self.tasks,
            ranks=ranks,
            batch_size=args.eval_batch,
            max_new_tokens=args.max_new_tokens,
            limit=args.limit,
            num_workers=args.num_workers,
            seed=args.seed,
        )

    def run(self) -> str:
        """Answers and saves the asked-for conditions, scores them, and returns what to print ("" but on the first
        rank). The untuned one comes first, before the weights are read."""
        main = "teacher-forced" if self.args.protocol == "teacher-forced" else "free-running"
        asked = list(CONDITIONS_IN_ORDER if self.args.condition == "all" else (self.args.condition,))
        plan = [(condition, main) for condition in asked]
        if self.args.protocol == "both":
            plan.append(("teacher_forced", "teacher-forced"))
        seconds, per_pair, weights_read = {}, {}, False
        for condition, protocol in plan:
            if condition != "untuned" and not weights_read:
                load_trained(self.tuner, self.trained.folder)
                weights_read = True
            start = time.perf_counter()
            answers = self.evaluator.predict(condition, protocol)
            if self.ranks.is_main:
                save_predictions(answers, self.evaluator.picture_features(answers), self.predictions, condition)
            seconds[f"evaluate {condition}"] = round(time.perf_counter() - start, 1)
            per_pair[condition] = {task: round(s, 4) for task, s in self.evaluator.seconds_per_pair.items()}
        if not self.ranks.is_main:
            return ""
        save_about(self.predictions, self._about([condition for condition, _ in plan], main, seconds, per_pair))
        shown, _ = load_predictions(self.predictions, "tuned" if "tuned" in asked else asked[0])
        self._draw(shown)
        text = score_saved(self.predictions, self.folder, self.args)
        report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        self._log(report, [condition for condition, _ in plan], shown)
        if self.evaluator.skipped:
            text += f"\n{len(self.evaluator.skipped)} samples could not be read, e.g. {self.evaluator.skipped[0]}"
        return text

    def _about(
        self, conditions: list[str], protocol: str, seconds: dict[str, float], per_pair: dict[str, Any]
    ) -> dict[str, Any]:
        run_record = self.trained.folder.parent / "run.json"
        before = json.loads(run_record.read_text()).get("seconds", {}) if run_record.is_file() else {}
        git = git_state(REPO)
        return {
            "conditions": conditions,
            "tasks": list(self.tasks),
            "task_module": self.trained.data.task_module,
            "vocabulary": "mini" if self.dataset[0].source == "mini" else "",
            "run": {
                "seconds": {**before, **seconds},
                "seconds per pair": per_pair,
                "versions": package_versions(),
                "commit": git["commit"] and git["commit"] + ("-dirty" if git["dirty"] else ""),
                "checkpoint": str(self.trained.folder),
                "data": self.trained.data.data,
                "split": self.args.split,
                "phrases": "each alone" if self.args.each_phrase else "drawn",
                "protocol": protocol,
                "device": str(self.ranks.device),
                "seed": self.seed,
                "picture scores": f"by the run's own CLIP ({self.trained.model.clip})",
            },
        }

    def _draw(self, shown: Sequence[Prediction]) -> None:
        draw_sheet(
            contact_sections(shown, self.dataset),
            self.folder / SHEET,
            title=f"{self.trained.folder.parent.name} on {self.args.split}",
            subtitle=f"{self.trained.folder.name} · {self.args.protocol} decoding · the split's first samples",
        )

    def _log(self, report: Mapping[str, Any], conditions: Sequence[str], answers: Sequence[Prediction]) -> None:
        """Adds figures and files to the run that trained the checkpoint, if it was tracked.

        Each evaluation has a folder of its own there; of the figures, at the checkpoint's step, MLflow shows the
        newest evaluation's and keeps the others in their history. The tag `evaluation` names the newest folder.
        """
        run_id, run = self.trained.state.get("mlflow_run_id"), self.trained.folder.parent
        if not run_id and not (run / METRICS).is_file():
            return
        trained_by, step = self.trained.state["config"]["TrainArguments"], self.trained.state["step"]
        split = self.args.split
        tracker = Tracker(
            run,
            experiment=trained_by["mlflow_experiment"],
            run_name=trained_by["run_name"] or run.name,
            run_id=run_id,
            resume_step=None,
            system_metrics=False,
        )
        for condition in conditions:
            scores = {f"{split}/{condition}/{k}": v for k, v in report[condition].items() if v is not None}
            tracker.log_metrics(step, scores, evaluation=True)
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
        place = f"evaluation/{split}-step-{step}-{now}"
        for name in ("report.json", "report.md", SHEET):
            tracker.log_artifact(self.folder / name, place)
        names = list(report[conditions[0]])
        tracker.log_table(
            {"score": names} | {c: [report[c].get(name) for name in names] for c in conditions},
            f"{place}/scores.json",
        )
        shown = answers[:TABLE_ROWS]
        tracker.log_table(
            {
                "key": [p.key for p in shown],
                "task": [p.task for p in shown],
                "question": [p.reference["question"] for p in shown],
                "answer": [p.text for p in shown],
                "right answer": [p.reference["answer"] for p in shown],
            },
            f"{place}/answers.json",
        )
        tracker.set_tags({"evaluation": place})
        tracker.close()


def score_saved(predictions: Path, folder: Path, args: EvalArguments) -> str:
    """Scores saved predictions, writes report.json, report.md, details.json and the paper's tables to `folder`, and
    returns the table for the terminal. No model is loaded.

    Raises:
        ValueError: the predictions are not whole or damaged.
    """
    about = read_about(predictions)
    if about["task_module"]:
        load_task_module(about["task_module"])
    mini = about["vocabulary"] == "mini"
    rules = Rules(
        tasks=tuple(about["tasks"]),
        bootstrap=Bootstrap(replicates=args.bootstrap, seed=args.seed),
        seed=args.seed,
        full_name=grammar.names_in if mini else None,
        colour_shape=grammar.colour_shapes_in if mini else None,
    )
    scored: dict[str, Scored] = {}
    samples: dict[str, int] = {}
    for condition in about["conditions"]:
        answers, features = load_predictions(predictions, condition)
        scored[condition] = score_predictions(answers, features, rules, condition)
        samples = {task: sum(p.task == task for p in answers) for task in rules.tasks}
    report = build_report(
        {condition: found.figures for condition, found in scored.items()},
        {"samples": samples, **about["run"]},
        {condition: found.intervals for condition, found in scored.items()},
    )
    sheet = SHEET if (folder / SHEET).is_file() else ""
    details = {condition: found.details for condition, found in scored.items()}
    path = write_report(report, folder, title=f"Evaluation of {folder.name}", sheet=sheet, details=details)
    tables = write_tables({folder.name: report}, folder)
    lines = [format_table(report), "", f"Report: {path.with_suffix('.md')}", f"The paper's tables: {tables}"]
    return "\n".join(lines + ([f"Contact sheet: {folder / sheet}"] if sheet else []))
