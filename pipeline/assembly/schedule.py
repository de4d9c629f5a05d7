"""What is read at which step, in which batches and by which optimizer: train.py's and pretrain_prior.py's alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.assembly import parts
from pipeline.config import REPO, DataArguments, PriorArguments, RunArguments
from pipeline.data.loader import MakeBatch, build_loader
from pipeline.data.mixture import MixedDataset, make_order, weights_of
from pipeline.data.order import SampleOrder
from pipeline.data.writer import pack
from pipeline.mini.source import MiniSource
from pipeline.runtime.ds_config import BatchPlan, OptimizerSettings, count_steps, plan_batch, read_json, resolve
from pipeline.runtime.ranks import Ranks

MINI_SHARDS = REPO / "shards" / "mini"


@dataclass(frozen=True, slots=True)
class Schedule:
    """The part of a run that does not depend on what is trained."""

    run: RunArguments
    reading: DataArguments | PriorArguments
    ranks: Ranks
    dataset: MixedDataset
    valid: MixedDataset | None
    order: SampleOrder
    batch: BatchPlan
    optimizer: OptimizerSettings
    deepspeed: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.optimizer.total_steps

    @property
    def batch_words(self) -> str:
        """The global batch and what it is made of."""
        b = self.batch
        return (
            f"{b.global_batch} ({b.micro_batch} per pass x {b.accumulation} pass{'es' if b.accumulation > 1 else ''} x "
            f"{b.world_size} rank{'s' if b.world_size > 1 else ''}), "
            f"ZeRO-{self.deepspeed['zero_optimization']['stage']} on {self.ranks.device.type}, "
            f"{'bf16' if self.deepspeed['bf16']['enabled'] else 'fp32'}. Output: {self.run.output_dir}"
        )

    def batches(self, collator: MakeBatch[Any], first: int) -> Iterator[list[Any]]:
        """This rank's micro-batches of each step from `first` on."""
        loader = build_loader(
            self.dataset,
            self.order,
            collator,
            rank=self.ranks.rank,
            world=self.ranks.world_size,
            micro_batch=self.batch.micro_batch,
            first_step=first,
            last_step=self.steps,
            num_workers=self.reading.num_workers,
            max_bad_share=1.0,
            pin_memory=self.ranks.device.type == "cuda",
        )
        return (batches for _, batches in loader)

    def check_resume(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if a checkpoint is of a run of another length."""
        if state["total_steps"] != self.steps:
            raise ValueError(
                f"the checkpoint is of a run of {state['total_steps']} steps, this one has {self.steps}: the learning "
                "rate's schedule would jump. Give the same --max_steps or --epochs, or start anew with --resume never"
            )


def plan_schedule(
    run: RunArguments,
    reading: DataArguments | PriorArguments,
    ranks: Ranks,
    *,
    tasks: tuple[str, ...],
    task_mix: tuple[float, ...],
    weights: str = "",
    hidden_size: int | None,
) -> Schedule:
    """Opens the data, packing the mini world if it is wanted and missing, and does the arithmetic.

    weights: of the data sets of reading.data, as --data_weights gives them; hidden_size: of what is trained, for
    ZeRO-3's buckets.

    Raises:
        ValueError: data, batch arithmetic or DeepSpeed file do not fit; the message says what to do.
    """
    if Path(reading.data) == MINI_SHARDS:
        pack_mini(ranks)
    dataset = parts.open_split(reading.data, "train")
    valid = open_validation(reading.data, run) if run.eval_steps else None
    batch = plan_batch(run.global_batch, ranks.world_size, micro_batch=run.micro_batch, limit=run.max_micro_batch)
    steps = count_steps(len(dataset), run.global_batch, epochs=run.epochs, max_steps=run.max_steps)
    optimizer = OptimizerSettings(
        lr=run.lr,
        beta1=run.adam_beta1,
        beta2=run.adam_beta2,
        eps=run.adam_eps,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        total_steps=steps,
        warmup_steps=round(run.warmup_ratio * steps),
    )
    return Schedule(
        run=run,
        reading=reading,
        ranks=ranks,
        dataset=dataset,
        valid=valid,
        order=make_order(
            dataset,
            seed=run.seed,
            global_batch=run.global_batch,
            tasks=tasks,
            task_mix=task_mix,
            weights=weights_of(weights, len(dataset.parts)),
            window=reading.shuffle_window,
        ),
        batch=batch,
        optimizer=optimizer,
        deepspeed=resolve(
            read_json(run.deepspeed_file()),
            plan=batch,
            optimizer=optimizer,
            bf16=run.use_bf16(ranks.device.type),
            hidden_size=hidden_size,
            on_cpu=ranks.device.type == "cpu",
        ),
    )


def open_validation(data: str, run: RunArguments) -> MixedDataset:
    """The split that --eval_steps goes through. Raises ValueError if it is missing or less than one global batch."""
    try:
        valid = parts.open_split(data, "valid")
        if len(valid) < run.global_batch:
            raise ValueError(f"{data} has {len(valid)} samples, fewer than --global_batch {run.global_batch}")
    except ValueError as error:
        raise ValueError(
            f"--eval_steps {run.eval_steps} needs a split 'valid' of a global batch or more: {error}. Pack one with "
            "pipeline/shard_mmud.py, or leave out --eval_steps"
        ) from error
    return valid


def pack_mini(ranks: Ranks) -> None:
    """Makes the mini world's shards where they are missing: each node's first rank packs, the others wait at the lock.

    Packing what is packed already does nothing, and two packers of one folder take turns.
    """
    source = MiniSource()
    if ranks.is_main and not (MINI_SHARDS / "manifest.json").exists():
        print(f"Packing the embedded mini world into {MINI_SHARDS} first (half a minute).")
    for split in source.splits():
        pack(source, split, MINI_SHARDS, workers=2, progress=ranks.is_main, wait=True)
