"""One run of train.py: the plan of a run (steps, batches, DeepSpeed's configuration), its parts and its records."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.assembly import parts, speedups
from pipeline.config import REPO, DataArguments, ModelArguments, RunArguments, TrainArguments, to_dict
from pipeline.data.batch import Batch
from pipeline.data.collate import Collator
from pipeline.data.loader import build_loader
from pipeline.data.mixture import MixedDataset, absolute_folders, make_order, weights_of
from pipeline.data.order import SampleOrder
from pipeline.data.tokens import TokenMap
from pipeline.data.writer import pack
from pipeline.inference.export import save_pretrained
from pipeline.mini.source import MiniSource
from pipeline.model import quantisation
from pipeline.model.fingerprint import clip_fingerprint, fingerprint
from pipeline.model.initialise import initialise
from pipeline.model.losses import LossWeights
from pipeline.model.tuner import NeuralTuner
from pipeline.model.vision import VisionTower
from pipeline.runtime import engine as runtime
from pipeline.runtime import faults
from pipeline.runtime.checkpoint import check_reader
from pipeline.runtime.ds_config import BatchPlan, OptimizerSettings, count_steps, plan_batch, read_json, resolve
from pipeline.runtime.provenance import flatten, git_diff, run_record, write_json
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracking import Tracker

MINI_SHARDS = REPO / "shards" / "mini"
_PATHS = ("base", "clip_weights", "vqgan", "prior", "output_dir", "task_module")
_LOCAL_CLIP = "local-dir:"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything about a run that is known before a model is loaded."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments
    ranks: Ranks
    dataset: MixedDataset
    valid: MixedDataset | None
    order: SampleOrder
    batch: BatchPlan
    optimizer: OptimizerSettings
    deepspeed: dict[str, Any]
    base: dict[str, str]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.optimizer.total_steps

    @property
    def weights(self) -> LossWeights:
        """The weights of the loss's terms."""
        return LossWeights(seg=self.train.lambda_seg, gen=self.train.lambda_gen, bce=self.train.lambda_bce)

    @property
    def reader(self) -> dict[str, Any]:
        """What the order of samples depends on; a resumed run must have the same."""
        order = self.order
        # Named only where they play a part, so that checkpoints from before they existed can still be resumed.
        more: dict[str, Any] = {"weights": list(order.weights)} if order.weights else {}
        more |= {"shuffle_window": order.window} if order.window else {}
        return {
            "digest": self.dataset.digest,
            "seed": order.seed,
            "global_batch": order.global_batch,
            "tasks": list(order.tasks),
            "task_mix": list(order.task_mix),
            **more,
        }

    def describe(self, resume: Path | None) -> str:
        """What is about to happen, in plain lines."""
        b = self.batch
        lines = [
            f"Tuning {Path(self.model.base).name} on {len(self.dataset):,} samples of {self.data.data}: {self.steps:,} "
            f"steps of {b.global_batch} samples ({b.micro_batch} per pass x {b.accumulation} "
            f"pass{'es' if b.accumulation > 1 else ''} x {b.world_size} rank{'s' if b.world_size > 1 else ''}), "
            f"ZeRO-{self.deepspeed['zero_optimization']['stage']} on {self.ranks.device.type}, "
            f"{'bf16' if self.deepspeed['bf16']['enabled'] else 'fp32'}. Output: {self.train.output_dir}"
        ]
        if self.model.preset == "mini":
            lines.insert(
                0,
                "This is the embedded mini world; for the real thing give --preset 7b (or 13b) with --base, "
                "--clip_weights and --data.",
            )
        if resume is not None:
            lines.append(f"Going on from {resume}; give --resume never to start anew.")
        return "\n".join(lines)

    def closing(self) -> str:
        """What there is now, and the command that scores it."""
        return (
            f"Tuned: {self.train.output_dir}/checkpoint-{self.steps}. Score it with: "
            f"python pipeline/evaluate_mmud.py --checkpoint {self.train.output_dir} --condition all"
        )

    def batches(self, collator: Collator, first: int) -> Iterator[list[Batch]]:
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
            num_workers=self.data.num_workers,
            max_bad_share=1.0,
            pin_memory=self.ranks.device.type == "cuda",
        )
        return (batches for _, batches in loader)

    def check_resume(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if a checkpoint was made on another base model, order of samples or schedule."""
        check_reader(state["reader"], self.reader)
        if state["base"]["fingerprint"] != self.base["fingerprint"]:
            raise ValueError(
                f"the checkpoint was made on another base model than --base {self.model.base}: give that one, or start "
                "anew with --resume never"
            )
        if state["total_steps"] != self.steps:
            raise ValueError(
                f"the checkpoint is of a run of {state['total_steps']} steps, this one has {self.steps}: the learning "
                "rate's schedule would jump. Give the same --max_steps or --epochs, or start anew with --resume never"
            )

    @contextlib.contextmanager
    def explaining_memory(self) -> Iterator[None]:
        """Within this context an allocation that fails says which of this run's settings to change (Fault)."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not faults.is_out_of_memory(error):
                raise
            zero = self.deepspeed["zero_optimization"]
            raise faults.out_of_memory(
                error,
                micro_batch=self.batch.micro_batch,
                accumulation=self.batch.accumulation,
                checkpointing=self.train.gradient_checkpointing,
                stage=zero["stage"],
                offload="offload_optimizer" in zero or "offload_param" in zero,
                max_length=self.data.max_length,
            ) from error

    def record(self, tuner: NeuralTuner, token_map: TokenMap) -> dict[str, Any]:
        """The content of run.json, which every checkpoint holds too."""
        sizes = {name: quantisation.elements(p) for name, p in tuner.named_parameters()}
        trained = sum(sizes[name] for name in tuner.trained_parameters())
        return run_record(
            with_absolute_paths(to_dict(self.model, self.data, self.train)),
            deepspeed=self.deepspeed,
            world_size=self.ranks.world_size,
            reader=self.reader,
            base=self.base,
            clip={"fingerprint": clip_fingerprint(self.model.clip, self.model.clip_weights)},
            task_tokens={"first_id": token_map.base_vocab, "count": token_map.new_tokens},
            parameters={"all": sum(sizes.values()), "trained": trained},
        )


def plan_run(model: ModelArguments, data: DataArguments, train: TrainArguments, ranks: Ranks) -> RunPlan:
    """Checks what can be checked without loading a model, and packs the mini world if it is wanted and missing.

    Raises:
        ValueError: data, batch arithmetic, DeepSpeed file or base model do not fit; the message says what to do.
    """
    if Path(data.data) == MINI_SHARDS:
        pack_mini(ranks)
    dataset = parts.open_split(data.data, "train")
    valid = open_validation(data.data, train) if train.eval_steps else None
    batch = plan_batch(train.global_batch, ranks.world_size, micro_batch=train.micro_batch, limit=train.max_micro_batch)
    steps = count_steps(len(dataset), train.global_batch, epochs=train.epochs, max_steps=train.max_steps)
    optimizer = OptimizerSettings(
        lr=train.lr,
        beta1=train.adam_beta1,
        beta2=train.adam_beta2,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        total_steps=steps,
        warmup_steps=round(train.warmup_ratio * steps),
    )
    config = parts.read_config(model)
    deepspeed = read_json(train.deepspeed_file())
    quantisation.check(model.base_quant, deepspeed.get("zero_optimization", {}).get("stage", 0))
    base = {"path": os.path.abspath(model.base), "fingerprint": fingerprint(model.base)}
    return RunPlan(
        model=model,
        data=data,
        train=train,
        ranks=ranks,
        dataset=dataset,
        valid=valid,
        order=make_order(
            dataset,
            seed=train.seed,
            global_batch=train.global_batch,
            tasks=data.task_names,
            task_mix=data.task_shares,
            weights=weights_of(data.data_weights, len(dataset.parts)),
            window=data.shuffle_window,
        ),
        batch=batch,
        optimizer=optimizer,
        deepspeed=resolve(
            deepspeed,
            plan=batch,
            optimizer=optimizer,
            bf16=train.use_bf16(ranks.device.type),
            hidden_size=config.get("hidden_size"),
            on_cpu=ranks.device.type == "cpu",
        ),
        base=base,
    )


def open_validation(data: str, train: RunArguments) -> MixedDataset:
    """The split that --eval_steps goes through. Raises ValueError if it is missing or less than one global batch."""
    try:
        valid = parts.open_split(data, "valid")
        if len(valid) < train.global_batch:
            raise ValueError(f"{data} has {len(valid)} samples, fewer than --global_batch {train.global_batch}")
    except ValueError as error:
        raise ValueError(
            f"--eval_steps {train.eval_steps} needs a split 'valid' of a global batch or more: {error}. Pack one with "
            "pipeline/shard_mmud.py, or leave out --eval_steps"
        ) from error
    return valid


def with_absolute_paths(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`to_dict`'s answer with every path absolute, so that a checkpoint can be scored from any folder."""

    def absolute(name: str, value: Any) -> Any:
        if name == "clip" and value.startswith(_LOCAL_CLIP):
            return _LOCAL_CLIP + os.path.abspath(value.removeprefix(_LOCAL_CLIP))
        if name == "data":
            return absolute_folders(value)
        return os.path.abspath(value) if name in _PATHS and value else value

    return {kind: {name: absolute(name, v) for name, v in values.items()} for kind, values in config.items()}


def pack_mini(ranks: Ranks) -> None:
    """Makes the mini world's shards where they are missing: each node's first rank packs, the others wait at the lock.

    Packing what is packed already does nothing, and two packers of one folder take turns.
    """
    source = MiniSource()
    if ranks.is_main and not (MINI_SHARDS / "manifest.json").exists():
        print(f"Packing the embedded mini world into {MINI_SHARDS} first (half a minute).")
    for split in source.splits():
        pack(source, split, MINI_SHARDS, workers=2, progress=ranks.is_main, wait=True)


def prepare_tuner(plan: RunPlan, vision: VisionTower) -> NeuralTuner:
    """The tuned model with its initial values, in the precision of training; under ZeRO-3 the LM is in pieces."""
    model, data, train, device = plan.model, plan.data, plan.train, plan.ranks.device
    dtype = torch.bfloat16 if train.use_bf16(device.type) else torch.float32
    with runtime.loading_in_pieces(plan.deepspeed):
        llm = parts.load_llm(model, dtype, attn=speedups.attention(train.attn, data.packing), device=device)
    speedups.patch(llm, train)
    with runtime.whole(list(llm.get_input_embeddings().parameters())):
        tuner = parts.make_tuner(
            model,
            llm,
            vision,
            seed=train.seed,
            tasks=data.task_names,
            gradient_checkpointing=train.gradient_checkpointing,
        )
    initialise(tuner, train.seed, runtime.whole)
    speedups.compiled(llm, train)
    return tuner


def flops_per_token(tuner: NeuralTuner) -> float:
    """Floating-point operations of a training step per token: forward and the gradients of activations, 2 N each.

    Frozen weights have no gradients; what is trained is so small that it is left out, as is attention's quadratic part.
    """
    inner = [p for name, p in tuner.llm.named_parameters() if "embed" not in name and "lm_head" not in name]
    return 4.0 * sum(quantisation.elements(p) for p in inner)


def log_record(tracker: Tracker, record: Mapping[str, Any], output_dir: str, ranks: Ranks, first: int = 0) -> None:
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


def register(tracker: Tracker, name: str, record: Mapping[str, Any], output_dir: str, step: int, ranks: Ranks) -> None:
    """The last checkpoint, exported as pipeline/export.py does, as a version of MLflow's model `name`."""
    if not (name and ranks.is_main):
        return
    run = Path(output_dir)
    exported = save_pretrained(run / f"checkpoint-{step}", run / "registered" / f"checkpoint-{step}")
    facts = {"base": record["base"], "step": step, "git": record["git"], "versions": record["versions"]}
    tracker.register_model(name, exported, step=step, facts=facts)


def log_seconds(output_dir: str, ranks: Ranks, **seconds: float) -> None:
    """Adds the seconds of this start's stages to run.json: those of an earlier, stopped start stay counted."""
    path = Path(output_dir) / "run.json"
    if ranks.is_main:
        record = json.loads(path.read_text())
        before = record.get("seconds", {})
        record["seconds"] = {stage: round(before.get(stage, 0.0) + s, 1) for stage, s in seconds.items()}
        write_json(path, record)
