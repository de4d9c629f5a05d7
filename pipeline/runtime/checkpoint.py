"""Checkpoints that survive a kill at any moment and load on any number of ranks and under any ZeRO stage.

`checkpoint-<step>/` holds
    trained.safetensors     fp32 weights by module name (what inference needs)
    optimizer.safetensors   Adam's moments, "exp_avg/<name>" and "exp_avg_sq/<name>"
    state.json              step, schedule, how draws are keyed, reader, configuration, versions, commit, MLflow run
    manifest.json           bytes and sha256 of the three
It is written as `checkpoint-<step>.tmp/`, synced to disk, its manifest last, then renamed; only then are older ones
removed. A folder counts only if its manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.runtime import elastic
from pipeline.runtime.elastic import TrainedState
from pipeline.runtime.ranks import Ranks

if TYPE_CHECKING:
    # Inference reads checkpoints too and does without DeepSpeed, whose import takes seconds.
    from pipeline.runtime.engine import Engine

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS, MOMENTS, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
EXPORTED_WEIGHTS, EXPORTED_STATE = "model.safetensors", "config.json"
EXPORTED_TYPE = "neural_tuning"
"""`model_type` in an exported config.json, as Hugging Face's libraries name what a folder holds."""
# A checkpoint that one of the same step replaces bears `.old` for an instant; a kill there must not lose it.
_NAME = re.compile(r"checkpoint-(\d+)(\.old)?")
_RUN_FILES = (
    *("checkpoint-*", "metrics.jsonl", "bad_steps.jsonl", "run.json", "git.diff", "mlflow*", "mlartifacts"),
    *("artifacts", "DONE", "REQUEUE", "system_metrics.jsonl", "outbox.jsonl", "registered"),
)
_log = logging.getLogger(__name__)


def load_checkpoint(engine: Engine, path: str | Path) -> dict[str, Any]:
    """Weights, moments, schedule and counters out of a checkpoint; its state.json's content. Collective.

    Raises ValueError if it is not whole or does not fit the model.
    """
    # One rank reads everything to verify it; the others would only load the file system.
    problems = engine.ranks.from_main(verify(path) if engine.ranks.is_main else [])
    if problems:
        raise ValueError(f"{path} is no whole checkpoint: {'; '.join(problems)}")
    state = read_state(path)
    moments = Path(path) / MOMENTS
    tensors = TrainedState(
        weights=load_file(Path(path) / WEIGHTS), moments=load_file(moments) if moments.exists() else {}
    )
    updates = state["step"] - state.get("bad_steps", {}).get("total", 0)
    elastic.scatter(engine, tensors, step=state["step"], updates=updates)
    return state


def load_trained(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """The trained weights into a model without DeepSpeed, on any device; returns state.json's content.

    Raises ValueError if the checkpoint is not whole or does not fit the model.
    """
    if problems := verify(path):
        raise ValueError(f"{path} is no whole checkpoint: {'; '.join(problems)}")
    try:
        weights = load_file(Path(path) / names_in(path)[0])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole checkpoint: its weights cannot be read ({error})") from error
    elastic.load_into(model, weights)
    return read_state(path)


def is_exported(path: str | Path) -> bool:
    """Whether a folder is what pipeline/export.py writes."""
    try:
        found = json.loads((Path(path) / EXPORTED_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type") == EXPORTED_TYPE


def names_in(path: str | Path) -> tuple[str, str]:
    """Names of the weights and of the facts in a checkpoint or an exported folder."""
    return (EXPORTED_WEIGHTS, EXPORTED_STATE) if is_exported(path) else (WEIGHTS, STATE)


def read_state(path: str | Path) -> dict[str, Any]:
    """state.json of a checkpoint, config.json of an exported one.

    Raises ValueError if there is none, if it is of another format, or lacks what every checkpoint has.
    """
    name = names_in(path)[1]
    try:
        state = json.loads((Path(path) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint: {name} cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint: {name} must be a JSON object, found {type(state).__name__}")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    if type(state.get("step")) is not int:
        raise ValueError(f"{path} is no whole checkpoint: {name} lacks its step; take another checkpoint of the run")
    return state


def write(final: Path, tensors: TrainedState, facts: Mapping[str, Any]) -> int:
    """Writes one checkpoint folder; `final` appears only once it is whole. For one process alone.

    Returns its bytes. Raises what the file system raises; what was half written is then removed again.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob("checkpoint-*.tmp"):
        shutil.rmtree(stale)
    part = final.with_name(final.name + ".tmp")
    part.mkdir()
    try:
        save_file(tensors.weights, part / WEIGHTS, metadata={"format": "pt"})
        if tensors.moments:
            save_file(tensors.moments, part / MOMENTS, metadata={"format": "pt"})
        (part / STATE).write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
        return seal(part, final, facts["step"])
    except Exception:
        # On a full disk, the space that is missing.
        shutil.rmtree(part, ignore_errors=True)
        raise


def seal(part: Path, final: Path, step: int) -> int:
    """Makes the files of `part` lasting: a manifest beside them, all synced to disk, the folder renamed to `final`.

    Returns their bytes.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(part.iterdir())}
    for name in files:
        _sync(part / name)
    manifest = part / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(part)
    size = sum(path.stat().st_size for path in part.iterdir())
    old = final.with_name(final.name + ".old")
    if final.exists():
        _discard(old)
        os.replace(final, old)
    os.replace(part, final)
    _sync(final.parent)
    _discard(old)
    return size


def _discard(path: Path) -> None:
    """Removes a checkpoint, if it is there. From the first moment on it bears the name of an unfinished one: a job that
    is killed half-way leaves nothing that looks like a checkpoint, and the next save clears it away."""
    if path.exists():
        gone = path.with_name(path.name + ".tmp")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def verify(path: str | Path, *, contents: bool = True) -> list[str]:
    """What is wrong with a checkpoint folder, in words; nothing if it is whole. Without `contents` sizes must do."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    problems = [f"{name} is not in the manifest" for name in names_in(path) if name not in files]
    for name, fact in files.items():
        part = path / name
        if Path(name).name != name or not part.is_file():
            problems.append(f"{name} is missing")
        elif part.stat().st_size != fact["bytes"]:
            problems.append(f"{name} has {part.stat().st_size} bytes instead of {fact['bytes']}")
        elif contents and _sha256(part) != fact["sha256"]:
            problems.append(f"{name} has another sha256 than when it was written")
    return problems


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that bear a checkpoint's name, whole or not, newest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    # At the same step the plain name sorts before its `.old`.
    ordered = sorted((-int(match[1]), path.name, path) for match, path in found if match)
    return [(-step, path) for step, _, path in ordered]


def find_latest(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, or None; broken ones are passed over with a warning."""
    for _, path in list_checkpoints(output_dir):
        problems = verify(path)
        if not problems:
            return path
        _log.warning("%s is not whole and is passed over: %s", path, "; ".join(problems))
    return None


def find_resume(resume: str, output_dir: str | Path) -> Path | None:
    """What `--resume` means: auto, never, or a folder. Raises ValueError if the folder holds no whole checkpoint."""
    if resume == "never":
        return None
    if resume == "auto":
        return find_latest(output_dir)
    path = Path(resume)
    found = path if (path / MANIFEST).exists() else find_latest(path)
    if found is None:
        raise ValueError(f"--resume {resume}: there is no whole checkpoint")
    return found


def agree_on_resume(resume: str, output_dir: str | Path, ranks: Ranks) -> Path | None:
    """What rank 0 finds by `find_resume`, for all ranks; each must see the same folder. Collective.

    Raises ValueError on every rank: what find_resume raises, or which ranks see another folder than rank 0 does, as
    where it lies on a disk of one node. They would go on from different steps.
    """
    found: Path | None = None
    manifest = problem = ""
    # Of an explicit --resume the run's own folder says nothing.
    newest = next((step for step, _ in list_checkpoints(output_dir)), -1) if resume == "auto" else -1
    if ranks.is_main:
        try:
            found = find_resume(resume, output_dir)
            manifest = (found / MANIFEST).read_text(encoding="utf-8") if found else ""
        except ValueError as error:
            problem = str(error)
    found, manifest, problem, main_newest = ranks.from_main((found, manifest, problem, newest))
    if problem:
        raise ValueError(problem)
    mine = _seen_otherwise(found, manifest) if found else ""
    # File systems take a while to show what another node has removed: a rank may see older checkpoints besides.
    if not mine and newest > main_newest:
        mine = f"{Path(output_dir).absolute()} holds checkpoint-{newest} here, which rank 0 does not see"
    ranks.agree(mine and f"{mine}. {_SHARE}")
    return found


_SHARE = (
    "Give an --output_dir (and --resume) on a file system that all nodes share, or --resume never to start anew; the "
    "ranks would go on from different steps"
)


def _seen_otherwise(found: Path, manifest: str) -> str:
    """How this rank's view of the checkpoint that rank 0 has found differs; "" if it does not."""
    if problems := verify(found, contents=False):
        return f"{found.absolute()}, which rank 0 goes on from, is not whole here ({'; '.join(problems)})"
    if (found / MANIFEST).read_text(encoding="utf-8") != manifest:
        return f"{found.absolute()}, which rank 0 goes on from, is another checkpoint here"
    return ""


def prune(output_dir: str | Path, *, keep: int, newest: Path) -> None:
    """Removes all but the `keep` newest checkpoints up to `newest`, which is whole; 0 keeps all. Broken ones go too."""
    if keep < 1:
        return
    step = int(newest.name.removeprefix("checkpoint-"))
    older = [path for number, path in list_checkpoints(output_dir) if number < step]
    kept = 1
    for path in older:
        # Bytes alone are checked here: reading back every older checkpoint at each save would cost more than saving.
        if kept < keep and (path / MANIFEST).exists():
            kept += 1
        else:
            _discard(path)


def set_aside(output_dir: str | Path) -> Path | None:
    """Moves an earlier run's files into `earlier-<n>/` within the folder, for a run that starts anew there."""
    root = Path(output_dir)
    own = sorted(path for pattern in _RUN_FILES for path in root.glob(pattern))
    if not own:
        return None
    number = 1 + max((int(path.name[8:]) for path in root.glob("earlier-*") if path.name[8:].isdigit()), default=0)
    target = root / f"earlier-{number}"
    target.mkdir()
    for path in own:
        os.replace(path, target / path.name)
    return target


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: saved -> now` for each leaf that differs between two nested mappings."""
    lines: list[str] = []
    for key in sorted(set(saved) | set(now)):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b)
        elif a != b:
            lines.append(f"{key}: {a!r} -> {b!r}")
    return lines


def check_reader(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError if the sample order that a checkpoint was trained on is another than today's."""
    if lines := differences(saved, json.loads(json.dumps(now))):
        raise ValueError(
            f"the checkpoint was trained on another order of samples ({'; '.join(lines)}): go on with the same data, "
            "seed, tasks and global batch, or start anew with --resume never"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
