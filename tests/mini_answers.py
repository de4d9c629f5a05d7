"""A checkpoint of the mini preset that took no training, and a way to make its model say what a test wants."""

import hashlib
import os
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from pipeline.assembly import parts
from pipeline.assembly.running import with_absolute_paths
from pipeline.config import PRESETS, DataArguments, ModelArguments, TrainArguments, to_dict
from pipeline.inference import NeuralTuner
from pipeline.mini.source import MiniSource
from pipeline.model.fingerprint import clip_fingerprint, fingerprint
from pipeline.model.initialise import initialise
from pipeline.runtime.checkpoint import write
from pipeline.runtime.elastic import TrainedState, saved_buffers

TWO = "it is the large red circle <OBJ-1>, and a small star <OBJ-2>."
ANSWERS = {"reasoning": TWO, "referring": "the red circle <OBJ-1>.", "caption": "a red circle.", "generation": "<GEN>"}


def mini_checkpoint(run: Path, **settings) -> Path:
    """`run`/checkpoint-3: the preset's settings, random weights wherever an untrained tuner has zeros."""
    values = PRESETS["mini"] | settings
    model, data, train = (
        kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
        for kind in (ModelArguments, DataArguments, TrainArguments)
    )
    vision = parts.load_vision(model, torch.device("cpu"))
    tuner = parts.make_tuner(model, parts.load_llm(model, torch.float32), vision, seed=0)
    initialise(tuner, 0)
    generator = torch.Generator().manual_seed(5)
    for network in tuner.networks:
        torch.nn.init.normal_(network.wb, std=0.02, generator=generator)
    weights = {name: tensor.detach().clone() for name, tensor in tuner.trained_parameters().items()}
    facts = {
        "format": 1,
        "step": 3,
        "config": with_absolute_paths(to_dict(model, data, train)),
        "base": {"path": model.base, "fingerprint": fingerprint(model.base)},
        "clip": {"fingerprint": clip_fingerprint(model.clip, model.clip_weights)},
    }
    folder = run / "checkpoint-3"
    write(folder, TrainedState(weights=weights | saved_buffers(tuner)), facts)
    return folder


def scene(i: int) -> bytes:
    """The picture of a scene that no model was tuned on, as a file."""
    return MiniSource().load("test", i).image


@contextmanager
def saying(model: NeuralTuner, answers: dict[str, str] = ANSWERS, *, masks: bool = True):
    """The model writes `answers` by task name, whatever it is asked. masks: <OBJ-k> is the k-th quarter from the left,
    and not what the mask decoder makes of it."""
    tuner, said = model.tuner, {"ids": [], "step": 0}
    inner = tuner.generate

    def generate(prompts, *args, **options):
        said["ids"] = [*model.token_map.encode(answers[prompts.tasks[0]]), model.token_map.eos_id]
        said["step"] = 0
        return inner(prompts, *args, **options)

    def rewrite(module, inputs, logits):
        # Two dimensions: not a step of decoding but the chances of task tokens.
        if logits.dim() == 3:
            logits = torch.full_like(logits, -1e9)
            logits[:, -1, said["ids"][min(said["step"], len(said["ids"]) - 1)]] = 0.0
            said["step"] += 1
        return logits

    def quarters(module, inputs, logits):
        wide = logits.shape[-1] // 4
        out = torch.full_like(logits, -5.0)
        for k in range(len(out)):
            out[k, :, wide * (k % 4) : wide * (k % 4 + 1)] = 5.0
        return out

    handles = [tuner.llm.get_output_embeddings().register_forward_hook(rewrite)]
    if masks:
        handles.append(tuner.mask_decoder.register_forward_hook(quarters))
    tuner.generate = generate
    try:
        yield model
    finally:
        del tuner.generate
        for handle in handles:
            handle.remove()


def digest(checkpoint: str) -> str:
    """sha256 over everything that a checkpoint's model answers: words, mask logits, embeddings, drawn pictures."""
    model, found = NeuralTuner.from_pretrained(checkpoint), hashlib.sha256()
    pictures = [scene(0), scene(1), scene(2)]
    free = model.caption(pictures, max_new_tokens=12)
    found.update("|".join(answer.tagged for answer in free).encode())
    with saying(model, masks=False):
        kept = []
        handle = model.tuner.mask_decoder.register_forward_hook(lambda _, inputs, out: kept.append(out))
        model.reason(pictures, "Which object is highest?")
        handle.remove()
        found.update(torch.cat(kept).numpy().tobytes())
        for data in model.generate("a red circle", n=2).pictures:
            found.update(data)
    return found.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(digest(sys.argv[1]))
