"""Sends to MLflow what a server that was away did not get from runs that have ended.

    python pipeline/sync_mlflow.py runs/13b runs/7b
    MLFLOW_TRACKING_URI=http://tracking:5000 python pipeline/sync_mlflow.py runs/13b    # to this server

Nothing is sent twice, so it does no harm to send again. A run that is resumed sends by itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.runtime.tracking import send_left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (those with mlflow.json)")
    failed = 0
    for run in parser.parse_args().runs:
        try:
            print(send_left(run))
        except ValueError as error:
            print(f"sync_mlflow.py: error: {error}", file=sys.stderr)
            failed = 2
    return failed


if __name__ == "__main__":
    sys.exit(main())
