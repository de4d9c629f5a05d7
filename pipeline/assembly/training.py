"""One run of train.py: its plan, its parts and its records."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.assembly import parts, speedups
from pipeline.assembly.running import with_absolute_paths
from pipeline.assembly.schedule import Schedule, plan_schedule
from pipeline.config import DataArguments, ModelArguments, TrainArguments, to_dict
from pipeline.data.tokens import TokenMap
from pipeline.inference.export import save_pretrained
from pipeline.model import quantisation
from pipeline.model.fingerprint import clip_fingerprint, fingerprint
from pipeline.model.initialise import initialise
from pipeline.model.losses import LossWeights
from pipeline.model.tuner import NeuralTuner
from pipeline.model.vision import VisionTower
from pipeline.runtime import engine as runtime
from pipeline.runtime import faults
from pipeline.runtime.checkpoint import check_reader
from pipeline.runtime.provenance import run_record
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracking import Tracker


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything about a run that is known before a model is loaded."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments
    schedule: Schedule
    base: dict[str, str]

    @property
    def ranks(self) -> Ranks:
        """The ranks of the run, and this one."""
        return self.schedule.ranks

    @property
    def weights(self) -> LossWeights:
        """The weights of the loss's terms."""
        return LossWeights(seg=self.train.lambda_seg, gen=self.train.lambda_gen, bce=self.train.lambda_bce)

    @property
    def reader(self) -> dict[str, Any]:
        """What the order of samples depends on; a resumed run must have the same."""
        order = self.schedule.order
        # Named only where they play a part, so that checkpoints from before they existed can still be resumed.
        more: dict[str, Any] = {"weights": list(order.weights)} if order.weights else {}
        more |= {"shuffle_window": order.window} if order.window else {}
        return {
            "digest": self.schedule.dataset.digest,
            "seed": order.seed,
            "global_batch": order.global_batch,
            "tasks": list(order.tasks),
            "task_mix": list(order.task_mix),
            **more,
        }

    def describe(self) -> str:
        """What is about to happen, in plain lines."""
        mini = (
            "This is the embedded mini world; for the real thing give --preset 7b (or 13b) with --base, "
            "--clip_weights and --data.\n"
        )
        return (
            f"{mini if self.model.preset == 'mini' else ''}"
            f"Tuning {Path(self.model.base).name} on {len(self.schedule.dataset):,} samples of {self.data.data}: "
            f"{self.schedule.steps:,} steps of {self.schedule.batch_words}"
        )

    def check_resume(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if a checkpoint was made on another base model, order of samples or schedule."""
        check_reader(state["reader"], self.reader)
        if state["base"]["fingerprint"] != self.base["fingerprint"]:
            raise ValueError(
                f"the checkpoint was made on another base model than --base {self.model.base}: give that one, or start "
                "anew with --resume never"
            )
        self.schedule.check_resume(state)

    @contextlib.contextmanager
    def explaining_memory(self) -> Iterator[None]:
        """Within this context an allocation that fails says which of this run's settings to change (Fault)."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not faults.is_out_of_memory(error):
                raise
            zero = self.schedule.deepspeed["zero_optimization"]
            raise faults.out_of_memory(
                error,
                micro_batch=self.schedule.batch.micro_batch,
                accumulation=self.schedule.batch.accumulation,
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
            deepspeed=self.schedule.deepspeed,
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
    schedule = plan_schedule(
        train,
        data,
        ranks,
        tasks=data.task_names,
        task_mix=data.task_shares,
        weights=data.data_weights,
        hidden_size=parts.read_config(model).get("hidden_size"),
    )
    quantisation.check(model.base_quant, schedule.deepspeed["zero_optimization"]["stage"])
    base = {"path": os.path.abspath(model.base), "fingerprint": fingerprint(model.base)}
    return RunPlan(model=model, data=data, train=train, schedule=schedule, base=base)


def prepare_tuner(plan: RunPlan, vision: VisionTower) -> NeuralTuner:
    """The tuned model with its initial values, in the precision of training; under ZeRO-3 the LM is in pieces."""
    model, data, train, device = plan.model, plan.data, plan.train, plan.ranks.device
    dtype = torch.bfloat16 if train.use_bf16(device.type) else torch.float32
    with runtime.loading_in_pieces(plan.schedule.deepspeed):
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


def finish(plan: RunPlan, tracker: Tracker, record: Mapping[str, Any]) -> str:
    """What a run that is done leaves, and the line that says how to score it.

    With --register_model the last checkpoint, exported as pipeline/export.py does, becomes a version of that model.
    """
    run, step = Path(plan.train.output_dir), plan.schedule.steps
    if plan.train.register_model and plan.ranks.is_main:
        exported = save_pretrained(run / f"checkpoint-{step}", run / "registered" / f"checkpoint-{step}")
        facts = {"base": record["base"], "step": step, "git": record["git"], "versions": record["versions"]}
        tracker.register_model(plan.train.register_model, exported, step=step, facts=facts)
    return (
        f"Tuned: {run}/checkpoint-{step}. Score it with: "
        f"python pipeline/evaluate_mmud.py --checkpoint {run} --condition all"
    )
