"""Dataclasses as a command line: flags over a YAML file over a preset over defaults.

transformers' HfArgumentParser turns fields into flags; this module adds the layers below the flags, refuses unknown
keys and abbreviated flags, and gives YAML values their field's type (YAML reads `1e-4` as text).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

Preset = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def flag(default: Any, help: str, alias: str = "") -> Any:
    """A dataclass field that is a command line flag, with its help text (unit included) and a second name if wanted."""
    aliases = {"aliases": [alias]} if alias else {}
    return dataclasses.field(default=default, metadata={"help": help.replace("%", "%%"), **aliases})


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a setting such as "2,1,1"; () if it is anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return ()


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown where there are any, and the commands of a script's docstring kept on their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in ("", None) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Every rank parses the same command line: one message is enough. srun tells a rank in its own variable.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            self._print_message(f"{self.prog}: {message}\n(--help lists all flags)\n", None)
        raise SystemExit(2)


def coerce(name: str, hint: Any, value: Any) -> Any:
    """`value`, read from YAML, as the type `hint` of the field `name`. Raises ValueError if it is of another type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [kind for kind in get_args(hint) if kind is not type(None)]
        if value is None:
            return None
        return coerce(name, inner[0], value)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, found {value!r}")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is str and isinstance(value, bool):
        # YAML reads `bf16: true` as a boolean; fields of text that stand for a switch take it back as text.
        return str(value).lower()
    raise ValueError(f"{name} must be of type {getattr(hint, '__name__', hint)}, found {value!r}")


def read_yaml(path: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a YAML file, typed by `hints` (field name -> type). Raises ValueError naming file and key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is no valid YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"--config {path} must hold `flag: value` lines, found a {type(found).__name__}")
    for key in found:
        if key not in hints:
            raise ValueError(f"--config {path}: {_unknown(str(key), hints)}")
    try:
        return {key: coerce(key, hints[key], value) for key, value in found.items()}
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def _unknown(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name.lstrip("-"), list(known), n=1)
    return f"there is no setting `{name}`" + (f"; did you mean `{near[0]}`?" if near else "")


def parse(
    kinds: Sequence[type[Any]],
    *,
    argv: Sequence[str] | None = None,
    every_kind: Sequence[type[Any]] = (),
    preset: Preset | None = None,
    peek: Sequence[str] = ("preset", "config"),
    check: Callable[..., None] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass in `kinds`, read from `argv` (the process's own when None).

    every_kind: dataclasses whose keys a YAML file may hold besides, so that train and evaluate can share one.
    preset: from the settings named in `peek` (flag, else YAML, else default) to the values that lie below the YAML.
    check: called with the instances; its ValueError, as any from a `__post_init__`, ends the process with exit code 2.
    """
    wanted: list[Any] = list(kinds)
    parser = _Parser(
        wanted,
        allow_abbrev=False,
        description=description,
        usage="%(prog)s [--flag value ...]",
        formatter_class=_Help,
    )
    own = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    hints = {name: hint for kind in (*every_kind, *kinds) for name, hint in get_type_hints(kind).items()}

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in peek:
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    asked = vars(first.parse_known_args(argv)[0])
    try:
        settings = read_yaml(asked["config"], hints) if asked.get("config") else {}
        known = {name: asked[name] or settings.get(name) or getattr(own.get(name), "default", "") for name in peek}
        below = {**(preset(known) if preset else {}), **settings}
        parser.set_defaults(**{name: value for name, value in below.items() if name in own})
        *instances, rest = parser.parse_args_into_dataclasses(
            args=argv, look_for_args_file=False, return_remaining_strings=True
        )
        if rest:
            raise ValueError(_unknown(rest[0].split("=")[0], [f"--{name}" for name in own]))
        if check:
            check(*instances)
    except ValueError as error:
        parser.error(str(error))
    return tuple(instances)
