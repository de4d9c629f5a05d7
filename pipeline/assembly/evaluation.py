"""One run of evaluate_mmud.py: what a checkpoint names is loaded, scored, and written down."""

from __future__ import annotations

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
from pipeline.runtime.checkpoint import load_trained
from pipeline.runtime.evaluator import Evaluator, Prediction
from pipeline.runtime.provenance import git_state, package_versions
from pipeline.runtime.reporting import contact_sections, save_predictions
from pipeline.runtime.tracking import Tracker
from pipeline.scoring.contact_sheet import draw_sheet
from pipeline.scoring.report import build_report, format_table, write_report

CONDITIONS_IN_ORDER = ("untuned", "tuned", "shuffled")


class Evaluation:
    """One run of evaluate_mmud.py: loads what the checkpoint names, scores its conditions, writes the report.

    Raises:
        ValueError: a path, a file or a setting does not fit; the message says what to do.
    """

    def __init__(self, args: EvalArguments, device: torch.device) -> None:
        self.args, self.device = args, device
        self.trained = trained = open_checkpoint(args.checkpoint, args.replaced)
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
        """Sends figures and files to the MLflow run that trained the checkpoint, if there is one."""
        run_id = self.trained.state.get("mlflow_run_id")
        if not run_id:
            return
        step = self.trained.state["step"]
        tracker = Tracker(
            self.trained.folder.parent,
            experiment=self.trained.state["config"]["TrainArguments"]["mlflow_experiment"],
            run_name="",
            run_id=run_id,
            resume_step=None,
            system_metrics=False,
        )
        for condition in self.figures:
            scores = {f"{self.args.split}/{condition}/{k}": v for k, v in report[condition].items() if v is not None}
            tracker.log_metrics(step, scores)
        for path in files:
            tracker.log_artifact(path, "evaluation")
        tracker.close()
