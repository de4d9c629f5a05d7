"""A short name for a base model's weights, cheap enough for 26 GB: a checkpoint is of use only beside its own base."""

from __future__ import annotations

import hashlib
from pathlib import Path

_EDGE = 1 << 20


def fingerprint(folder: str | Path) -> str:
    """sha256 over the weight files of a Hugging Face folder: names, sizes, and the first and last MiB of each.

    The first MiB holds a safetensors file's header (every tensor's name, type, shape and place). Reading the edges
    alone takes milliseconds where reading a 13B model takes minutes; another fine-tuning or revision shows in them.

    Raises:
        ValueError: the folder holds no weight files.
    """
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors (nor pytorch_model*.bin): give the folder of the base model")
    return _digest([(path, f"{path.name} {path.stat().st_size}\n") for path in files])


def _digest(files: list[tuple[Path, str]]) -> str:
    digest = hashlib.sha256()
    for path, head in files:
        size = path.stat().st_size
        digest.update(head.encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


def clip_fingerprint(model: str, weights: str = "") -> str:
    """The same for a CLIP: for the folder behind "local-dir:FOLDER", or for the name of a model with its weights file,
    whatever that file is called.

    Raises:
        ValueError: there is no such file or folder.
    """
    folder = Path(model.removeprefix("local-dir:"))
    found = sorted(folder.glob("open_clip_*")) if model.startswith("local-dir:") else [Path(weights)]
    if not found or not all(path.is_file() for path in found):
        raise ValueError(f"there are no CLIP weights at {weights or folder}: give --clip (and --clip_weights)")
    return _digest([(path, f"{path.stat().st_size}\n") for path in found])
