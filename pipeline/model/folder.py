"""A small model as a folder: config.json, the fields of its dataclass, beside model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_Config = TypeVar("_Config")
_Module = TypeVar("_Module", bound=nn.Module)


def save_folder(model: nn.Module, config: Any, folder: Path) -> None:
    """Writes a model's tensors and its config, a dataclass."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    save_file({k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}, folder / WEIGHTS)


def read_json(folder: Path, what: str) -> dict[str, Any]:
    """A folder's config.json. Raises ValueError if it is missing or no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{what}: {path} is missing. Give the folder that holds {CONFIG} and {WEIGHTS}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{what}: {path} is no JSON ({error}). Make the folder again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{what}: {path} must hold an object, found a {type(values).__name__}.")
    return values


def read_config(kind: type[_Config], folder: Path, what: str) -> _Config:
    """The dataclass `kind` of a folder's config.json, its lists as tuples; "decoder" there is the name of a class.

    Raises ValueError if the file is missing or names a field that the dataclass lacks.
    """
    values = read_json(folder, what)
    values.pop("decoder", None)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known):
        raise ValueError(
            f"{what}: {folder / CONFIG} names {', '.join(unknown)}; it may hold {', '.join(sorted(known))}. Is it the "
            "folder of another model?"
        )
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def load_weights(model: _Module, folder: Path, what: str) -> _Module:
    """Strictly loads a folder's tensors into a model, in evaluation mode and frozen; ValueError on any mismatch."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{what}: {path} is missing.")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what}: {path} is cut off or no safetensors file ({error}).") from error
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [k for k in wanted.keys() & found.keys() if wanted[k].shape != found[k].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{what}: {path} does not fit its {CONFIG}: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}."
        )
    model.load_state_dict(found)
    return model.eval().requires_grad_(False)
