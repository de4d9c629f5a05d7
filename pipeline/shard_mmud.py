"""Pack a data set into WebDataset shards.

    python pipeline/shard_mmud.py
    python pipeline/shard_mmud.py --source mmud --mmud_root MMUD --image_root MMUD/MergedImages --out shards/mmud
    python pipeline/shard_mmud.py --out shards/mmud --verify

The first line packs the mini world, which is drawn by code and needs no download. What comes out is described in
shards/FORMAT.md. Stop it whenever you like: the same command goes on where it was.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from pipeline.data import manifest
from pipeline.data.mmud import MmudSource
from pipeline.data.reader import verify
from pipeline.data.writer import Packed, Source, pack

_SOURCES = ["mini", "mmud"]
_REPO = Path(__file__).resolve().parents[1]


def _flag(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown where there are any, the commands above kept on their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in ("", None) else super()._get_help_string(action)


@dataclass(kw_only=True)
class ShardArguments:
    """The flags of this script."""

    source: str = _flag("mini", "mini (drawn by code, no download) or mmud (pickles and pictures)", choices=_SOURCES)
    mmud_root: str = _flag("", "folder with <split>.pkl or <split>_withlength.pkl")
    image_root: str = _flag("", "folder with the pictures; subfolders as in the pickles, or flat")
    clip_root: str = _flag("", "folder with <picture>.pkl CLIP embeddings, if they are to be packed")
    out: str = _flag("", "folder for the shards (default: shards/<source>)")
    splits: str = _flag("", "splits to pack, with commas (default: all that the source has)")
    samples_per_shard: int = _flag(1000, "samples in one tar file")
    workers: int = _flag(0, "packing processes; 0: one per CPU core, at most 16")
    resize: int = _flag(0, "shrink pictures to so many pixels on the shorter side; 0: keep the files as they are")
    force: bool = _flag(False, "pack again what is packed already")
    verify: bool = _flag(False, "pack nothing; read what is packed again, every hash and every sample")
    mini_train: int = _flag(16_000, "training scenes of the mini world")
    mini_valid: int = _flag(400, "validation scenes of the mini world")
    mini_test: int = _flag(500, "test scenes of the mini world")
    mini_seed: int = _flag(0, "seed that the mini world is drawn from")

    def out_folder(self) -> Path:
        """Where the shards go."""
        return Path(self.out) if self.out else _REPO / "shards" / self.source


def build_source(arguments: ShardArguments) -> Source:
    """The source that the flags name."""
    if arguments.source == "mmud":
        if not arguments.mmud_root or not arguments.image_root:
            raise ValueError("--source mmud needs --mmud_root (the pickles) and --image_root (the pictures)")
        return MmudSource(arguments.mmud_root, arguments.image_root, arguments.clip_root or None)
    if arguments.mmud_root or arguments.image_root or arguments.clip_root:
        raise ValueError("--mmud_root, --image_root and --clip_root go with --source mmud: add it")
    from pipeline.mini.source import MiniSource

    sizes = {"train": arguments.mini_train, "valid": arguments.mini_valid, "test": arguments.mini_test}
    return MiniSource({split: size for split, size in sizes.items() if size}, seed=arguments.mini_seed)


def _chosen(wanted: str, have: list[str]) -> list[str]:
    splits = [split.strip() for split in wanted.split(",") if split.strip()] or have
    unknown = [split for split in splits if split not in have]
    if unknown:
        raise ValueError(f"--splits names {', '.join(unknown)}, but there are only: {', '.join(have)}")
    return splits


def run_pack(arguments: ShardArguments, say: Callable[[str], None] = print) -> None:
    """Pack the source's splits and say what came of it."""
    out = arguments.out_folder()
    source = build_source(arguments)
    if arguments.source == "mini":
        say(
            f"Packing the embedded mini world into {out}; for the real MMUD use "
            "--source mmud --mmud_root FOLDER --image_root FOLDER."
        )
    else:
        say(f"Packing MMUD from {arguments.mmud_root} into {out}.")
    began = time.monotonic()
    packed = [
        pack(
            source,
            split,
            out,
            workers=arguments.workers or min(16, os.cpu_count() or 1),
            samples_per_shard=arguments.samples_per_shard,
            resize=arguments.resize or None,
            force=arguments.force,
        )
        for split in _chosen(arguments.splits, source.splits())
    ]
    for result in packed:
        say(describe(result))
    if any(result.rejected for result in packed):
        say(f"Each sample that was left out is listed in {out / manifest.REPORT}.")
    if all(result.remade == 0 for result in packed):
        say("Nothing to do: all of this was packed already. Use --force to pack it again.")
    else:
        say(f"Done in {time.monotonic() - began:.0f} s. Manifest: {out / manifest.MANIFEST}")


def describe(result: Packed) -> str:
    """One line on one split."""
    text = f"{result.split}: {result.samples} samples in {result.shards} shards, {result.bytes / 1e6:.1f} MB"
    if result.rejected:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in result.rejected.items())
        text += f"; left out {sum(result.rejected.values())} ({reasons})"
    return text


def run_verify(arguments: ShardArguments, say: Callable[[str], None] = print) -> None:
    """Read everything again; ValueError at the first thing that is wrong."""
    out = arguments.out_folder()
    for split in _chosen(arguments.splits, list(manifest.read_manifest(out)["splits"])):
        count = sum(1 for _ in verify(out, split))
        say(f"{split}: {count} samples read again, all whole.")
    say(f"{out} is good.")


def main() -> None:
    """Parse, run, and turn what a user can mend into one line."""
    parser = HfArgumentParser(
        ShardArguments,  # type: ignore[arg-type]
        description=__doc__,
        formatter_class=_Help,
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        (run_verify if arguments.verify else run_pack)(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last finished shard.")


if __name__ == "__main__":
    main()
