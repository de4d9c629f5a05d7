"""Whether the weight files of a model are there and whole, told from their headers: seconds for 26 GB."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_POINTER = b"version https://git-lfs"


def check_whole(files: Iterable[Path]) -> int:
    """The number of elements in all tensors of these safetensors files.

    Raises:
        ValueError: a file is a Git LFS pointer, shorter than its header says, or no safetensors file.
    """
    elements = 0
    for path in files:
        _refuse_pointer(path)
        try:
            with safe_open(path, framework="pt") as file:
                elements += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut off or no safetensors file ({error}): fetch it again") from error
    return elements


def check_folder(folder: str | Path) -> int | None:
    """The number of elements in a Hugging Face folder's weights; None for pytorch_model*.bin, which are not opened.

    Raises:
        ValueError: there are none, or the index names files or tensors that are not there.
    """
    folder = Path(folder)
    indexed = _index(folder)
    files = sorted(folder.glob("*.safetensors"))
    if missing := sorted({name for name in indexed.values() if not (folder / name).is_file()}):
        raise ValueError(f"{folder}: the index names {_some(missing)}, not in the folder: fetch the model again")
    if not files:
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        if not pickled:
            raise ValueError(f"{folder} holds no *.safetensors (nor pytorch_model*.bin): fetch the model's weights")
        for path in pickled:
            _refuse_pointer(path)
        return None
    # A folder may hold the weights once more, in one file.
    named = sorted({folder / name for name in indexed.values()}) if indexed else files
    elements = check_whole(named)
    for path in named if indexed else ():
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
        if lost := [tensor for tensor, name in indexed.items() if name == path.name and tensor not in held]:
            raise ValueError(f"{path} lacks tensors that the index names, such as {lost[0]}: fetch the model again")
    return elements


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, of the folder's index; {} if it has none."""
    for name in _INDEXES:
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
                return {str(tensor): str(file) for tensor, file in found.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no index of weights ({error}): fetch it again") from error
    return {}


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
