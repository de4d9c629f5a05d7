"""The flags of an ablation."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.runtime.command_line import flag
from pipeline.settings.checks import REPO, distinct, need

_STUDYS_OWN = {
    "train_flags": {
        "output_dir": "each run has a folder of its own below the study's --output_dir",
        "seed": "--seeds of the study names them",
        "run_name": "each run has the name of its row and seed",
    },
    "eval_flags": {
        "split": "the study says which (test; valid for learning_rates)",
        "report_dir": "the study looks for a run's report in the run's folder",
        "checkpoint": "each run's own is scored",
        **dict.fromkeys(("from", "from_predictions", "tables", "summarise"), "the runs' checkpoints are to be scored"),
    },
}
"""What a study gives itself to the commands of its runs, and why no other value is taken."""


@dataclass(kw_only=True)
class AblationArguments:
    """Which study, over which seeds, run how."""

    study: Literal["table3", "table4", "table5", "learning_rates", "baselines"] = flag(
        "table3",
        "table3 (EMA, sparsity, tasks, q/k/v), table4 (beta x tasks), table5 (activation patterns), learning_rates (of "
        "neural tuning, LoRA and IA3, on the validation split) or baselines (the three at their best rate)",
    )
    seeds: str = flag("0,1,2", "seeds of each row, with commas")
    rows: str = flag("", "names of the rows to run, with commas, as --dry_run lists them; empty: all")
    output_dir: str = flag("", "folder of the runs and of table.md; empty: runs/ablate/<study>")
    train_flags: str = flag("", 'flags that every training gets, as in "--preset 7b --base LLAMA --max_steps 2000"')
    eval_flags: str = flag("", 'flags that every evaluation gets, as in "--limit 200"')
    launcher: str = flag("", 'what starts a training, as in "deepspeed --num_gpus 8"; empty: one process')
    part: str = flag("", "i/n: only every n-th run from the i-th on, for SLURM arrays")
    dry_run: bool = flag(False, "print the commands and run nothing")
    table_only: bool = flag(False, "run nothing; make the table of the runs that are finished")

    def __post_init__(self) -> None:
        _ = self.seed_list
        for name in ("train_flags", "eval_flags", "launcher"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name} is no command line ({error}), found {getattr(self, name)!r}") from error
        for name, taken in _STUDYS_OWN.items():
            for word in shlex.split(getattr(self, name)):
                given = word.split("=")[0]
                why = taken.get(given[2:].replace("-", "_")) if given.startswith("--") else None
                need(why is None, f"--{name} may not hold {given}: {why}", getattr(self, name))
        need(not (self.dry_run and self.table_only), "give --dry_run or --table_only, not both", True)

    @property
    def seed_list(self) -> list[int]:
        """The seeds in order."""
        texts = [text.strip() for text in self.seeds.split(",")]
        need(all(text.isdecimal() for text in texts) and distinct(texts), "seeds takes numbers, once each", self.seeds)
        return [int(text) for text in texts]

    @property
    def folder(self) -> Path:
        """Where the runs go."""
        return Path(self.output_dir or REPO / "runs" / "ablate" / self.study)
