"""One run of evaluate_mmud.py: what a checkpoint names is loaded, scored, and written down."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from pipeline.assembly import parts
from pipeline.config import REPO, DataArguments, EvalArguments, ModelArguments, from_dict
from pipeline.mini import grammar
from pipeline.model import quantisation
from pipeline.model.fingerprint import fingerprint
from pipeline.model.initialise import initialise
from pipeline.model.painter import Painter, Sampling
from pipeline.runtime.checkpoint import find_latest, load_trained, read_state
from pipeline.runtime.evaluator import Evaluator, Prediction
from pipeline.runtime.provenance import git_state, package_versions
from pipeline.runtime.reporting import contact_sections, save_predictions
from pipeline.runtime.tracking import Tracker
from pipeline.scoring.contact_sheet import draw_sheet
from pipeline.scoring.pictures import embed_pictures
from pipeline.scoring.report import build_report, format_table, write_report

Kind = TypeVar("Kind")
CONDITIONS_IN_ORDER = ("untuned", "tuned", "shuffled")


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint's folder and what its state.json says of the model, the data and the run."""

    folder: Path
    model: ModelArguments
    data: DataArguments
    state: dict[str, Any]


def open_checkpoint(checkpoint: str, replaced: Mapping[str, str]) -> Trained:
    """A checkpoint, or the newest whole one of a run's folder; its weights are not read yet.

    Args:
        checkpoint: the folder; empty takes runs/mini.
        replaced: paths that stand elsewhere than when it was trained, by flag.

    Raises:
        ValueError: there is no whole checkpoint, or it was made by an incompatible version.
    """
    asked = Path(checkpoint or REPO / "runs" / "mini")
    folder = asked if (asked / "state.json").is_file() else find_latest(asked)
    if folder is None:
        raise ValueError(
            f"--checkpoint {asked}: there is no whole checkpoint; `deepspeed pipeline/train.py` makes one in runs/mini"
        )
    state = read_state(folder)

    def settings(kind: type[Kind]) -> Kind:
        own = {name: path for name, path in replaced.items() if name in get_type_hints(kind)}
        return from_dict(kind, state["config"], **own)

    return Trained(folder, settings(ModelArguments), settings(DataArguments), state)


class Evaluation:
    """One run of evaluate_mmud.py: loads what the checkpoint names, scores its conditions, writes the report.

    Raises:
        ValueError: a path, a file or a setting does not fit; the message says what to do.
    """

    def __init__(self, args: EvalArguments, device: torch.device) -> None:
        self.args, self.device = args, device
        self.trained = trained = open_checkpoint(args.checkpoint, args.replaced)
        self.folder = Path(args.report_dir or trained.folder.parent)
        parts.read_config(trained.model)
        found, trained_on = fingerprint(trained.model.base), trained.state["base"]["fingerprint"]
        if found != trained_on:
            raise ValueError(
                f"--base {trained.model.base} is not the model that {trained.folder} was tuned on (fingerprint "
                f"{found[:12]} instead of {trained_on[:12]}): give the folder of the same base model"
            )
        self.dataset = parts.open_split(trained.data.data, args.split)
        token_map = parts.load_token_map(trained.model)
        vision = parts.load_vision(trained.model, device)
        painter = None
        if trained.model.prior and trained.model.vqgan:
            sampling = Sampling(
                temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, candidates=args.candidates
            )
            folders, embed = (trained.model.prior, trained.model.vqgan), partial(embed_pictures, vision)
            painter = Painter.load(*folders, embed, vision.embed_dim, sampling, device)
        else:
            print("No --vqgan and --prior: pictures are neither drawn nor scored.")
        self.seed = int(trained.state["config"]["TrainArguments"]["seed"])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        quantisation.check(trained.model.base_quant, stage=0)
        llm = parts.load_llm(trained.model, dtype, device=device)
        self.tuner = parts.make_tuner(trained.model, llm, vision, seed=self.seed).to(device)
        initialise(self.tuner, self.seed)
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
