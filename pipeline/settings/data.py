"""The flags of the packed data sets and of the prompts made of them."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.task_module import load_task_module
from pipeline.data.tasks import TASKS
from pipeline.runtime.command_line import flag, numbers
from pipeline.settings.checks import distinct, need


@dataclass(kw_only=True)
class DataArguments:
    """The packed data set and what is made of each sample."""

    data: str = flag(
        "", "folder or URL of packed shards (pipeline/shard_mmud.py makes it); several with commas between"
    )
    data_weights: str = flag("", "share of each data set in every global batch, as in 2,1; empty: each sample once")
    shuffle_window: int = flag(16384, "samples shuffled together, so that storage is read in long runs; 0 for all")
    tasks: str = flag(",".join(TASKS), "tasks that are tuned together")
    task_module: str = flag("", "Python file that registers a task of your own, to be named in tasks (see the README)")
    task_mix: str = flag(
        "",
        "share of each task in every global batch, as in 2,1,1,1 in the order of tasks, or by name: reasoning=2 (the "
        "others 1; a task that is not tuned has none); empty: equal",
    )
    referring_objects: int = flag(3, "objects asked for in one referring prompt, at most")
    max_length: int = flag(512, "tokens per sample at most, image tokens included")
    packing: bool = flag(True, "several samples to a row while training, each seen by itself alone; else padded rows")
    pack_tokens: int = flag(0, "tokens per packed row at most; 0: all samples of a pass in one row, without padding")
    num_workers: int = flag(2, "loader processes per rank; 0 loads in the training process")
    max_bad_share: float = flag(0.01, "share of unreadable samples at which training stops, 0 to 1")

    def __post_init__(self) -> None:
        if self.task_module:
            load_task_module(self.task_module)
        names = self.task_names
        unknown = sorted(set(names) - set(TASKS))
        need(not unknown and bool(names) and distinct(names), f"tasks must be some of {','.join(TASKS)}", self.tasks)
        _ = self.task_shares
        need(0 <= self.max_bad_share <= 1, "max_bad_share must lie in 0..1", self.max_bad_share)
        for name, least in (("num_workers", 0), ("shuffle_window", 0), ("referring_objects", 1), ("max_length", 1)):
            need(getattr(self, name) >= least, f"{name} must be at least {least}", getattr(self, name))
        need(
            self.pack_tokens == 0 or self.pack_tokens >= self.max_length,
            f"pack_tokens must be 0 or at least max_length, {self.max_length}: a row must hold a sample",
            self.pack_tokens,
        )

    @property
    def row_tokens(self) -> int | None:
        """Tokens of a packed row at most, 0 for no limit; None for padded rows."""
        return self.pack_tokens if self.packing else None

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks in order."""
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())

    @property
    def task_shares(self) -> tuple[float, ...]:
        """One share per task, in any unit."""
        if not self.task_mix:
            return (1.0,) * len(self.task_names)
        if "=" in self.task_mix:
            named = {
                name.strip(): numbers(share)
                for name, _, share in (part.partition("=") for part in self.task_mix.split(","))
            }
            known = set(named) <= set(TASKS) and all(map(len, named.values()))
            need(known, f"task_mix takes name=share, names of {','.join(TASKS)}", self.task_mix)
            shares = tuple(named.get(name, (1.0,))[0] for name in self.task_names)
        else:
            shares = numbers(self.task_mix)
        need(
            len(shares) == len(self.task_names) and min(shares) >= 0 and sum(shares) > 0,
            f"task_mix takes {len(self.task_names)} shares, one per task ({self.tasks})",
            self.task_mix,
        )
        return shares
