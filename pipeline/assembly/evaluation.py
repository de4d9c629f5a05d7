"""One run of evaluate_mmud.py: what a checkpoint names is loaded, its answers are saved and scored.

Saved answers can be scored again without a model: both ways lead through `score_answers`, so the figures are the same.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.assembly import parts
from pipeline.assembly.loading import check_base, default_dtype, load_painter, open_checkpoint, untrained_tuner
from pipeline.config import REPO, EvalArguments
from pipeline.data.loader import SampleSource
from pipeline.data.schema import Sample
from pipeline.data.task_module import load_task_module
from pipeline.mini import grammar
from pipeline.model.painter import Sampling
from pipeline.runtime.checkpoint import is_exported, load_trained, verify
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
from pipeline.scoring.records import make_folder, read_object
from pipeline.scoring.report import build_report, format_table, tokenizer_note, write_report
from pipeline.scoring.suite import Rules, Scored, score_predictions

TABLE_ROWS = 1000
"""Answers in MLflow's table; predictions/ has all."""
CONDITIONS_IN_ORDER = ("untuned", "tuned", "shuffled")
SHEET = "contact_sheet.png"
EACH_ALONE = "each alone"


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
        if args.each_phrase and "referring" not in trained.data.task_names:
            raise ValueError(
                f"--each_phrase asks for what phrases refer to, and {trained.folder} was not tuned to the task "
                f"referring (its tasks: {', '.join(trained.data.task_names)}): leave the flag out"
            )
        self.folder = Path(args.report_dir or trained.folder.parent)
        self.predictions = self.folder / "predictions"
        if problem := ranks.from_main(self._problem() if ranks.is_main else ""):
            raise ValueError(problem)
        check_base(trained)
        self.seconds_before = _seconds_of_training(trained.folder.parent / "run.json")
        whole = parts.open_split(trained.data.data, args.split)
        each = EachPhrase(whole) if args.each_phrase else None
        # Either may be empty, and so false.
        self.dataset: SampleSource = whole if each is None else each
        self.tasks = trained.data.task_names if each is None else ("referring",)
        self.vocabulary = "mini" if _first_readable(self.dataset, args.split).source == "mini" else ""
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
        self.dtype = default_dtype(device)
        self.max_new_tokens = most_tokens(args.max_new_tokens, trained.model.preset)
        self.tuner = untrained_tuner(trained, vision, device, self.dtype)
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
            max_new_tokens=self.max_new_tokens,
            limit=args.limit,
            num_workers=args.num_workers,
            seed=args.seed,
        )
        self.evaluator.skipped += [] if each is None else each.skipped

    def _problem(self) -> str:
        """What would stop this evaluation after the large files are read or the answers given; "" if nothing."""
        try:
            make_folder(self.predictions)
        except ValueError as error:
            return str(error)
        if problems := verify(self.trained.folder):
            return f"{self.trained.folder} is no whole checkpoint: {'; '.join(problems)}"
        return ""

    def run(self) -> str:
        """Answers and saves the asked-for conditions, scores them, and returns what to print ("" but on the first
        rank). The untuned one comes first, before the weights are read."""
        main = "teacher-forced" if self.args.protocol == "teacher-forced" else "free-running"
        asked = list(CONDITIONS_IN_ORDER if self.args.condition == "all" else (self.args.condition,))
        plan = [(condition, main) for condition in asked]
        if self.args.protocol == "both":
            plan.append(("teacher_forced", "teacher-forced"))
        seconds, per_pair, saved, weights_read = {}, {}, {}, False
        for condition, protocol in plan:
            if condition != "untuned" and not weights_read:
                load_trained(self.tuner, self.trained.folder)
                weights_read = True
            start = time.perf_counter()
            answers = self.evaluator.predict(condition, protocol)
            if self.ranks.is_main:
                features = self.evaluator.picture_features(answers)
                saved[condition] = save_predictions(answers, features, self.predictions, condition)
            seconds[f"evaluate {condition}"] = round(time.perf_counter() - start, 1)
            per_pair[condition] = {task: round(s, 4) for task, s in self.evaluator.seconds_per_pair.items()}
        if not self.ranks.is_main:
            return ""
        save_about(self.predictions, self._about(saved, main, seconds, per_pair))
        about = read_about(self.predictions)
        condition = "tuned" if "tuned" in asked else asked[0]
        shown, _ = load_predictions(self.predictions, about, condition)
        self._draw(shown, f"{condition}, {main} decoding")
        text = score_answers(about, self.predictions, self.folder, self.args)
        report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        self._log(report, [condition for condition, _ in plan], shown)
        if skipped := self._skipped():
            text += f"\n{len(skipped)} samples could not be read, e.g. {skipped[0]}"
        return text

    def _skipped(self) -> list[str]:
        """The samples that could not be read, each once for all tasks and conditions."""
        return list(dict.fromkeys(self.evaluator.skipped))

    def _about(
        self, saved: dict[str, Any], protocol: str, seconds: dict[str, float], per_pair: dict[str, Any]
    ) -> dict[str, Any]:
        git, args = git_state(REPO), self.args
        drawn = ("limit", "candidates", "temperature", "top_k", "top_p", "seed")
        return {
            "conditions": list(saved),
            "saved": saved,
            "tasks": list(self.tasks),
            "task_module": self.trained.data.task_module,
            "vocabulary": self.vocabulary,
            "run": {
                "seconds": {**self.seconds_before, **seconds},
                "seconds per pair": per_pair,
                "versions": package_versions(),
                "commit": git["commit"] and git["commit"] + ("-dirty" if git["dirty"] else ""),
                "checkpoint": str(self.trained.folder),
                "data": self.trained.data.data,
                "split": args.split,
                "phrases": EACH_ALONE if args.each_phrase else "drawn",
                "protocol": protocol,
                "device": str(self.ranks.device),
                "seed": self.seed,
                "picture scores": f"by the run's own CLIP ({self.trained.model.clip})",
                "skipped samples": len(self._skipped()),
                "settings": {
                    "max_new_tokens": self.max_new_tokens,
                    **{name: getattr(args, name) for name in drawn},
                    "inception_weights": Path(args.inception_weights).name,
                    "base_quant": self.trained.model.base_quant,
                    "dtype": str(self.dtype).removeprefix("torch."),
                },
            },
        }

    def _draw(self, shown: Sequence[Prediction], how: str) -> None:
        draw_sheet(
            contact_sections(shown, self.dataset),
            self.folder / SHEET,
            title=f"{self.trained.folder.parent.name} on {self.args.split}",
            subtitle=f"{self.trained.folder.name} · {how} · the split's first samples",
        )

    def _log(self, report: Mapping[str, Any], conditions: Sequence[str], answers: Sequence[Prediction]) -> None:
        """Adds figures and files to the run that trained the checkpoint, if it was tracked.

        Each evaluation has a folder of its own there; of the figures, at the checkpoint's step, MLflow shows the
        newest evaluation's and keeps the others in their history. The tag `evaluation` names the newest folder. An
        export is nobody's run, wherever it lies.
        """
        if is_exported(self.trained.folder):
            return
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


def most_tokens(asked: int, preset: str) -> int:
    """--max_new_tokens, or what 0 stands for. MMUD's captions have up to 72 tokens. The mini world's are short, and its
    untuned LM goes on to the limit, so that a higher one would make it another untuned model."""
    return asked or (64 if preset == "mini" else 128)


def _seconds_of_training(record: Path) -> dict[str, float]:
    """The seconds that run.json names by stage; {} without the file. Raises ValueError if it cannot be read."""
    if not record.is_file():
        return {}
    remedy = "mend it or move it away; without it the report lacks the seconds of training"
    found = read_object(record, remedy).get("seconds", {})
    try:
        if not all(map(math.isfinite, found.values())):
            raise ValueError("a number of seconds is not finite")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{record} is damaged (seconds: {error}): {remedy}") from error
    return found


def _first_readable(dataset: SampleSource, split: str) -> Sample:
    """The first sample of a split that can be read. Raises ValueError if there is none."""
    reason = "it is empty"
    for i in range(len(dataset)):
        try:
            return dataset[i]
        except ValueError as error:
            reason = f"{dataset.key(i)}: {error}"
    raise ValueError(
        f"--split {split} holds nothing that can be asked ({reason}): look at the data set with "
        "`python pipeline/shard_mmud.py --verify`"
    )


def score_saved(predictions: Path, folder: Path, args: EvalArguments) -> str:
    """Scores the answers that --from names; see `score_answers`.

    They may come from strangers: the task module that they name is run only if the user names it too.

    Raises:
        ValueError: the predictions are not whole or damaged, or name another task module than --task_module.
    """
    about = read_about(predictions)
    named, given = about["task_module"], args.task_module
    if given and not named:
        raise ValueError(f"--task_module {given}: the answers in {predictions} name no task module; leave the flag out")
    if named:
        if not given or Path(given).resolve() != Path(named).resolve():
            raise ValueError(
                f"--from {predictions}: its answers are of tasks in {named}, a program which is run only if you name "
                f"it: give --task_module {named} if you trust that file"
            )
        load_task_module(given)
    return score_answers(about, predictions, folder, args)


def score_answers(about: Mapping[str, Any], predictions: Path, folder: Path, args: EvalArguments) -> str:
    """Scores saved predictions, writes report.json, report.md, details.json and the paper's tables to `folder`, and
    returns the table for the terminal. No model is loaded.

    about: from `read_about`. Raises ValueError if the predictions are not whole or damaged.
    """
    make_folder(folder)
    mini = about["vocabulary"] == "mini"
    rules = Rules(
        tasks=tuple(about["tasks"]),
        bootstrap=Bootstrap(replicates=args.bootstrap, seed=args.seed),
        seed=args.seed,
        one_mask=about["run"].get("phrases") == EACH_ALONE,
        full_name=grammar.names_in if mini else None,
        colour_shape=grammar.colour_shapes_in if mini else None,
    )
    scored: dict[str, Scored] = {}
    samples: dict[str, int] = {}
    for condition in about["conditions"]:
        answers, features = load_predictions(predictions, about, condition)
        scored[condition] = score_predictions(answers, features, rules, condition)
        samples = {task: sum(p.task == task for p in answers) for task in rules.tasks}
    settings = {**about["run"].get("settings", {}), "bootstrap": args.bootstrap}
    if settings.get("seed") != args.seed:
        settings["scoring seed"] = args.seed
    for found in scored.values():
        if tokenizer := found.details.get("caption", {}).get("tokenizer"):
            settings["caption tokenizer"] = tokenizer
    report = build_report(
        {condition: found.figures for condition, found in scored.items()},
        {"samples": samples, **about["run"], "settings": settings},
        {condition: found.intervals for condition, found in scored.items()},
    )
    sheet = SHEET if (folder / SHEET).is_file() else ""
    details = {condition: found.details for condition, found in scored.items()}
    path = write_report(report, folder, title=f"Evaluation of {folder.name}", sheet=sheet, details=details)
    tables = write_tables({folder.name: report}, folder)
    lines = [format_table(report), *filter(None, [tokenizer_note(report)]), ""]
    lines += [f"Report: {path.with_suffix('.md')}", f"The paper's tables: {tables}"]
    return "\n".join(lines + ([f"Contact sheet: {folder / sheet}"] if sheet else []))
