"""What infer.py is asked to do: one picture, a folder of them, or a JSONL file, as a list of requests.

A JSONL line is {"image": path, "text": ..., "task": reason|segment|caption|generate, "id": ...}; `task` and `text`
default to the command line's, `id` to the line's number, and image paths are relative to the file. Everything is read
and checked before a model loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.brief import brief

TASKS = ("reason", "segment", "caption", "generate")
SUFFIXES = (".jpg", ".jpeg", ".png")
_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Request:
    """id: names the answer's files, so it is letters, digits, "_", "-" and "." alone. image: None for `generate`."""

    id: str
    task: str
    image: Path | None
    text: str


def read_requests(*, task: str, image: str, text: str, input: str) -> list[Request]:
    """The requests that the flags ask for. Raises ValueError naming the flag or the file and line."""
    if bool(input) == bool(image or text):
        raise ValueError("give either --input FILE.jsonl, or --image and --text (--text alone for --task generate)")
    if input:
        requests = _from_jsonl(Path(input), task, text)
    elif task == "generate":
        requests = [_checked("0", task, None, text, "--text")]
    else:
        if not image:
            raise ValueError(f"--task {task} is about a picture: give --image")
        source = Path(image)
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES) if source.is_dir() else []
        if source.is_dir() and not files:
            raise ValueError(f"--image {source} holds no picture ({', '.join(SUFFIXES)})")
        if not source.is_dir() and not source.is_file():
            raise ValueError(f"--image {source}: there is no such file or folder")
        names = _names(files or [source])
        requests = [_checked(name, task, path, text, "--text") for name, path in names.items()]
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise ValueError(
                f"--input {input}: two requests have the id {request.id!r}, which names the files of an answer: give "
                "each its own (a line without an id has its number)"
            )
        seen.add(request.id)
    return requests


def _names(files: list[Path]) -> dict[str, Path]:
    """Each file's name as an id (a.jpg and a.png stay apart), with a number where letters that are left out tell two
    apart."""
    found: dict[str, Path] = {}
    for file in files:
        name = base = re.sub(r"[^\w.-]", "_", file.name, flags=re.ASCII)[:90]
        again = 1
        while name in found:
            again += 1
            name = f"{base}-{again}"
        found[name] = file
    return found


def _checked(identity: str, task: str, image: Path | None, text: Any, where: str) -> Request:
    if task not in TASKS:
        raise ValueError(f"{where}: task must be one of {', '.join(TASKS)}, found {brief(task)}")
    if not isinstance(text, str) or (task != "caption" and not text.strip()):
        raise ValueError(f"{where}: --task {task} needs a text, found {brief(text)}")
    if not _ID.fullmatch(identity) or set(identity) == {"."}:
        raise ValueError(f"{where}: an id is letters, digits, '_', '-' and '.', found {brief(identity)}")
    return Request(identity, task, None if task == "generate" else image, text)


def _from_jsonl(path: Path, task: str, text: str) -> list[Request]:
    try:
        # Not splitlines, which also parts at characters that JSON allows within a text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input {path} cannot be read: {error}") from error
    found = list(_parsed(path, lines, task, text))
    if not found:
        raise ValueError(f"--input {path} holds no requests")
    return found


def _parsed(path: Path, lines: Iterable[str], task: str, text: str) -> Iterable[Request]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--input {path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {brief(str(error))}") from error
        if not isinstance(row, dict) or set(row) - {"id", "task", "image", "text"}:
            raise ValueError(f'{where} must be an object with some of "id", "task", "image" and "text"')
        asked = row.get("task", task)
        image = row.get("image")
        if asked != "generate" and not isinstance(image, str):
            raise ValueError(f"{where}: image must be a path, found {brief(image)}")
        file = path.parent / image if isinstance(image, str) else None
        yield _checked(str(row.get("id", number)), asked, file, row.get("text", text), where)
