"""DeepSpeed's JSON and the command line made one: "auto" filled from the flags, contradictions refused.

Here, too, is the only batch arithmetic: global batch = micro-batch x accumulation x ranks. Pure Python, so that every
file of ds_configs/ is checked without starting DeepSpeed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CUDA_ONLY = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How a global batch is cut: global_batch == micro_batch * accumulation * world_size (all in samples)."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def plan_batch(global_batch: int, world_size: int, *, micro_batch: int | None = None, limit: int = 16) -> BatchPlan:
    """The accumulation that makes `global_batch` on `world_size` ranks.

    micro_batch: samples per rank and forward pass; None takes the largest that divides a rank's share and is <= limit.
    Raises ValueError naming the nearest numbers that work.
    """
    if global_batch < 1 or world_size < 1 or limit < 1 or (micro_batch is not None and micro_batch < 1):
        raise ValueError("global_batch, micro_batch and the number of ranks must be at least 1")
    unit = world_size * (micro_batch or 1)
    if global_batch % unit:
        lower, upper = global_batch // unit * unit, (global_batch // unit + 1) * unit
        near = " or ".join(str(number) for number in (lower, upper) if number)
        what = f"{world_size} rank(s)" + (f" x micro_batch {micro_batch}" if micro_batch else "")
        message = f"global_batch {global_batch} cannot be cut over {what}: take --global_batch {near}"
        if micro_batch and global_batch % world_size == 0:
            per_rank = global_batch // world_size
            fits = [number for number in range(1, per_rank + 1) if per_rank % number == 0]
            below = [number for number in fits if number < micro_batch][-1:]
            above = [number for number in fits if number > micro_batch][:1]
            message += f", or --micro_batch {' or '.join(map(str, below + above))}"
        elif not micro_batch:
            counts = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
            below = [n for n in counts if n < world_size][-1:]
            above = [n for n in counts if n > world_size][:1]
            message += f", or {' or '.join(map(str, below + above))} rank(s)"
        raise ValueError(message)
    per_rank = global_batch // world_size
    micro = micro_batch or max(n for n in range(1, min(per_rank, limit) + 1) if per_rank % n == 0)
    return BatchPlan(
        global_batch=global_batch, micro_batch=micro, accumulation=per_rank // micro, world_size=world_size
    )


def count_steps(n_samples: int, global_batch: int, *, epochs: float, max_steps: int = -1) -> int:
    """Optimizer steps of a run: `max_steps` if positive, else enough to see every sample `epochs` times."""
    if max_steps > 0:
        return max_steps
    # Rounded first: 0.1 * 30 is a little more than 3, and a step more than asked for would be a surprise.
    return max(1, math.ceil(round(epochs * n_samples / global_batch, 6)))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay to zero; learning rate per optimizer step."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    total_steps: int = 1
    warmup_steps: int = 0

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at `step` (optimizer steps done): as transformers' cosine schedule.

        That one is not imported, since it brings the whole of transformers' trainer with it.
        """
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def read_json(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed configuration file. Raises ValueError naming the file and what is wrong with it."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--deepspeed {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed {path} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--deepspeed {path} must hold a JSON object")
    return found


def resolve(
    raw: Mapping[str, Any],
    *,
    plan: BatchPlan,
    optimizer: OptimizerSettings,
    bf16: bool,
    hidden_size: int | None = None,
    on_cpu: bool = False,
) -> dict[str, Any]:
    """`raw` with every "auto" filled; what is run, recorded and sent to MLflow.

    hidden_size: of the LLM, for ZeRO-3's bucket sizes (as Hugging Face derives them); None leaves DeepSpeed's defaults.
    on_cpu: ranks compute on the CPU; dropped are then the offload sections, as everything is in CPU memory already, and
    quantised gathering, which DeepSpeed has for CUDA only.
    Raises ValueError listing every value of the file that contradicts a flag, with both values.
    """
    config = copy.deepcopy(dict(raw))
    clashes: list[str] = []

    def fill(path: str, value: Any, flag: str, *, add: bool = True) -> None:
        *parents, last = path.split(".")
        section = config
        for parent in parents:
            if parent not in section and not add:
                return
            section = section.setdefault(parent, {})
        if last not in section and not add:
            return
        if section.get(last, "auto") == "auto":
            section[last] = value
        elif not _same(section[last], value):
            clashes.append(f"{path} is {section[last]!r} in the file, but {flag} gives {value!r}")

    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage must be 1, 2 or 3 in the DeepSpeed file, found {zero.get('stage')}")
    fill("train_batch_size", plan.global_batch, "--global_batch")
    fill("train_micro_batch_size_per_gpu", plan.micro_batch, "--micro_batch")
    fill("gradient_accumulation_steps", plan.accumulation, "--global_batch over --micro_batch and the ranks")
    fill("gradient_clipping", optimizer.max_grad_norm, "--max_grad_norm")
    fill("bf16.enabled", bf16, "--bf16")
    fill("bf16.check_grad_overflow", True, "this program (it skips steps without finite gradients)", add=False)
    fill("fp16.enabled", False, "this program (it trains in bf16 or fp32)", add=False)
    _fill_optimizer(config, optimizer, fill, clashes)
    for key, value in _hidden_sizes(hidden_size).items():
        if zero.get(key) == "auto":
            if value is None:
                del zero[key]
            else:
                zero[key] = value
    if on_cpu:
        for key in ("offload_optimizer", "offload_param", *_CUDA_ONLY):
            zero.pop(key, None)
    group = zero.get("zero_hpz_partition_size", 1)
    if plan.world_size % min(group, plan.world_size):
        raise ValueError(
            f"zero_hpz_partition_size is {group} in the DeepSpeed file, but there are {plan.world_size} ranks: give "
            "the number of GPUs per node"
        )
    if clashes:
        raise ValueError(
            "the DeepSpeed file and the command line contradict each other:\n  "
            + "\n  ".join(clashes)
            + '\nWrite "auto" into the file to let the flags decide, or give the same value in both.'
        )
    if left := _autos(config):
        raise ValueError(f'no flag fills the "auto" of {", ".join(left)} in the DeepSpeed file: write a value there')
    config.setdefault("steps_per_print", 10**9)
    return config


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state lives in CPU memory (it is then DeepSpeed's CPU Adam that steps)."""
    section = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def _fill_optimizer(config: dict[str, Any], want: OptimizerSettings, fill: Any, clashes: list[str]) -> None:
    if "optimizer" in config:
        if config["optimizer"].get("type", "AdamW") not in ("AdamW", "auto"):
            clashes.append(f"optimizer.type is {config['optimizer']['type']!r}, but training uses 'AdamW'")
        config["optimizer"]["type"] = "AdamW"
        fill("optimizer.params.lr", want.lr, "--lr", add=False)
        fill("optimizer.params.betas", [want.beta1, want.beta2], "--adam_beta1/--adam_beta2", add=False)
        fill("optimizer.params.eps", want.eps, "--adam_eps", add=False)
        fill("optimizer.params.weight_decay", want.weight_decay, "--weight_decay", add=False)
    if "scheduler" in config:
        if config["scheduler"].get("type", "WarmupCosineLR") not in ("WarmupCosineLR", "auto"):
            clashes.append(f"scheduler.type is {config['scheduler']['type']!r}, but training uses 'WarmupCosineLR'")
        config["scheduler"]["type"] = "WarmupCosineLR"
        fill("scheduler.params.total_num_steps", want.total_steps, "--epochs/--max_steps", add=False)
        fill("scheduler.params.warmup_num_steps", want.warmup_steps, "--warmup_ratio", add=False)
        fill("scheduler.params.warmup_type", "linear", "this program", add=False)
        fill("scheduler.params.warmup_min_ratio", 0.0, "this program", add=False)
        fill("scheduler.params.cos_min_ratio", 0.0, "this program", add=False)


def _hidden_sizes(hidden: int | None) -> dict[str, int | None]:
    return {
        "reduce_bucket_size": hidden and hidden * hidden,
        "stage3_prefetch_bucket_size": hidden and int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": hidden and 10 * hidden,
    }


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    numbers = (int, float)
    if isinstance(found, numbers) and isinstance(wanted, numbers) and bool not in (type(found), type(wanted)):
        return math.isclose(found, wanted, rel_tol=1e-9)
    return type(found) is type(wanted) and found == wanted


def _autos(section: Any, path: str = "") -> list[str]:
    if isinstance(section, dict):
        return [found for key, value in section.items() for found in _autos(value, f"{path}.{key}" if path else key)]
    # DeepSpeed fills this one itself.
    return [path] if section == "auto" and path != "data_types.keep_in_fp32_modules" else []
