"""One run of evaluate_mmud.py: what a checkpoint names is loaded, scored, and written down."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.assembly import parts
from pipeline.assembly.loading import check_base, default_dtype, load_painter, open_checkpoint, untrained_tuner
from pipeline.config import REPO, EvalArguments
from pipeline.mini import grammar
from pipeline.model.painter import Sampling
from pipeline.runtime.checkpoint import is_exported, load_trained
from pipeline.runtime.evaluator import Evaluator, Prediction
from pipeline.runtime.journal import METRICS
from pipeline.runtime.provenance import git_state, package_versions
from pipeline.runtime.reporting import contact_sections, save_predictions
from pipeline.runtime.tracking import Tracker
from pipeline.scoring.contact_sheet import draw_sheet
from pipeline.scoring.report import build_report, format_table, write_report

TABLE_ROWS = 1000
"""Answers in MLflow's table; predictions/ has all."""
CONDITIONS_IN_ORDER = ("untuned", "tuned", "shuffled")


class Evaluation:
    """One run of evaluate_mmud.py: loads what the checkpoint names, scores its conditions, writes the report.

    Raises:
        ValueError: a path, a file or a setting does not fit; the message says what to do.
    """

    def __init__(self, args: EvalArguments, device: torch.device) -> None:
        self.args, self.device = args, device
        self.trained = trained = open_checkpoint(args.checkpoint, args.replaced)
        if is_exported(trained.folder) and not args.report_dir:
            raise ValueError(f"--report_dir names the folder of the report: {trained.folder} is an export, not a run")
        self.folder = Path(args.report_dir or trained.folder.parent)
        check_base(trained)
        self.dataset = parts.open_split(trained.data.data, args.split)
        token_map = parts.load_token_map(trained.model)
        vision = parts.load_vision(trained.model, device)
        sampling = Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, candidates=args.candidates
        )
        painter = load_painter(trained.model, vision, sampling, device)
        if painter is None:
            print("No --vqgan and --prior: pictures are neither drawn nor scored.")
        self.seed = trained.seed
        self.tuner = untrained_tuner(trained, vision, device, default_dtype(device))
        mini = self.dataset[0].source == "mini"
        self.evaluator = Evaluator(
            tuner=self.tuner,
            vision=vision,
            token_map=token_map,
            collator=parts.make_collator(trained.model, trained.data, token_map, vision, self.seed),
            dataset=self.dataset,
            painter=painter,
            tasks=trained.data.task_names,
            device=device,
            batch_size=args.eval_batch,
            max_new_tokens=args.max_new_tokens,
            protocol={"free": "free-running"}.get(args.protocol, args.protocol),
            limit=args.limit,
            num_workers=args.num_workers,
            seed=args.seed,
            full_name=grammar.names_in if mini else None,
            colour_shape=grammar.colour_shapes_in if mini else None,
        )
        self.figures: dict[str, dict[str, float | None]] = {}
        self.seconds: dict[str, float] = {}
        self.shown: list[Prediction] = []
        self._weights_read = False

    def run(self) -> None:
        """Predicts and scores the asked-for conditions; the untuned one first, before the weights are read."""
        asked = CONDITIONS_IN_ORDER if self.args.condition == "all" else (self.args.condition,)
        for condition in asked:
            if condition != "untuned" and not self._weights_read:
                load_trained(self.tuner, self.trained.folder)
                self._weights_read = True
            start = time.perf_counter()
            predictions = self.evaluator.predict(condition)
            self.figures[condition] = self.evaluator.score(predictions, condition)
            self.seconds[f"evaluate {condition}"] = time.perf_counter() - start
            save_predictions(predictions, self.folder, condition)
            if condition == "tuned" or not self.shown:
                self.shown = predictions

    def write(self) -> str:
        """Writes report.json, report.md and the contact sheet, logs them, and returns the table for the terminal."""
        sheet = draw_sheet(
            contact_sections(self.shown, self.dataset),
            self.folder / "contact_sheet.png",
            title=f"{self.trained.folder.parent.name} on {self.args.split}",
            subtitle=f"{self.trained.folder.name} · {self.evaluator.protocol} decoding · the split's first samples",
        )
        run_record = self.trained.folder.parent / "run.json"
        before = json.loads(run_record.read_text()).get("seconds", {}) if run_record.is_file() else {}
        git = git_state(REPO)
        report = build_report(
            self.figures,
            {
                "samples": self.evaluator.counts,
                "seconds": {**before, **{stage: round(s, 1) for stage, s in self.seconds.items()}},
                "versions": package_versions(),
                "commit": git["commit"] and git["commit"] + ("-dirty" if git["dirty"] else ""),
                "checkpoint": str(self.trained.folder),
                "split": self.args.split,
                "protocol": self.evaluator.protocol,
                "device": str(self.device),
                "seed": self.seed,
                "picture scores": f"by the run's own CLIP ({self.trained.model.clip})",
            },
        )
        path = write_report(report, self.folder, title=f"Evaluation of {self.folder.name}", sheet=sheet.name)
        self._log(report, [path, path.with_suffix(".md"), sheet])
        lines = [format_table(report), "", f"Report: {path.with_suffix('.md')}", f"Contact sheet: {sheet}"]
        if self.evaluator.skipped:
            lines.append(f"{len(self.evaluator.skipped)} samples could not be read, e.g. {self.evaluator.skipped[0]}")
        return "\n".join(lines)

    def _log(self, report: dict[str, Any], files: list[Path]) -> None:
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
        for condition in self.figures:
            scores = {f"{split}/{condition}/{k}": v for k, v in report[condition].items() if v is not None}
            tracker.log_metrics(step, scores, evaluation=True)
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
        place = f"evaluation/{split}-step-{step}-{now}"
        for path in files:
            tracker.log_artifact(path, place)
        names = list(report[next(iter(self.figures))])
        tracker.log_table(
            {"score": names} | {c: [report[c].get(name) for name in names] for c in self.figures},
            f"{place}/scores.json",
        )
        shown = self.shown[:TABLE_ROWS]
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
