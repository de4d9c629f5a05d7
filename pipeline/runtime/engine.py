"""The one door to DeepSpeed: process group, optimizer, ZeRO, and each parameter's full fp32 state.

    ranks = detect()
    start(ranks)
    engine = Engine(model, groups, ds_config, ranks, optimizer=settings)
    loss, parts = engine(batch, features, norms, weights)
    engine.backward(loss)
    engine.step()          # steps the optimizer at the end of a global batch
    close()
    leave(0)               # instead of sys.exit

DeepSpeed averages gradients over ranks and micro-batches: a loss normalised over the global batch is given to
`backward` multiplied by world_size * accumulation (see trainer.py).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch

if not torch.cuda.is_available():
    # Said beforehand, DeepSpeed does not look for accelerators and warn at import.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from pipeline.runtime.ds_config import OptimizerSettings, offloads
from pipeline.runtime.elastic import MOMENTS
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.watchdog import watch_launcher

_OURS = ("optimizer", "scheduler")
"""Sections of the file that DeepSpeed is not given, as this module makes both."""


def start(ranks: Ranks, *, timeout_minutes: float = 30.0) -> None:
    """Starts the process group (nccl on CUDA, gloo on the CPU), and the watch over the launcher.

    timeout_minutes: how long a collective call waits for a rank.
    """
    watch_launcher(ranks)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        # DeepSpeed would compile a C++ op for its CPU collectives at the first start: it needs a compiler, two virtual
        # environments recompile each other's, and interrupted it leaves a lock file at which every later start waits
        # without a word. gloo's own collectives do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


@contextlib.contextmanager
def loading_in_pieces(config: Mapping[str, Any]) -> Iterator[None]:
    """Within this context from_pretrained gives each rank its piece of every weight, if config (resolved) is ZeRO-3's.

    Rank 0 reads the files, mapped into memory, and hands each weight out; no rank ever holds the model whole. The
    process group must have been started. Under ZeRO-1 and 2 nothing changes.
    """
    if config["zero_optimization"]["stage"] < 3:
        yield
        return
    # transformers keeps a weak reference: the configuration must live as long as the loading.
    kept = HfDeepSpeedConfig(dict(config))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


@contextlib.contextmanager
def whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context those parameters that are cut up are whole on every rank, for reading. Collective."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(cut, enabled=bool(cut)):
        yield


def close() -> None:
    """Ends the process group; a ZeRO-3 run that leaves it open ends in abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Watched(dict[str, Any]):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed would refuse in a resolved configuration, and the keys that it would pass over in silence.

    Its sections (zero_optimization, bf16, ...) refuse unknown keys; at the top level it never looks at them, and there
    is no list of those it knows: what it did not ask for while it read this configuration is unknown to it.
    """
    own = _Watched({key: value for key, value in config.items() if key not in _OURS})
    try:
        # It works on a shallow copy, which shares `asked`.
        DeepSpeedConfig(own)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        return [" ".join(lines)]
    return [f"DeepSpeed knows no key `{key}`" for key in sorted(set(own) - own.asked)]


def leave(status: int) -> NoReturn:
    """Ends the process with `status`: exit handlers run and output is flushed, but the interpreter is not torn down.

    DeepSpeed holds its process groups to the end, so gloo's threads outlive destroy_process_group. One that gives back
    the last reference to a tensor while Python (before 3.14) tears down asks for the GIL, is ended instead, and takes
    the process with it: "terminate called without an active exception", exit code -6 after a run that went well.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _cast_the_rest(model: nn.Module) -> None:
    """To bf16, as DeepSpeed does with a whole model: where some weights were loaded in pieces it casts no others.

    Left in fp32 they would be computed with in fp32, and ZeRO-3 cannot spread two types of trained weights.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(torch.bfloat16)


class Engine:
    """A model under DeepSpeed ZeRO-1, 2 or 3 with AdamW, linear warm-up and cosine decay."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        config: Mapping[str, Any],
        ranks: Ranks,
        *,
        optimizer: OptimizerSettings,
    ) -> None:
        """groups: torch optimizer groups (params, lr, weight_decay, name); config: from ds_config.resolve.

        Raises ValueError for a 0-dim parameter (DeepSpeed cannot spread one) and for a model without trained ones.
        """
        flat = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
        if flat:
            raise ValueError(f"DeepSpeed cannot hold parameters without a dimension: give {', '.join(flat)} shape (1,)")
        used = [dict(group) for group in groups if group["params"]]
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("the model has no parameter that is trained")
        grouped = [id(p) for group in used for p in group["params"]]
        assert sorted(grouped) == sorted(map(id, trained.values())), "each trained parameter stands in one group"

        self.ranks = ranks
        self.stage: int = config["zero_optimization"]["stage"]
        self.accumulation: int = config["gradient_accumulation_steps"]
        self._names = list(trained)
        if self.stage == 3 and config["bf16"]["enabled"]:
            _cast_the_rest(model)
        kind = deepspeed.ops.adam.DeepSpeedCPUAdam if offloads(config) else torch.optim.AdamW
        adam = kind(used, lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(adam, optimizer.rate)
        own = {key: value for key, value in config.items() if key not in _OURS}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=adam, lr_scheduler=self._schedule, config=own, dist_init_required=False
            )

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-batch; gradients are averaged over ranks and micro-batches."""
        # A loss that is not finite may still have finite gradients: times nan, every rank's step sees that it is none.
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, float("nan")))

    def step(self) -> bool:
        """To be called after each micro-batch; True if this one ended a global batch and the weights moved.

        At the end of a global batch they stay, on all ranks alike, if a loss or a gradient was not finite; the
        learning rate's schedule goes on.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        moved = self._engine.was_step_applied()
        if boundary and not moved:
            self._schedule.step()
        return moved

    @property
    def steps(self) -> int:
        """Optimizer steps so far, those before a resume included."""
        return self._engine.global_steps

    @property
    def grad_norm(self) -> float:
        """L2 norm of the last step's gradients before clipping; nan before the first step."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of the next step by group name."""
        return {group.get("name", str(i)): group["lr"] for i, group in enumerate(self._adam.param_groups)}

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of all that is trained, in the same order on every rank."""
        parameters = dict(self.module.named_parameters())
        for name in self._names:
            yield name, parameters[name]

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The parameter's shape; under ZeRO-3 the tensor at hand may be empty."""
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def shut(self) -> None:
        """Frees what DeepSpeed hooked into the model; the engine is of no use afterwards."""
        self._engine.destroy()

    # Below: full fp32 state by parameter. Collective calls: every rank, the same parameters in the same order.

    def get_weight(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 master weight, whole, on every rank."""
        return safe_get_full_fp32_param(parameter).reshape(self.full_shape(parameter))

    def get_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """One of MOMENTS, whole, fp32, on every rank; needs `has_moments` and `link_moments`."""
        return safe_get_full_optimizer_state(parameter, key).reshape(self.full_shape(parameter))

    @property
    def has_moments(self) -> bool:
        """Whether Adam has state: after the first step or `allocate_moments`."""
        return all(MOMENTS[0] in self._adam.state.get(flat, {}) for flat in self._flat_groups())

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets the fp32 master weight and the weight that the model computes with."""
        value = value.to(self.ranks.device, torch.float32)
        if self.stage == 3:
            safe_set_local_fp32_param(parameter, self._slice(parameter, value))
            # DeepSpeed's setters leave the bf16 copy alone.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.ranks.is_main:
                    parameter.data.copy_(value)
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    def allocate_moments(self, updates: int) -> None:
        """Gives Adam zero moments after so many updates, to be filled by `set_moment`."""
        for flat in self._flat_groups():
            state = self._adam.state[flat]
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat, dtype=torch.float32)
            # torch's AdamW counts in a tensor, DeepSpeed's CPU Adam in an int.
            state["step"] = torch.tensor(float(updates)) if isinstance(self._adam, torch.optim.AdamW) else updates
        self.link_moments()

    def link_moments(self) -> None:
        """Makes get_moment and set_moment see Adam's present moments.

        DeepSpeed links each parameter to its piece once, after the FIRST group's first step, when the other groups
        have none yet: with several groups its own link is incomplete (0.19.8; ZeRO-3 looks them up each time).
        """
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Sets one of MOMENTS; needs `allocate_moments`."""
        value = value.to(self.ranks.device, torch.float32)
        if self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._slice(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def set_step(self, step: int) -> None:
        """Moves the schedule and DeepSpeed's counters to `step` optimizer steps done."""
        self._schedule.last_epoch = step
        rates = [base * rate(step) for base, rate in zip(self._schedule.base_lrs, self._schedule.lr_lambdas)]
        for group, rate in zip(self._adam.param_groups, rates):
            group["lr"] = rate
        self._schedule._last_lr = rates
        self._engine.global_steps = step
        self._engine.global_samples = step * self._engine.train_batch_size()
        self._engine.micro_steps = step * self.accumulation

    def schedule_state(self) -> dict[str, Any]:
        """Where the schedule stands, for the record in a checkpoint."""
        return {"last_epoch": self._schedule.last_epoch, "base_lrs": list(self._schedule.base_lrs)}

    def _flat_groups(self) -> list[Tensor]:
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        found = [getattr(self._zero, name) for name in names if hasattr(self._zero, name)]
        assert found, f"{type(self._zero).__name__} keeps its flat fp32 groups elsewhere in this DeepSpeed"
        return found[0]

    def _slice(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's piece under ZeRO-3, which pads a parameter to a multiple of the world size."""
        piece = parameter.ds_tensor.numel()
        padded = torch.zeros(piece * self.ranks.world_size, dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        return padded[piece * self.ranks.rank : piece * (self.ranks.rank + 1)]
