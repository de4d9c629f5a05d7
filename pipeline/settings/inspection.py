"""The flags of the look at which units fire."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.runtime.command_line import flag
from pipeline.settings.checks import need


@dataclass(kw_only=True)
class InspectArguments:
    """Which checkpoint, on what."""

    checkpoint: str = flag(
        "", "checkpoint folder, or a run's folder (its newest whole one); empty: runs/mini, else runs/quickstart"
    )
    split: str = flag("test", "split of the data set")
    samples: int = flag(200, "samples of each task at most; whole batches are taken")
    batch: int = flag(16, "samples per forward pass")
    output_dir: str = flag("", "folder of the figures and tables; empty: <run>/units")
    data: str = flag("", "folder of packed shards; empty: the one that was trained on")
    base: str = flag("", "folder of the frozen LM; empty: as in training (the same for clip)")
    clip: str = flag("", "frozen CLIP, as in training when empty")
    clip_weights: str = flag("", "weights file of the CLIP, as in training when empty")
    seed: int = flag(0, "of the random halves and of the matched places")

    def __post_init__(self) -> None:
        need(self.samples >= 4, "samples must be at least 4", self.samples)
        need(self.batch >= 1, "batch must be at least 1", self.batch)

    @property
    def replaced(self) -> dict[str, str]:
        """The paths that were given, in place of those of the training run."""
        names = ("data", "base", "clip", "clip_weights")
        return {name: getattr(self, name) for name in names if getattr(self, name)}
