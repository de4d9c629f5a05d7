"""What the dataclasses of this package check their values with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
"""Root of the checkout: the mini preset's paths stand on it, so that scripts run from any folder."""


def distinct(items: Sequence[Any]) -> bool:
    """Whether no item occurs twice."""
    return len(set(items)) == len(items)


def need(holds: bool, rule: str, found: Any) -> None:
    """Raises ValueError with the rule and what was found instead, unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, found {found!r}")
