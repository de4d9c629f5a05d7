"""pretrain_prior.py as it is typed: from packed pictures to a folder for --prior, over a resume on other ranks."""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MMUD = REPO / "tests/data/mmud"
