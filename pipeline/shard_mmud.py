"""Pack a data set into WebDataset shards.

    python pipeline/shard_mmud.py
    python pipeline/shard_mmud.py --source mmud --mmud_root MMUD --image_root MMUD/MergedImages --out shards/mmud
    python pipeline/shard_mmud.py --source refcoco --refcoco_root refer/refcoco+ --image_root images/train2014
    python pipeline/shard_mmud.py --source coco --coco_root coco/annotations --image_root coco
    python pipeline/shard_mmud.py --source mmud --mmud_root MMUD --image_root MMUD/MergedImages --doctor
    python pipeline/shard_mmud.py --out shards/mmud --verify

The first line packs the mini world, which is drawn by code and needs no download. What comes out is described in
shards/FORMAT.md. --doctor packs nothing and says what is wrong with a source; it exits with 1 if anything would be left
out. Stop it whenever you like: the same command goes on where it was.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.data import doctor, manifest
from pipeline.data.coco import CocoSource
from pipeline.data.joining import parse_part
from pipeline.data.mmud import MmudSource
from pipeline.data.reader import verify
from pipeline.data.refcoco import RefcocoSource
from pipeline.data.writer import Packed, Source, pack
from pipeline.runtime import command_line
from pipeline.runtime.command_line import flag

_REPO = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class ShardArguments:
    """The flags of this script."""

    source: Literal["mini", "mmud", "refcoco", "coco"] = flag(
        "mini", "mini (drawn by code, no download), mmud, refcoco (any of RefCOCO, RefCOCO+, RefCOCOg, RefClef) or coco"
    )
    mmud_root: str = flag("", "folder with <split>.pkl or <split>_withlength.pkl")
    refcoco_root: str = flag("", "folder of one data set of RefCOCO's family: refs(<by>).p and instances.json")
    refcoco_by: str = flag("", "whose splits, as in refs(unc).p; empty: the only ones there are")
    coco_root: str = flag("", "folder with captions_*.json and instances_*.json, or with annotations/ of them")
    coco_year: str = flag("", "2014 or 2017; empty: the only one there is")
    image_root: str = flag("", "folder with the pictures; subfolders as in the pickles, or flat")
    clip_root: str = flag("", "folder with <picture>.pkl CLIP embeddings, if they are to be packed")
    clip_features: str = flag("", "open_clip model whose embeddings are packed: local-dir:PATH, or a name")
    clip_weights: str = flag("", "file with the weights of --clip_features, where that is a name")
    out: str = flag("", "folder for the shards (default: shards/<source>, or shards/<folder of --refcoco_root>)")
    splits: str = flag("", "splits to pack, with commas (default: all that the source has)")
    samples_per_shard: int = flag(1000, "samples in one tar file")
    workers: int = flag(0, "packing processes; 0: one per CPU core, at most 16")
    resize: int = flag(0, "shrink pictures to so many pixels on the shorter side; 0: keep the files as they are")
    part: str = flag("", "i/n: make every n-th shard from the i-th on, for SLURM arrays; the last part joins them")
    force: bool = flag(False, "pack again what is packed already")
    verify: bool = flag(False, "pack nothing; read what is packed again, every hash and every sample")
    doctor: bool = flag(False, "pack nothing; examine the source and write doctor.json into --out")
    longest_text: int = flag(180, "words above which --doctor calls a text too long")
    mini_train: int = flag(16_000, "training scenes of the mini world")
    mini_valid: int = flag(400, "validation scenes of the mini world")
    mini_test: int = flag(500, "test scenes of the mini world")
    mini_seed: int = flag(0, "seed that the mini world is drawn from")

    def out_folder(self) -> Path:
        """Where the shards go."""
        # RefCOCO, RefCOCO+ and RefCOCOg are one source but three data sets.
        name = Path(self.refcoco_root).resolve().name if self.source == "refcoco" else self.source
        return Path(self.out) if self.out else _REPO / "shards" / name


_FLAGS_OF = {
    "mini": (),
    "mmud": ("mmud_root", "image_root", "clip_root"),
    "refcoco": ("refcoco_root", "image_root", "refcoco_by"),
    "coco": ("coco_root", "image_root", "coco_year"),
}
"""The flags that a source takes; the first two it needs."""


def build_source(arguments: ShardArguments) -> Source:
    """The source that the flags name, with CLIP embeddings if they are asked for."""
    if not arguments.clip_features:
        return plain_source(arguments)
    if arguments.clip_root:
        raise ValueError("--clip_features and --clip_root both give embeddings: leave one of them out")
    from pipeline.assembly.embedding import EmbeddedSource

    return EmbeddedSource(plain_source(arguments), arguments.clip_features, arguments.clip_weights)


def plain_source(arguments: ShardArguments) -> Source:
    """The source that the flags name."""
    kind = arguments.source
    own = _FLAGS_OF[kind]
    if not all(getattr(arguments, name) for name in own[:2]):
        raise ValueError(f"--source {kind} needs --{own[0]} (the annotations) and --{own[1]} (the pictures)")
    for other, flags in _FLAGS_OF.items():
        if given := [name for name in flags if name not in own and getattr(arguments, name)]:
            raise ValueError(f"--{given[0]} goes with --source {other}: add it, or leave the flag out")
    root, image_root = (Path(getattr(arguments, name)) for name in own[:2]) if own else (Path(), Path())
    if kind == "mmud":
        return MmudSource(root, image_root, arguments.clip_root or None)
    if kind == "refcoco":
        return RefcocoSource(root, image_root, arguments.refcoco_by)
    if kind == "coco":
        return CocoSource(root, image_root, arguments.coco_year)
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
        say(f"Packing {arguments.source} from {getattr(arguments, _FLAGS_OF[arguments.source][0])} into {out}.")
    began = time.monotonic()
    packed = [
        pack(
            source,
            split,
            out,
            workers=_workers(arguments),
            samples_per_shard=arguments.samples_per_shard,
            resize=arguments.resize or None,
            part=parse_part(arguments.part),
            force=arguments.force,
        )
        for split in _chosen(arguments.splits, source.splits())
    ]
    for result in packed:
        say(describe(result))
    if any(result.rejected for result in packed):
        say(f"Each sample that was left out is listed in {out / manifest.REPORT}.")
    if waiting := sum(result.waiting for result in packed):
        say(f"Done in {time.monotonic() - began:.0f} s; other parts have {waiting} shards yet to make.")
    elif all(result.remade == 0 for result in packed):
        say("Nothing to do: all of this was packed already. Use --force to pack it again.")
    else:
        say(f"Done in {time.monotonic() - began:.0f} s. Manifest: {out / manifest.MANIFEST}")


def describe(result: Packed) -> str:
    """One line on one split."""
    text = f"{result.split}: {result.samples} samples in {result.shards} shards, {result.bytes / 1e6:.1f} MB"
    text += " (this part)" if result.waiting else ""
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


def run_doctor(arguments: ShardArguments, say: Callable[[str], None] = print) -> bool:
    """Examine the source, say what was found and write it down; whether packing would leave nothing out."""
    source = build_source(arguments)
    report = doctor.examine(
        source,
        _chosen(arguments.splits, source.splits()),
        workers=_workers(arguments),
        longest_text=arguments.longest_text,
    )
    path = manifest.new_folder(arguments.out_folder()) / doctor.REPORT
    manifest.write_json(path, report)
    say(doctor.describe(report))
    say(f"Report: {path}")
    return not doctor.has_faults(report)


def _workers(arguments: ShardArguments) -> int:
    return arguments.workers or min(16, os.cpu_count() or 1)


def main() -> int:
    """Parse, run, and turn what a user can mend into one line."""
    (arguments,) = command_line.parse([ShardArguments], peek=(), description=__doc__)
    try:
        if arguments.doctor:
            return 0 if run_doctor(arguments) else 1
        (run_verify if arguments.verify else run_pack)(arguments)
    except ValueError as error:
        print(f"shard_mmud.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last finished shard.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
