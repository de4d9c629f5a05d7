"""One run of plan.py, and the memory estimate of a run that is about to start: settings to counts, traces and plans."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from pipeline.assembly import parts
from pipeline.config import REPO, DataArguments, ModelArguments, PlanArguments, TrainArguments
from pipeline.data.tasks import TASKS
from pipeline.model import quantisation
from pipeline.model.tuner import NeuralTuner
from pipeline.model.vision import VisionTower
from pipeline.planning import communication, counting, plot
from pipeline.planning.counting import Parameters, Traced
from pipeline.planning.gpus import ASSUMED, named
from pipeline.planning.memory import Memory, Zero, usable
from pipeline.planning.memory import estimate as rank_memory
from pipeline.planning.search import Choice, Plan, Planner
from pipeline.planning.trace import ATTENTION
from pipeline.planning.workload import Workload
from pipeline.runtime.ds_config import OptimizerSettings, plan_batch, read_json, resolve
from pipeline.runtime.provenance import write_json

LLAMA2: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""Sizes of LLaMA-2 (its config.json), for presets without --base; what is not here is LlamaConfig's default."""
CURVE = tuple(2**power for power in range(11))


def llm_config(model: ModelArguments) -> PreTrainedConfig:
    """The LM's configuration: of --base, else LLaMA-2's of the preset."""
    if model.base:
        parts.read_config(model)
        return AutoConfig.from_pretrained(model.base)
    return LlamaConfig(**LLAMA2[model.preset], max_position_embeddings=4096)


def skeleton(
    model: ModelArguments, *, gradient_checkpointing: str = "none", bf16: bool = True
) -> tuple[NeuralTuner, VisionTower]:
    """The tuned model and CLIP by the constructors of training, on the meta device: shapes without content."""
    taps = model.tap_layers(10**6) if model.clip_taps else None
    tower = VisionTower.skeleton(model.clip, taps=taps)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config(model), attn_implementation=ATTENTION)
        tuner = parts.make_tuner(model, llm, tower, seed=0, gradient_checkpointing=gradient_checkpointing)
    return tuner.to(torch.bfloat16 if bf16 else torch.float32).train(), tower


class Planning:
    """Everything that plan.py answers, for one model, data and kind of GPU."""

    def __init__(
        self,
        model: ModelArguments,
        data: DataArguments,
        train: TrainArguments,
        plan: PlanArguments,
        *,
        device_type: str = "cuda",
    ) -> None:
        """Raises ValueError where a flag, a file or the batch arithmetic does not fit."""
        self.model, self.data, self.train, self.args = model, data, train, plan
        self.gpu = named(plan.gpu)
        if plan.gpus_per_node:
            self.gpu = dataclasses.replace(self.gpu, per_node=plan.gpus_per_node)
        self.bf16 = train.use_bf16(device_type)
        self._traces: dict[tuple[int, str], tuple[Traced, float]] = {}
        self._models: dict[str, NeuralTuner] = {}
        self._asked = self._tuner(train.gradient_checkpointing)

    def _tuner(self, checkpointing: str) -> NeuralTuner:
        if checkpointing not in self._models:
            tuner, self.tower = skeleton(self.model, gradient_checkpointing=checkpointing, bf16=self.bf16)
            self._models[checkpointing] = tuner
        return self._models[checkpointing]

    @cached_property
    def count(self) -> Parameters:
        """Numbers of parameters."""
        return counting.count_parameters(self._asked, self.tower)

    @cached_property
    def workload(self) -> Workload:
        """The run's samples and lengths."""
        total = sum(self.data.task_shares)
        shares = dict(zip(self.data.task_names, self.data.task_shares, strict=True))
        return Workload(
            samples=self.args.samples,
            epochs=self.train.epochs,
            global_batch=self.train.global_batch,
            image_tokens=self._asked.projector.n_tokens(self.tower.grid),
            text_tokens=self.args.text_tokens,
            pictured=sum(share for name, share in shares.items() if TASKS[name].needs_image) / total,
            pictures=shares.get("generation", 0.0) / total,
            max_tokens=self.data.max_length,
            packed=self.data.packing,
        )

    @cached_property
    def tmac_per_pair(self) -> float:
        """10^12 multiply-accumulates of one forward of the LM alone over a picture's tokens and the mean text."""
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(llm_config(self.model), attn_implementation=ATTENTION)
        return counting.forward_tmac(llm, self.workload.image_tokens + round(self.args.text_tokens))

    def trace(self, samples: int, checkpointing: str) -> tuple[Traced, float]:
        """The traced pass of so many samples, and the mean share of its work."""
        key = (samples, checkpointing)
        if key not in self._traces:
            size, share = self.workload.passed(samples)
            self._traces[key] = counting.trace_pass(self._tuner(checkpointing), size), share
        return self._traces[key]

    def memory(self, zero: Zero, micro_batch: int) -> Memory:
        """One rank's memory under a filled DeepSpeed configuration, with the flags' checkpointing and base."""
        quantisation.check(self.model.base_quant, zero.stage)
        passed, _ = self.trace(micro_batch, self.train.gradient_checkpointing)
        vision = counting.trace_vision(self.tower, micro_batch)
        return rank_memory(self.count, zero, passed, vision, quant=self.model.base_quant)

    @cached_property
    def planner(self) -> Planner:
        """Plans of this model on this GPU."""
        vision = lru_cache(lambda samples: counting.trace_vision(self.tower, samples))
        return Planner(count=self.count, workload=self.workload, gpu=self.gpu, trace=self.trace, trace_vision=vision)

    def zero(self, file: str | Path, micro_batch: int | None, ranks: int, global_batch: int) -> tuple[Zero, int]:
        """A DeepSpeed file filled as training fills it, and the micro-batch. Raises ValueError as training does."""
        batch = plan_batch(global_batch, ranks, micro_batch=micro_batch, limit=self.train.max_micro_batch)
        config = resolve(
            read_json(file),
            plan=batch,
            optimizer=OptimizerSettings(lr=self.train.lr, max_grad_norm=self.train.max_grad_norm),
            bf16=self.bf16,
            hidden_size=self._asked.llm.config.hidden_size,
        )
        return Zero.of(config, ranks), batch.micro_batch

    def given(self) -> Plan:
        """The plan of the flags as they are."""
        file = self.train.deepspeed_file()
        zero, micro = self.zero(file, self.train.micro_batch, self.args.gpus, self.train.global_batch)
        quantisation.check(self.model.base_quant, zero.stage)
        choice = Choice(
            file=file.stem,
            micro_batch=micro,
            checkpointing=self.train.gradient_checkpointing,
            quant=self.model.base_quant,
        )
        return self.planner.plan(choice, zero)

    def fitted(self) -> Plan:
        """The fastest plan that fits on these GPUs. Raises ValueError if none does."""
        ranks, batch = self.args.gpus, self.train.global_batch
        plan_batch(batch, ranks)

        def zero_of(file: str, micro: int) -> Zero:
            return self.zero(REPO / f"ds_configs/{file}.json", micro, ranks, batch)[0]

        quants = ("none", "nf4", "int8") if self.model.base_quant == "none" else (self.model.base_quant,)
        return self.planner.fastest(ranks, zero_of, quants)

    def curves(self, plan: Plan) -> dict[str, list[tuple[int, Plan]]]:
        """Plans over 1 to 1,024 GPUs with the plan's micro-batch on each and no accumulation."""
        micro, found = plan.choice.micro_batch, {}
        for file, quant in (("z2", "none"), ("z3", "none"), ("z2", "nf4")):
            points = []
            for ranks in CURVE:
                zero, _ = self.zero(REPO / f"ds_configs/{file}.json", micro, ranks, micro * ranks)
                choice = dataclasses.replace(plan.choice, file=file, quant=quant)
                planner = dataclasses.replace(
                    self.planner, workload=dataclasses.replace(self.workload, global_batch=micro * ranks)
                )
                points.append((ranks, planner.plan(choice, zero)))
            name = f"ZeRO-{file[1]}" + (f", base in {quant}" if quant != "none" else "")
            found[name] = points
        return found

    def draw(self, plan: Plan, path: str) -> None:
        """Writes the curves as a PNG."""
        title = (
            f"{self.model.preset} on {self.gpu.name}, {self.gpu.per_node} per node, {plan.choice.micro_batch} samples "
            f"per GPU and step, checkpointing {plan.choice.checkpointing}, {self.train.epochs:g} epochs"
        )
        plot.draw(self.curves(plan), title, Path(path))

    def report(self, plan: Plan) -> dict[str, Any]:
        """The JSON answer."""
        count = self.count
        traffic = communication.traffic(count, plan.zero)
        return {
            "gpu": self.gpu.name,
            "gpus": plan.zero.ranks,
            "flags": self.flags(plan),
            "tmac_per_pair": round(self.tmac_per_pair, 4),
            "trainable_share": count.trained_share,
            "sparse_share": count.trained.get("sparse", 0) / count.base,
            "parameters": count.base + count.all_trained,
            "parameters_by_part": {"base": count.base, **count.trained, "clip": count.clip},
            "memory_gib": plan.memory.gib(),
            "usable_gib": usable(self.gpu.memory) / 2**30,
            "fits": plan.fits,
            "bytes_per_step": {"ranks": traffic.hidden + traffic.serial, "host": traffic.host},
            "step_seconds": plan.time.total,
            "step_seconds_by_part": plan.time.parts,
            "bottleneck": plan.time.bottleneck,
            "mfu": plan.mfu,
            "steps": self.workload.steps,
            "hours": plan.hours,
            "predicted_not_measured": True,
            "assumed": dataclasses.asdict(ASSUMED),
        }

    def flags(self, plan: Plan) -> dict[str, Any]:
        """train.py's flags of a plan."""
        flags: dict[str, Any] = {
            "preset": self.model.preset,
            "tuner": self.model.tuner,
            "mechanism": self.model.mechanism,
            "deepspeed": f"ds_configs/{plan.choice.file}.json",
            "global_batch": self.train.global_batch,
            "micro_batch": plan.choice.micro_batch,
            "gradient_checkpointing": plan.choice.checkpointing,
            "base_quant": plan.choice.quant,
            "packing": self.data.packing,
        }
        return flags

    def write(self, plan: Plan, folder: str) -> str:
        """train.yaml and ds_config.json of a plan into a folder; returns the command that uses them."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        file = write_json(out / "ds_config.json", read_json(REPO / f"ds_configs/{plan.choice.file}.json"))
        flags = {**self.flags(plan), "deepspeed": str(file)}
        (out / "train.yaml").write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")
        return self.command(plan, {"config": str(out / "train.yaml")})

    def command(self, plan: Plan, flags: Mapping[str, Any]) -> str:
        """The command line of a plan on one machine; --base, --clip_weights and --data are the user's."""
        words = ["deepspeed", "--num_gpus", str(min(plan.zero.ranks, self.gpu.per_node)), "pipeline/train.py"]
        for name, value in flags.items():
            words += [f"--{name}", str(value)]
        return shlex.join(words)


def estimate(
    model: ModelArguments,
    data: DataArguments,
    train: TrainArguments,
    zero: Zero,
    *,
    micro_batch: int,
    device_type: str = "cuda",
) -> tuple[Parameters, Memory]:
    """(numbers of parameters, one rank's memory) of the run of these flags; for checks before a start.

    Reads no weights. Raises ValueError as training would.
    """
    planning = Planning(model, data, train, PlanArguments(), device_type=device_type)
    return planning.count, planning.memory(zero, micro_batch)
