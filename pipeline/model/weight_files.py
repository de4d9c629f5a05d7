"""Whether the weight files of a model are there, whole, and all that it is made of, told from their headers: seconds
for 26 GB."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_POINTER = b"version https://git-lfs"


def check_whole(files: Iterable[Path]) -> None:
    """Opens the headers of these safetensors files.

    Raises:
        ValueError: a file is a Git LFS pointer, shorter than its header says, or no safetensors file.
    """
    for path in files:
        _refuse_pointer(path)
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut off or no safetensors file ({error}): fetch it again") from error


def check_folder(folder: str | Path) -> None:
    """Whether a Hugging Face folder holds its causal LM's weights. pytorch_model*.bin are not opened.

    Raises:
        ValueError: there are no weights, the index names files or tensors that are not there, or the files lack what
            config.json describes.
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
        return
    # A folder may hold the weights once more, in one file.
    named = sorted({folder / name for name in indexed.values()}) if indexed else files
    check_whole(named)
    held: dict[str, torch.Tensor] = {}
    for path in named:
        with safe_open(path, framework="pt") as file:
            own = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if lost := [tensor for tensor, name in indexed.items() if name == path.name and tensor not in own]:
            raise ValueError(f"{path} lacks tensors that the index names, such as {lost[0]}: fetch the model again")
        held |= {name: torch.empty(shape, device="meta") for name, shape in own.items()}
    _check_described(folder, held)


def _check_described(folder: Path, held: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if `held` (shapes, no values) lacks a tensor of the model that config.json describes."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        return  # Quantised weights are packed: their tensors are not those of the parameters.
    with torch.device("meta"):
        model = type(AutoModelForCausalLM.from_config(config))
    disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # transformers itself, which knows the names that older files have, loads the shapes alone.
        _, found = model.from_pretrained(
            None,
            config=config,
            state_dict=held,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(level)
    refuse_gaps(folder, found)


def refuse_gaps(folder: str | Path, found: Mapping[str, Any]) -> None:
    """Raises ValueError naming tensors that a model's files lack or hold in another shape.

    found: what from_pretrained returns with output_loading_info; transformers itself would draw such tensors at random
    and go on with a warning.
    """
    gaps = sorted(found["missing_keys"])
    gaps += [f"{name} ({[*there]} instead of {[*wanted]})" for name, there, wanted in sorted(found["mismatched_keys"])]
    if gaps:
        raise ValueError(
            f"{folder}: its files lack tensors that config.json describes, or hold them in another shape: "
            f"{_some(gaps)}; fetch the model again"
        )


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
