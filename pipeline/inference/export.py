"""The tuned part of a checkpoint as a folder to publish, in the manner of Hugging Face's `save_pretrained`.

    model.safetensors   the trained tensors by module name, fp32 (those of the checkpoint, bit by bit)
    config.json         settings of model and prompts without any path, fingerprints of the base model and the CLIP
    README.md           model card: licence, base model, how to load, scores of the run's evaluation, versions
    manifest.json       bytes and sha256 of the three

The frozen models are not in it. It is written beside and renamed, so that a folder is whole or not there. No model is
loaded for it. `NeuralTuner.from_pretrained(folder, base=...)` and every script's --checkpoint read it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from pipeline.runtime.checkpoint import (
    EXPORTED_STATE,
    EXPORTED_TYPE,
    EXPORTED_WEIGHTS,
    FORMAT,
    is_exported,
    names_in,
    read_state,
    seal,
    verify,
)

PATHS = ("base", "clip_weights", "vqgan", "prior", "config", "data", "output_dir", "deepspeed")
"""Settings that are of the machine that trained."""
_PROMPTS = ("tasks", "max_length", "referring_objects")
CARD = "README.md"


def save_pretrained(checkpoint: str | PathLike[str], folder: str | PathLike[str], *, license: str = "other") -> Path:
    """Exports a checkpoint folder to `folder`, which an earlier export may hold already; returns it.

    Args:
        license: of the trained part, as Hugging Face's model cards name licences.

    Raises:
        ValueError: the checkpoint is not whole, or `folder` holds something that is no export.
    """
    source, target = Path(checkpoint), Path(folder)
    if problems := verify(source):
        raise ValueError(f"{source} is no whole checkpoint: {'; '.join(problems)}")
    if target.exists() and not is_exported(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is no earlier export: give another folder")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the export itself: give another folder")
    state = read_state(source)
    config = state if is_exported(source) else exported_config(state)
    part = target.with_name(target.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shutil.copyfile(source / names_in(source)[0], part / EXPORTED_WEIGHTS)
    (part / EXPORTED_STATE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    card = model_card(config, _scores(source), name=target.name, license=license)
    (part / CARD).write_text(card, encoding="utf-8")
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    seal(part, target, int(state["step"]))
    return target


def exported_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: what loading and judging the trained part takes, out of a checkpoint's state.json."""
    config = state["config"]
    model = {name: value for name, value in config["ModelArguments"].items() if name not in PATHS}
    if str(model.get("clip", "")).startswith("local-dir:"):
        # A folder of that machine.
        del model["clip"]
    return {
        "model_type": EXPORTED_TYPE,
        "format": FORMAT,
        "step": state["step"],
        "config": {
            "ModelArguments": model,
            "DataArguments": {name: v for name, v in config["DataArguments"].items() if name in _PROMPTS},
            "TrainArguments": {"seed": config["TrainArguments"]["seed"]},
        },
        "base": {"name": Path(state["base"].get("path", "")).name, "fingerprint": state["base"]["fingerprint"]},
        **{name: state[name] for name in ("clip", "task_tokens", "parameters", "versions") if name in state},
        "commit": (state.get("git") or {}).get("commit"),
    }


def _scores(checkpoint: Path) -> dict[str, Any]:
    """The run's report.json if it is of this checkpoint; an exported folder keeps none."""
    path = checkpoint.parent / "report.json"
    if not path.is_file():
        return {}
    report = json.loads(path.read_text(encoding="utf-8"))
    scored = Path(str(report.get("run", {}).get("checkpoint", "")))
    return report if scored.name == checkpoint.name else {}


def model_card(config: Mapping[str, Any], report: Mapping[str, Any], *, name: str, license: str) -> str:
    """README.md: front matter, what the folder is, how to load it, scores of the evaluation, what it was made with."""
    model, base = config["config"]["ModelArguments"], config["base"]
    parameters = config.get("parameters") or {}
    lines = [
        "---",
        f"license: {license}",
        f"base_model: {base['name']}",
        "library_name: neural-tuning",
        "tags: [neural-tuning, reasoning-segmentation, referring-segmentation, image-captioning, text-to-image]",
        "---",
        f"# {name}",
        "",
        "The trained part of a Neural Tuning model (arXiv 2408.03001): sparse networks beside a frozen LLM, new",
        "tokens, image projector, mask decoder, CLIP head. The frozen models are not in it; their licences apply.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | `{base['name']}`, fingerprint `{base['fingerprint']}` |",
        f"| CLIP | `{model.get('clip', 'a folder')}`, fingerprint `{(config.get('clip') or {}).get('fingerprint')}` |",
        f"| mechanism | {model.get('mechanism')}: alpha {model.get('alpha')}, beta {model.get('beta')}, "
        f"Z {model.get('z_dim')}, tuned {model.get('projections')} |",
        f"| trained parameters | {parameters.get('trained', 0):,} of {parameters.get('all', 0):,} |",
        f"| optimizer steps | {config['step']:,} |",
        f"| commit | `{config.get('commit')}` |",
        "",
        "```python",
        "from pipeline.inference import NeuralTuner",
        "",
        f'model = NeuralTuner.from_pretrained("{name}", base="BASE", clip="CLIP", vqgan="VQGAN", prior="PRIOR")',
        'print(model.reason("picture.jpg", "...").text)',
        "```",
        "",
        "Another base model or CLIP than the above is refused. `vqgan` and `prior` are needed to draw pictures only;",
        "models of the mini preset find all four in the repository.",
        "",
        "## Scores",
        "",
        *_score_lines(report),
    ]
    return "\n".join(lines) + "\n"


def _counts(samples: Any) -> str:
    """How many samples of each task were scored."""
    if isinstance(samples, Mapping):
        return ", ".join(f"{count:,} of {task}" for task, count in samples.items())
    return f"{samples} samples"


def _score_lines(report: Mapping[str, Any]) -> list[str]:
    """The conditions side by side, a score to a line; a sentence where there was no evaluation."""
    if not report:
        return ["This checkpoint has not been evaluated; `python pipeline/evaluate_mmud.py --condition all` does it."]
    conditions = [c for c in ("tuned", "untuned", "shuffled") if any(v is not None for v in report.get(c, {}).values())]
    run = report["run"]
    lines = [
        f"Split {run.get('split')} ({_counts(run.get('samples'))}), {run.get('protocol')} decoding, commit "
        f"`{run.get('commit')}`.",
        "",
        "| score | " + " | ".join(conditions) + " |",
        "|---|" + "---:|" * len(conditions),
    ]
    for score in report["tuned"]:
        values = [report[condition].get(score) for condition in conditions]
        if any(value is not None for value in values):
            lines.append(f"| {score} | " + " | ".join("–" if v is None else f"{v:.4g}" for v in values) + " |")
    return lines
