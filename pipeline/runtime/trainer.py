"""The training loop: global normalisation, metrics, checkpoints, stopping.

A step's losses are divided by the GLOBAL batch's counts of answer tokens, masks and pictures. DeepSpeed averages
gradients over ranks and micro-batches, so each micro-batch's sums are divided by count / (ranks * micro-batches): the
objective is the same on any number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.data.batch import TrainingBatch
from pipeline.model.losses import LossWeights, Norms
from pipeline.runtime import stopping
from pipeline.runtime.bad_steps import BadSteps
from pipeline.runtime.engine import Engine
from pipeline.runtime.saver import Saver
from pipeline.runtime.throughput import Meter
from pipeline.runtime.tracking import Tracker
from pipeline.runtime.watchdog import Watchdog

# The count that each sum of the model's forward is divided by; "dice/referring" goes with "masks/referring".
_COUNT_OF = {"ce": "tokens", "dice": "masks", "bce": "masks", "mse": "pictures", "value": "values"}


class Trainer:
    """Trains an engine on a loader, from `first_step` to `last_step` (optimizer steps, counted from 0)."""

    def __init__(
        self,
        engine: Engine,
        loader: Iterable[Sequence[TrainingBatch]],
        vision: Callable[[Any], Any],
        tracker: Tracker,
        *,
        output_dir: str | Path,
        last_step: int,
        first_step: int = 0,
        weights: LossWeights | None = None,
        seed: int = 0,
        logging_steps: int = 10,
        save_steps: int = 0,
        keep: int = 2,
        eval_steps: int = 0,
        on_validate: Callable[[int], Mapping[str, float] | None] | None = None,
        state: Mapping[str, Any] | None = None,
        max_bad_share: float = 1.0,
        max_bad_steps: int = 5,
        bad_steps: Mapping[str, int] | None = None,
        hang_timeout: float = 0.0,
        flops_per_token: float | None = None,
        progress: bool = True,
    ) -> None:
        """loader: this rank's micro-batches of each step from first_step on, as many on every rank.

        vision: pixel values [B,3,S,S] -> features. state: JSON-able facts for the checkpoints (config, reader,
        versions, base hash). on_validate: called on every rank with the number of trained steps; its figures are
        logged as valid/<name>. max_bad_share: share of unreadable samples, over the steps so far, that stops the run.
        max_bad_steps: steps in a row without finite loss or gradients that stop it; bad_steps: what the checkpoint
        to go on from says of them. hang_timeout: seconds that a step, a validation or a wait for a checkpoint may take
        before every rank prints its stack and ends (0: for ever).
        """
        self.engine, self.loader, self.vision, self.tracker = engine, loader, vision, tracker
        self.ranks = engine.ranks
        self.output_dir = Path(output_dir)
        self.first_step, self.last_step = first_step, last_step
        self.weights, self.seed = weights or LossWeights(), seed
        self.logging_steps, self.save_steps, self.hang_timeout = logging_steps, save_steps, hang_timeout
        self.eval_steps, self.on_validate = eval_steps, on_validate
        self.state, self.max_bad_share = dict(state or {}), max_bad_share
        self.progress = progress
        self._meter = Meter(self.ranks.device, self.ranks.world_size, flops_per_token=flops_per_token)
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._norms: list[float] = []
        self._saver = Saver(engine, output_dir, keep=keep)
        self._bad = BadSteps(self.ranks, output_dir, limit=max_bad_steps, state=bad_steps)
        self._saved = first_step if first_step else -1

    def train(self) -> str:
        """Runs to the end or until a signal; returns "DONE" or "REQUEUE", the marker file it left.

        Raises FloatingPointError naming the samples when too many steps in a row had no finite loss or gradients,
        ValueError when too many samples cannot be read, Fault when a checkpoint cannot be written; the checkpoints so
        far stay.
        """
        if self.ranks.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            stopping.mark(self.output_dir, None)
        bar = tqdm(
            total=self.last_step,
            initial=self.first_step,
            desc="tuning",
            unit="step",
            disable=not (self.progress and self.ranks.is_main),
            dynamic_ncols=True,
        )
        self.engine.module.train()
        step, ended = self.first_step, stopping.DONE
        with stopping.watching() as stop, Watchdog(self.hang_timeout, self.ranks) as watchdog, bar:
            try:
                for batches in self.loader if step < self.last_step else ():
                    stopped = self._train_step(step, batches, bool(stop))
                    step += 1
                    self._after_step(step, bar)
                    watchdog.beat(f"step {step}")
                    if stopped and step < self.last_step:
                        ended = stopping.REQUEUE
                        break
                    if step >= self.last_step:
                        break
                assert ended == stopping.REQUEUE or step >= self.last_step, f"the loader ended at step {step}"
                if self._saved != step:
                    self._save(step)
                self._saver.wait()
                self._log_saved()
            finally:
                # A run that fails here still leaves the checkpoint that is being written.
                self._saver.join()
        if self.ranks.is_main:
            stopping.mark(self.output_dir, ended, f"step {step} of {self.last_step}")
            if ended == stopping.REQUEUE:
                print(f"Stopped by a signal after step {step}; --resume auto, the default, goes on from there.")
        return ended

    def _train_step(self, step: int, batches: Sequence[TrainingBatch], stop: bool) -> bool:
        """One optimizer step; True if any rank was asked to stop."""
        # Whatever draws at random (dropout) does so by step and rank: a resumed run draws the same.
        torch.manual_seed((self.seed * 1_000_003 + step) * 4099 + self.ranks.rank)
        set_step = getattr(self.engine.module, "set_step", None)
        if set_step is not None:
            set_step(step)
        self._watch_units(self._is_logged(step + 1))
        counts = self._count(batches, stop)
        scale = 1.0 / (self.ranks.world_size * len(batches))
        norms = Norms(
            tokens=counts["tokens"] * scale,
            masks=counts["masks"] * scale,
            pictures=counts["pictures"] * scale,
            values={task: counts[f"values/{task}"] * scale for task in batches[0].counts().values},
        )
        losses: list[Tensor] = []
        parts: Counter[str] = Counter()
        for index, batch in enumerate(batches):
            batch = batch.to(self.ranks.device)
            with torch.no_grad():
                features = self.vision(batch.pixel_values)
            loss, sums = self.engine(batch, features, norms, self.weights)
            self.engine.backward(loss)
            losses.append(loss.detach())
            parts.update(sums)
            if index + 1 < len(batches):
                self.engine.step()
        # A validation's forwards are no part of the interval's figures.
        self._watch_units(False)
        own, sums = self._reduce(losses, parts, scale)
        if self.engine.step():
            self._bad.good()
            self._sums.update(sums)
            self._norms.append(self.engine.grad_norm)
        else:
            self._bad.bad(step, batches, own)
        self._meter.add(samples=counts["rows"], tokens=counts["all_tokens"], slots=counts["slots"])
        return counts["stop"] > 0

    def _watch_units(self, on: bool) -> None:
        watch_units = getattr(self.engine.module, "watch_units", None)
        if watch_units is not None:
            watch_units(on)

    def _count(self, batches: Sequence[TrainingBatch], stop: bool) -> dict[str, float]:
        """The global batch's counts, and whether a rank was asked to stop, in one reduction."""
        per_batch = [batch.counts() for batch in batches]
        local = {
            "tokens": sum(count.tokens for count in per_batch),
            "masks": sum(count.masks for count in per_batch),
            "pictures": sum(count.pictures for count in per_batch),
            "rows": sum(len(batch.keys) for batch in batches),
            "all_tokens": sum(int(batch.attention_mask.sum()) for batch in batches),
            "slots": sum(batch.slots for batch in batches),
            "skipped": sum(len(batch.skipped) for batch in batches),
            "stop": float(stop),
            "unsaved": float(self._saver.failed),
        }
        # Each batch names the same tasks, so every rank brings as many sums.
        local |= {f"values/{task}": sum(count.values[task] for count in per_batch) for task in per_batch[0].values}
        total = dict(zip(local, self.ranks.sum([float(value) for value in local.values()]), strict=True))
        self._counts.update({name: total[name] for name in ("rows", "skipped")})
        if total["unsaved"]:
            self._saver.wait()
        if total["skipped"]:
            self._report_skipped(batches)
        return total

    def _report_skipped(self, batches: Sequence[TrainingBatch]) -> None:
        named = [text for found in self.ranks.gather([t for b in batches for t in b.skipped]) for text in found]
        if self.ranks.is_main:
            for text in named:
                tqdm.write(f"left out: {text}")
        bad, seen = self._counts["skipped"], self._counts["skipped"] + self._counts["rows"]
        # One bad sample in the first batch is no share yet.
        if bad / seen > self.max_bad_share and bad > 3:
            raise ValueError(
                f"{bad:.0f} of {seen:.0f} samples could not be read, more than max_bad_share {self.max_bad_share:g}: "
                f"the last was {named[-1]}; check the shards (pipeline/shard_mmud.py --verify)"
            )

    def _reduce(self, losses: list[Tensor], parts: Counter[str], scale: float) -> tuple[list[float], dict[str, float]]:
        """This rank's loss of each micro-batch, and the global sums that a finite step adds to the interval's."""
        names = sorted(parts)
        # One copy to the host for all figures.
        values = torch.stack([*losses, *(torch.as_tensor(parts[name]).to(losses[0]) for name in names)]).tolist()
        own, sums = values[: len(losses)], values[len(losses) :]
        total, *global_sums = self.ranks.sum([sum(own) * scale, *sums])
        return own, {**dict(zip(names, global_sums, strict=True)), "loss": total, "steps": 1}

    def _is_logged(self, step: int) -> bool:
        return step % self.logging_steps == 0 or step == self.last_step

    def _after_step(self, step: int, bar: tqdm) -> None:
        """What is due once `step` steps are trained: metrics, validation, checkpoint."""
        self._log_saved()
        if self._is_logged(step):
            metrics = self._metrics()
            shown = {name.removeprefix("loss/"): f"{v:.3f}" for name, v in metrics.items() if _shown(name)}
            bar.set_postfix(shown, refresh=False)
            self.tracker.log_metrics(step, metrics)
        bar.update()
        if self.on_validate and self.eval_steps and step % self.eval_steps == 0:
            figures = self.on_validate(step)
            self.engine.module.train()
            if figures:
                self.tracker.log_metrics(step, {f"valid/{name}": value for name, value in figures.items()})
            self._meter.restart()
        if self.save_steps and step % self.save_steps == 0:
            self._save(step)
            self._meter.restart()

    def _metrics(self) -> dict[str, float]:
        """Means over the steps since the last line: each sum over its count, as the loss weighs them."""
        # None where every step of the interval was skipped.
        metrics = {"loss": self._sums["loss"] / self._sums["steps"]} if self._sums["steps"] else {}
        for name, total in self._sums.items():
            kind, _, task = name.partition("/")
            if kind in _COUNT_OF:
                count = self._sums.get(_COUNT_OF[kind] + (f"/{task}" if task else ""), 0)
                if count:
                    metrics[f"loss/{name}"] = total / count
        rates = self.engine.learning_rates
        metrics |= {f"lr/{name}": rate for name, rate in rates.items()} if len(set(rates.values())) > 1 else {}
        metrics["lr"] = max(rates.values())
        # Of the steps that moved the weights.
        if self._norms:
            metrics["grad_norm"], metrics["grad_norm_max"] = self._norms[-1], max(self._norms)
        self._norms.clear()
        unit_rates = getattr(self.engine.module, "unit_rates", None)
        metrics |= unit_rates() if unit_rates is not None else {}
        metrics["samples_left_out"] = self._counts["skipped"]
        metrics["steps_skipped"] = self._bad.total
        metrics |= self._meter.read()
        self._sums.clear()
        return metrics

    def _save(self, step: int) -> None:
        facts = {
            **self.state,
            "mlflow_run_id": self.ranks.from_main(self.tracker.run_id),
            "bad_steps": self._bad.state(),
            "rng": {"seed": self.seed, "keyed_by": ["seed", "step", "rank"]},
            "total_steps": self.last_step,
        }
        self._saver.save(step, facts)
        self._saved = step

    def _log_saved(self) -> None:
        for step, figures in self._saver.figures():
            self.tracker.log_metrics(step, figures)


def _shown(name: str) -> bool:
    """What the progress bar shows: the loss, and the answer's loss of each task."""
    return name == "loss" or name.startswith("loss/ce/")
