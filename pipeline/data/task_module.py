"""Loads a file that registers a task of one's own (--task_module FILE); what it may register: pipeline/tasks/."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def load_task_module(path: str) -> None:
    """Runs the file once per process. Raises ValueError if there is none; an error in the file is raised as it is."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"--task_module {path}: there is no such file")
    name = f"task_module_{file.stem}_{abs(hash(str(file)))}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--task_module {path} is no Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
