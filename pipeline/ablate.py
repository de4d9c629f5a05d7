r"""Runs the paper's ablations, or neural tuning beside LoRA and IA3, and prints the table: mean ± deviation over seeds.

    python pipeline/ablate.py table3 --train_flags "--max_steps 300" --eval_flags "--limit 100"
    python pipeline/ablate.py table4 --part 3/20                  # one task of a SLURM array (slurm/ablate.sh)
    python pipeline/ablate.py table4 --table_only                 # the table of what is finished so far
    python pipeline/ablate.py learning_rates && python pipeline/ablate.py baselines

Without --train_flags the mini world is tuned. Stop it whenever you like: the same command goes on where it was.
"""

from __future__ import annotations

import sys

from pipeline.assembly.ablation import Ablation
from pipeline.config import AblationArguments, parse


def main() -> int:
    """Parse, run, print; what a user can mend is one message."""
    words = sys.argv[1:]
    named = ["--study"] if words and not words[0].startswith("-") else []
    (args,) = parse(AblationArguments, argv=[*named, *words], description=__doc__)
    try:
        ablation = Ablation(args)
        if args.dry_run:
            print("\n\n".join(f"# {job.row.label}, seed {job.seed}\n{job.describe()}" for job in ablation.own_jobs()))
        else:
            print(ablation.table() if args.table_only else ablation.run())
    except (ValueError, RuntimeError) as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
