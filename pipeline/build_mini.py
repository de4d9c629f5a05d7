"""Makes the foundation models of the mini world again, or measures the stored ones on held-out scenes.

python pipeline/build_mini.py                                  # the gates of the stored models (about a minute)
python pipeline/build_mini.py --from-scratch --out my_models   # train them: one to two hours on two CPU cores
python pipeline/build_mini.py --from-scratch --smoke --out /tmp/smoke   # seconds: only that every stage runs
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from pipeline.mini.build import GATES, SMOKE, Builder, BuildSize, failed_gates, judge, write_card
from pipeline.mini.source import foundation_folder


@dataclass
class BuildArguments:
    """What to build and where."""

    out: str = field(default=str(foundation_folder()), metadata={"help": "Folder of the models."})
    from_scratch: bool = field(default=False, metadata={"help": "Train the models that the folder does not hold yet."})
    smoke: bool = field(
        default=False, metadata={"help": "A few steps per model; the gates are measured, not enforced."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of scenes, initial weights and batches."})


def main() -> int:
    (args,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    out, size = Path(args.out), SMOKE if args.smoke else BuildSize()
    if args.from_scratch:
        Builder(out, size, args.seed).build()
        write_card(out)
    figures = judge(out, tuple(GATES), size.held_out, args.seed)
    for stage, values in figures.items():
        print(f"{stage:6} " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
    failed = failed_gates(figures)
    print("\n".join(["Gates missed:", *failed]) if failed else "Every gate is passed.")
    return 1 if failed and not args.smoke else 0


if __name__ == "__main__":
    sys.exit(main())
