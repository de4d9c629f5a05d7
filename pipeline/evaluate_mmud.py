"""Scores a tuned model on a split of a packed data set, by free-running decoding.

    python pipeline/evaluate_mmud.py --checkpoint runs/quickstart --condition all
    python pipeline/evaluate_mmud.py --checkpoint runs/13b/checkpoint-28000 --split valid --data /data/mmud --limit 200
    python pipeline/evaluate_mmud.py --summarise runs/seed0,runs/seed1,runs/seed2 --report_dir docs/results/mini

Writes report.json, report.md, contact_sheet.png and predictions/ into the run's folder (or --report_dir) and, when the
run was tracked, logs them to its MLflow run. --summarise loads no model: it makes one table, mean ± standard deviation,
of runs that were evaluated before. --help lists the flags.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.assembly.evaluation import Evaluation
from pipeline.config import EvalArguments, parse
from pipeline.runtime.ranks import detect
from pipeline.scoring.seeds import write_summary


def main() -> int:
    (args,) = parse(EvalArguments, description=__doc__)
    try:
        if args.summarise:
            print(write_summary(args.summarised_runs, Path(args.report_dir), args.title))
            return 0
        evaluation = Evaluation(args, detect().device)
        evaluation.run()
        print(evaluation.write())
    except ValueError as error:
        print(f"evaluate_mmud.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
