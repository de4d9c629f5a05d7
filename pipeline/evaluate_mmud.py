"""Scores a tuned model on a split of a packed data set, by free-running decoding.

    python pipeline/evaluate_mmud.py --checkpoint runs/quickstart --condition all --protocol both
    deepspeed pipeline/evaluate_mmud.py --checkpoint runs/13b --split valid --data /data/mmud --limit 200
    python pipeline/evaluate_mmud.py --from runs/quickstart/predictions
    python pipeline/evaluate_mmud.py --tables runs/7b,runs/13b --report_dir docs/results/tables
    python pipeline/evaluate_mmud.py --summarise runs/seed0,runs/seed1,runs/seed2 --report_dir docs/results/mini

Writes report.json, report.md, details.json, the paper's tables, contact_sheet.png and predictions/ into the run's
folder (or --report_dir) and, when the run was tracked, logs them to its MLflow run. The result does not depend on the
number of ranks. --from scores saved predictions again; --tables and --summarise put several reports together (rows of
the paper's tables; mean ± standard deviation over seeds). These three load no model. Answers of a task of one's own are
scored with --from and --task_module, its file. --help lists the flags.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from pipeline.assembly.evaluation import Evaluation, score_saved
from pipeline.config import EvalArguments, parse
from pipeline.runtime.ranks import detect, join, part, tell_failure
from pipeline.scoring.paper_tables import table_runs
from pipeline.scoring.seeds import write_summary


def main() -> int:
    (args,) = parse(EvalArguments, description=__doc__)
    try:
        if args.summarise:
            print(write_summary(args.summarised_runs, Path(args.report_dir), args.title))
        elif args.tables:
            print(table_runs(args.tabled_runs, Path(args.report_dir)))
        elif args.from_predictions:
            saved = Path(args.from_predictions)
            print(score_saved(saved, Path(args.report_dir or saved.parent), args))
        else:
            ranks = detect()
            join(ranks)
            if text := Evaluation(args, ranks).run():
                print(text)
    except Exception as error:
        mendable = isinstance(error, (ValueError, OSError))
        tell_failure(f"evaluate_mmud.py: error: {error}" if mendable else traceback.format_exc())
        part(failed=True)
        return 2 if mendable else 1
    part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
