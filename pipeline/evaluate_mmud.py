"""Scores a tuned model on a split of a packed data set, by free-running decoding.

    python pipeline/evaluate_mmud.py --checkpoint runs/quickstart --condition all
    python pipeline/evaluate_mmud.py --checkpoint runs/13b/checkpoint-28000 --split valid --data /data/mmud --limit 200

Writes report.json, report.md, contact_sheet.png and predictions/ into the run's folder (or --report_dir) and, when the
run was tracked, logs them to its MLflow run. --help lists the flags.
"""

from __future__ import annotations

import sys

from pipeline.assembly.evaluation import Evaluation
from pipeline.config import EvalArguments, parse
from pipeline.runtime.ranks import detect


def main() -> int:
    (args,) = parse(EvalArguments, description=__doc__)
    try:
        evaluation = Evaluation(args, detect().device)
        evaluation.run()
        print(evaluation.write())
    except ValueError as error:
        print(f"evaluate_mmud.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
