"""Shows which units of the sparse networks fire for which task, and how far the tasks share them.

    python pipeline/look_inside.py                                   # the mini model, after `make quickstart`
    python pipeline/look_inside.py --checkpoint runs/7b --split valid --samples 500

Writes firing.png, overlap.png, units.md and units.json to <run>/units. The same model before tuning, and places matched
by token, stand beside it as controls.
"""

from __future__ import annotations

import sys

from pipeline.assembly.inspection import Inspection
from pipeline.config import InspectArguments, parse
from pipeline.runtime.ranks import detect


def main() -> int:
    """Parse, run, print; what a user can mend is one message."""
    (args,) = parse(InspectArguments, description=__doc__)
    try:
        print(Inspection(args, detect().device).run())
    except ValueError as error:
        print(f"look_inside.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
