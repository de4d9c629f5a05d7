"""Makes the foundation models of the mini world again, or measures the stored ones on held-out scenes.

    python pipeline/build_mini.py                                  # the gates of the stored models (about a minute)
    python pipeline/build_mini.py --from_scratch --out my_models   # train them: one to two hours on two CPU cores
    python pipeline/build_mini.py --from_scratch --smoke --out /tmp/smoke   # a minute: only that every stage runs

A training that was stopped goes on with the first model that the folder does not hold.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.mini.build import GATES, SMOKE, Builder, BuildSize, failed_gates, judge, write_card
from pipeline.mini.source import foundation_folder
from pipeline.runtime.command_line import flag, parse


@dataclass
class BuildArguments:
    """What to build and where."""

    out: str = flag(str(foundation_folder()), "folder of the models")
    from_scratch: bool = flag(False, "train the models that the folder does not hold yet")
    smoke: bool = flag(False, "a few steps per model; the gates are measured, not enforced")
    seed: int = flag(0, "of scenes, initial weights and batches")


def main() -> int:
    (args,) = parse([BuildArguments], peek=(), description=__doc__)
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
