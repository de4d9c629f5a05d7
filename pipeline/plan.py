r"""Plans a run before it starts: parameters, operations, memory per GPU, communication, time. Needs no GPU, no weights.

    python pipeline/plan.py --preset 7b                                     # one A100-80, ds_configs/z2.json
    python pipeline/plan.py --preset 13b --gpu A100-80 --gpus 8 --global_batch 16 --deepspeed ds_configs/z3.json
    python pipeline/plan.py --preset 13b --gpu 4090 --gpus 4 --fit --out plans/4x4090    # the fastest that fits
    python pipeline/plan.py --preset 7b --curves plans/7b.png               # 1 to 1,024 GPUs

Takes train.py's flags and a few more; with the same flags it plans what train.py would run. The step times are
PREDICTIONS: data sheets' rates times assumed efficiencies (pipeline/planning/gpus.py: 60 % of the matrix rate, 80 % of
the memory's, 70 % of the links', 80 % of communication hidden). No GPU has checked them yet.
"""

from __future__ import annotations

import json
import sys

from pipeline.assembly.planning import Planning
from pipeline.config import DataArguments, ModelArguments, PlanArguments, TrainArguments, parse
from pipeline.planning.table import describe


def main() -> int:
    """Parse, plan, print; what a user can mend is one line."""
    model, data, train, args = parse(ModelArguments, DataArguments, TrainArguments, PlanArguments, description=__doc__)
    try:
        planning = Planning(model, data, train, args)
        plan = planning.fitted() if args.fit else planning.given()
        report = planning.report(plan)
        command = planning.write(plan, args.out) if args.out else planning.command(plan, report["flags"])
        if args.curves:
            planning.draw(plan, args.curves)
    except ValueError as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if args.json else describe(report, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
