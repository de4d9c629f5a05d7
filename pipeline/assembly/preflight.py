"""What can be known to go wrong, in the first seconds and all at once: before any model is loaded.

    check(model, data, train, ranks)     # prints warnings; ValueError with every problem found on any node

One rank of each node looks at its files, since a path may be missing on one node only; each looks at its own GPU.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.assembly import parts, speedups
from pipeline.assembly.planning import estimate
from pipeline.assembly.schedule import MINI_SHARDS, open_validation
from pipeline.config import DataArguments, ModelArguments, TrainArguments
from pipeline.data.mixture import folders
from pipeline.model.vision import find_local
from pipeline.model.weight_files import check_folder
from pipeline.planning.memory import Memory, Zero, usable
from pipeline.runtime.ds_config import BatchPlan, OptimizerSettings, count_steps, plan_batch, read_json, resolve
from pipeline.runtime.engine import config_problems
from pipeline.runtime.ranks import Ranks, host
from sparse_kernels import launch

GIB = 2**30
CHECKPOINT_BYTES = 12
"""Per trained parameter on disk: its fp32 value and Adam's two moments."""
_LOGS = 0.5 * GIB  # metrics, MLflow's database, figures
_T = TypeVar("_T")


@dataclass
class Findings:
    """What one rank found."""

    host: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    gpu: str = ""
    fixed: float = 0.0

    def attempt(self, look: Callable[[], _T]) -> _T | None:
        """What `look` returns; its ValueError or OSError is a problem, and None is returned."""
        try:
            return look()
        except (ValueError, OSError) as error:
            self.problems.append(str(error))
            return None


def check(model: ModelArguments, data: DataArguments, train: TrainArguments, ranks: Ranks) -> None:
    """Collective. Rank 0 prints the warnings, and under --preflight what a run would need.

    Raises:
        ValueError: on every rank, with all problems of all nodes.
    """
    mine = Findings(host())
    examine(mine, model, data, train, ranks)
    everyone: list[Findings] = ranks.gather(mine)
    problems = _merge(everyone, "problems") + shared_gpus(everyone)
    if ranks.device.type == "cpu":
        problems += host_memory_problems(everyone, _node_bytes())
    if ranks.is_main:
        for text in _merge(everyone, "warnings"):
            print(f"warning: {text}", flush=True)
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        listed = "\n".join(f"  {number}. {text}" for number, text in enumerate(problems, 1))
        raise ValueError(f"{len(problems)} things to mend before this run can start:\n{listed}")
    if train.preflight and ranks.is_main:
        print(
            f"Ready: {ranks.world_size} rank{'s' if ranks.world_size > 1 else ''} on {ranks.device.type}, at least "
            f"{mine.fixed / GIB:.1f} GiB of memory each."
        )


def examine(found: Findings, model: ModelArguments, data: DataArguments, train: TrainArguments, ranks: Ranks) -> None:
    """What this rank finds: the first of each node looks at files and memory, rank 0 at disk and server besides."""
    _gpu(found, model, train, ranks)
    if ranks.local_rank:
        return
    config = found.attempt(lambda: parts.read_config(model))
    whole = _llm(found, model, config)
    whole = found.attempt(lambda: find_local(model.clip, model.clip_weights or None)) is not None and whole
    samples = _data(found, data, train)
    batch = found.attempt(
        lambda: plan_batch(
            train.global_batch, ranks.world_size, micro_batch=train.micro_batch, limit=train.max_micro_batch
        )
    )
    deepspeed = found.attempt(lambda: _deepspeed(found, train, ranks, batch, config or {})) if batch else None
    if config and deepspeed:
        found.attempt(
            lambda: speedups.check(
                train,
                device_type=ranks.device.type,
                stage=deepspeed["zero_optimization"]["stage"],
                quant=model.base_quant,
                model_type=config.get("model_type"),
            )
        )
    if whole and batch and deepspeed:
        zero = Zero.of(deepspeed, ranks.world_size)
        planned = found.attempt(
            lambda: estimate(model, data, train, zero, micro_batch=batch.micro_batch, device_type=ranks.device.type)
        )
        if planned:
            count, memory = planned
            found.fixed = memory.fixed
            _gpu_memory(found, memory, ranks)
            if ranks.is_main:
                steps = count_steps(samples, train.global_batch, epochs=train.epochs, max_steps=train.max_steps)
                found.attempt(lambda: _disk(found, CHECKPOINT_BYTES * count.all_trained, train, steps))
    if ranks.is_main:
        found.warnings += mlflow_warnings(os.environ.get("MLFLOW_TRACKING_URI", ""))


def _llm(found: Findings, model: ModelArguments, config: Mapping[str, Any] | None) -> bool:
    """The LM's weights and tokenizer; whether the weights are what config.json describes."""
    whole = False
    if config is not None:
        try:
            check_folder(model.base)
        except (ValueError, OSError) as error:
            found.problems.append(f"--base: {error}")
        else:
            whole = True
        try:
            parts.load_token_map(model)
        except Exception as error:  # transformers raises what it likes for a folder without a tokenizer
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found.problems.append(f"--base {model.base}: the tokenizer does not load ({first}): fetch its files too")
    return whole


def _data(found: Findings, data: DataArguments, train: TrainArguments) -> int:
    """The packed data sets; the number of training samples, 0 if it is not known."""
    if Path(data.data) == MINI_SHARDS:
        # Made by the run itself where it is missing.
        return 0
    sizes = [found.attempt(partial(_samples, folder)) for folder in folders(data.data)]
    if all(sizes) and train.eval_steps:
        found.attempt(lambda: open_validation(data.data, train))
    return sum(size or 0 for size in sizes)


def _samples(folder: str) -> int:
    return len(parts.open_split(folder, "train"))


def _deepspeed(
    found: Findings, train: TrainArguments, ranks: Ranks, batch: BatchPlan, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The DeepSpeed file with the flags in it, as DeepSpeed itself reads it."""
    raw = read_json(train.deepspeed_file())
    full = resolve(
        raw,
        plan=batch,
        optimizer=OptimizerSettings(lr=train.lr, max_grad_norm=train.max_grad_norm),
        bf16=train.use_bf16(ranks.device.type),
        hidden_size=config.get("hidden_size"),
        on_cpu=ranks.device.type == "cpu",
    )
    if said := config_problems(full):
        raise ValueError(f"--deepspeed {train.deepspeed_file()}: {'; '.join(said)}")
    if left_out := sorted(set(raw["zero_optimization"]) - set(full["zero_optimization"])):
        found.warnings.append(f"--deepspeed {train.deepspeed_file()}: left out on the CPU: {', '.join(left_out)}")
    return full


def _gpu(found: Findings, model: ModelArguments, train: TrainArguments, ranks: Ranks) -> None:
    """Which GPU this rank has, whether it has one at all, and whether kernels can be started there."""
    if ranks.device.type == "cuda":
        found.gpu = str(torch.cuda.get_device_properties(ranks.device).uuid)
        if train.use_bf16("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(ranks.device)
            found.problems.append(f"{name} does not compute in bfloat16: give --bf16 false")
        if model.tuner == "neural" and os.environ.get("SPARSE_KERNELS") != "reference" and find_spec("triton"):
            found.problems += _kernel_problems()
    elif promised := os.environ.get("SLURM_GPUS_ON_NODE"):
        found.problems.append(
            f"SLURM gave this job {promised} GPU(s) per node, but torch {torch.__version__} sees none: look at "
            "`nvidia-smi` and whether torch was built for CUDA"
        )


def _kernel_problems() -> list[str]:
    """Whether Triton, which the sparse vector's first kernel has build a C module, can do that here."""
    try:
        launch.driver()
    except Exception as error:  # a compiler's exit, a missing header or library: Triton lets all of it through
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [
            f"Triton cannot build what it starts kernels with ({first}): install Python's headers and a C compiler "
            "(apt install python3-dev gcc), or set SPARSE_KERNELS=reference in the environment"
        ]
    return []


def _gpu_memory(found: Findings, memory: Memory, ranks: Ranks) -> None:
    if ranks.device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(ranks.device)
    found.problems += memory_problems(memory, total)
    if not found.problems:
        found.warnings += memory_warnings(memory, free)


_LESS_MEMORY = (
    "take ds_configs/z3.json (the base model spread over the GPUs), --gradient_checkpointing full, or a smaller "
    "--micro_batch"
)


def memory_problems(memory: Memory, total: float) -> list[str]:
    """Whether weights, gradients and optimizer alone are more than a GPU's `total` bytes."""
    if memory.fixed <= total:
        return []
    return [
        f"weights and optimizer take {memory.fixed / GIB:.0f} GiB per GPU, which has {total / GIB:.0f}: "
        f"{_LESS_MEMORY}, more GPUs, or ds_configs/z3_offload.json"
    ]


def memory_warnings(memory: Memory, free: float) -> list[str]:
    """Whether a step needs more than can be filled of a GPU's `free` bytes."""
    if memory.total <= usable(free):
        return []
    return [
        f"about {memory.total / GIB:.0f} GiB are needed per GPU, and of the {free / GIB:.0f} that are free "
        f"{usable(free) / GIB:.0f} can be filled: it may run out of memory; {_LESS_MEMORY}. "
        "`python pipeline/plan.py` with the same flags shows what takes how much"
    ]


def host_memory_problems(everyone: Sequence[Findings], total: float) -> list[str]:
    """On a CPU: whether all ranks of a node are more than its `total` bytes."""
    fixed = max(found.fixed for found in everyone)
    ranks = max(Counter(found.host for found in everyone).values())
    if ranks * fixed <= total:
        return []
    return [
        f"there is no GPU, and on the CPU {ranks} rank(s) take {ranks * fixed / GIB:.0f} GiB of the node's "
        f"{total / GIB:.0f}: take GPUs, fewer ranks per node, or ds_configs/z3.json"
    ]


def _node_bytes() -> float:
    """The memory of this node that the job may use."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # In MiB; 0 stands for all of it.
    given = float(os.environ.get("SLURM_MEM_PER_NODE") or 0) * 2**20
    return min(physical, given) if given else physical


def shared_gpus(everyone: Sequence[Findings]) -> list[str]:
    """Ranks that were given the same GPU: NCCL would refuse, or hang."""
    users = defaultdict(list)
    for rank, found in enumerate(everyone):
        if found.gpu:
            users[found.host, found.gpu].append(rank)
    return [
        f"ranks {', '.join(map(str, ranks))} share one GPU on {host}: start as many tasks per node as it has GPUs"
        for (host, _), ranks in users.items()
        if len(ranks) > 1
    ]


def _disk(found: Findings, checkpoint: float, train: TrainArguments, steps: int) -> None:
    """Whether the output folder can be written and has room for checkpoints of so many bytes. ValueError or OSError if
    not."""
    folder = Path(train.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: {there} cannot be written ({error.strerror or error})") from error
    # One is written before the oldest goes.
    every = train.save_steps or steps
    saves = train.save_total_limit + 1 if train.save_total_limit else math.ceil(steps / max(every, 1))
    wanted = saves * checkpoint + _LOGS
    free = shutil.disk_usage(there).free
    text = (
        f"--output_dir {folder}: {free / GIB:.1f} GiB are free, but {saves} checkpoints of "
        f"{checkpoint / GIB:.2f} GiB and logs take {wanted / GIB:.1f}"
    )
    if free < min(saves, 2) * checkpoint + _LOGS:
        raise ValueError(f"{text}: make room, or take another folder")
    if free < wanted:
        found.warnings.append(f"{text}: it may run full; lower --save_total_limit or raise --save_steps")


def mlflow_warnings(uri: str, seconds: float = 4.0) -> list[str]:
    """Whether the server of MLFLOW_TRACKING_URI answers at all; no run depends on it."""
    if not uri.startswith(("http://", "https://")):
        return []
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=seconds).close()
    except urllib.error.HTTPError:
        # It answers; what it wants is between it and MLflow's client.
        return []
    except (OSError, ValueError) as error:
        return [
            f"MLFLOW_TRACKING_URI {uri} does not answer ({error}): metrics are kept in the run's folder until it does"
        ]
    return []


def _merge(everyone: Sequence[Findings], kind: str) -> list[str]:
    """Each text once, with the names of the nodes where only some say it."""
    hosts = {found.host for found in everyone}
    nodes: dict[str, set[str]] = {}
    for found in everyone:
        for text in getattr(found, kind):
            nodes.setdefault(text, set()).add(found.host)
    return [text if said == hosts else f"on {', '.join(sorted(said))}: {text}" for text, said in nodes.items()]
