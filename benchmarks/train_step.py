"""Speed of the training step beside its peers, at MMUD's lengths, on random weights.

    python benchmarks/train_step.py                                       # --size cpu, a LLaMA of 134M parameters
    python benchmarks/train_step.py --size small                          # of 106M
    python benchmarks/train_step.py --size 7b --csv benchmarks/results.csv    # one 80 GB GPU, bf16
    python benchmarks/train_step.py --size 7b --liger --compile_layers    # and two lines more

One step is forward, backward and AdamW on --samples samples of benchmarks/mmud_lengths.json: 257 image tokens and the
texts, masks and pictures of all four tasks. CLIP's features are given to all alike and not timed. The steps:

    LoRA, plain        PEFT's LoRA of the same trained size on q and v, the usual way: padded, logits of all tokens
    released, plain    the authors' recipe: padded to the longest, logits of all tokens, kthvalue (on a GPU our kernel
                       in its place), sparse networks in the upper half of the layers, embedding and head trained
    neural, plain      neural tuning in that way, and then with one ingredient more in each line:
    + labels only      logits of labelled tokens only; no mask where causality is enough
    + packed           all samples in one row, attention under a mask (--attn sdpa)
    + by sample        attention sample by sample (--attn sdpa_varlen): what train.py --packing true does
    LoRA, our step     the first with all of the ingredients
    + liger, + compiled    "+ by sample" with train.py's --liger, --compile_layers

All share one frozen LLaMA, but for the tables that `released` trains. What is trained has the frozen weights' dtype, as
under train.py's ZeRO-2: in bf16 with fp32 copies that AdamW steps, in all lines alike. Rounds go through all steps in
turn, so that other work on the machine hits all alike; CPU seconds are of this process.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from pipeline.assembly import parts, speedups
from pipeline.assembly.training import flops_per_token
from pipeline.config import ModelArguments, TrainArguments
from pipeline.data.batch import IGNORE, Batch, VisionFeatures
from pipeline.data.rows import lay_out
from pipeline.model import losses
from pipeline.model.attention import SDPA_VARLEN
from pipeline.model.backbone import CHECKPOINTED
from pipeline.model.initialise import initialise
from pipeline.model.losses import Norms
from pipeline.model.tuner import NeuralTuner
from pipeline.runtime.provenance import git_state, package_versions
from pipeline.runtime.throughput import peak_flops

LENGTHS = Path(__file__).with_name("mmud_lengths.json")
IMAGE_TOKENS = 257
CLIP = SimpleNamespace(width=1024, grid=16, taps=(7, 15, 23), embed_dim=768, patch_size=14)
"""ViT-L/14 at 224 pixels."""
SIZES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "cpu": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def make_batch(samples: list[dict[str, Any]], tuner: NeuralTuner, budget: int | None) -> Batch:
    """Random words in the samples' lengths, with image slots and task tokens where training has them."""
    draw = torch.Generator().manual_seed(0)
    sequences, at, masks, pictures = [], [], [], []
    for sample in samples:
        n, length = sample["prompt"], sample["prompt"] + sample["answer"]
        ids = torch.randint(3, tuner.first_object, (length,), generator=draw)
        if sample["task"] != "generation":
            ids[1 : 1 + IMAGE_TOKENS] = tuner.image_id
        else:
            ids[n] = tuner.first_object + tuner.max_objects
        ids[n : n + sample["masks"]] = tuner.first_object + torch.arange(sample["masks"])
        sequences.append(ids.tolist())
    layout = lay_out(sequences, pad_id=0, budget=budget)
    labels = torch.full_like(layout.input_ids, IGNORE)
    for sample, (row, start) in zip(samples, layout.starts, strict=True):
        answer = start + sample["prompt"]
        at = list(range(answer, answer + sample["answer"]))
        labels[row, at] = layout.input_ids[row, at]
        masks += [(row, place) for place in at[: sample["masks"]]]
        pictures += [(row, answer)] if sample["task"] == "generation" else []
    where = [torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1) for pairs in (masks, pictures)]
    side = tuner.mask_decoder.mask_size
    return Batch(
        keys=[str(i) for i in range(len(samples))],
        tasks=[sample["task"] for sample in samples],
        input_ids=layout.input_ids,
        segment_ids=layout.segment_ids,
        position_ids=layout.position_ids,
        labels=labels,
        pixel_values=torch.zeros(len(samples), 3, 1, 1),
        mask_rows=where[0][0],
        mask_positions=where[0][1],
        masks=(torch.rand(len(masks), side, side, generator=draw) > 0.8).float(),
        gen_rows=where[1][0],
        gen_positions=where[1][1],
    )


def make_features(samples: int) -> VisionFeatures:
    """Random features of that many pictures, fp32."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(len(CLIP.taps) + 1, samples, CLIP.grid**2 + 1, CLIP.width, generator=draw)
    embedding = torch.randn(samples, CLIP.embed_dim, generator=draw)
    return VisionFeatures(tokens=tokens[0], taps=tuple(tokens[1:]), embedding=embedding)


def plain_loss(tuner: NeuralTuner, batch: Batch, features: VisionFeatures, norms: Norms) -> Tensor:
    """The loss of `tuner`, with the LM called as Hugging Face's own forward goes: mask of padding, logits of all."""
    embeds = tuner._embed(batch.input_ids, features, batch.segment_ids)
    hidden = tuner.llm.model(
        inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    logits = tuner.llm.get_output_embeddings()(hidden)
    ce = tuner.llm.loss_function(logits, batch.labels, logits.shape[-1], num_items_in_batch=norms.tokens)
    masks = tuner._masks(features, batch.mask_rows, hidden[batch.mask_rows, batch.mask_positions - 1])
    drawn = tuner.clip_head(hidden[batch.gen_rows, batch.gen_positions - 1])
    dice = losses.dice_losses(masks, batch.masks).sum()
    mse = losses.picture_losses(drawn, features.embedding[batch.gen_rows]).sum()
    return ce + losses.share(dice, norms.masks) + 10.0 * losses.share(mse, norms.pictures)


def our_loss(tuner: NeuralTuner, batch: Batch, features: VisionFeatures, norms: Norms) -> Tensor:
    """What train.py calls."""
    return tuner(batch, features, norms)[0]


@dataclass
class Step:
    """One line of the table: a model and how it is stepped, and what was measured so far."""

    name: str
    model: str
    loss: Callable[[NeuralTuner, Batch, VisionFeatures, Norms], Tensor]
    budget: int | None = None
    attn: str = "sdpa"
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: int = 0
    peak: int = 0


STEPS = (
    ("LoRA, plain", "lora", plain_loss),
    ("released, plain", "released", plain_loss),
    ("neural, plain", "neural", plain_loss),
    ("+ labels only", "neural", our_loss),
    ("+ packed", "neural", our_loss, 0),
    ("+ by sample", "neural", our_loss, 0, SDPA_VARLEN),
    ("LoRA, our step", "lora", our_loss, 0, SDPA_VARLEN),
    ("+ liger", "neural liger", our_loss, 0, SDPA_VARLEN),
    ("+ compiled", "neural compiled", our_loss, 0, SDPA_VARLEN),
)


def make_llm(size: dict[str, int], device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A LLaMA of random weights."""
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(LlamaConfig(vocab_size=32000, **size), dtype=dtype)


def twin(llm: LlamaForCausalLM, own_tables: bool) -> LlamaForCausalLM:
    """Other modules around the same weights; own_tables: embedding and head, which are trained, are copied."""
    tables = {id(llm.model.embed_tokens.weight), id(llm.lm_head.weight)} if own_tables else set()
    return copy.deepcopy(llm, {id(p): p for p in llm.parameters() if id(p) not in tables})


class MasterAdamW:
    """AdamW with ZeRO-2's rule for bf16: it steps fp32 copies of the parameters; fp32 ones it steps themselves."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        # fp32 gives the parameter's own memory.
        self.masters = [parameter.detach().float() for parameter in parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=1e-4)

    def step(self) -> None:
        """One step; the gradients are gone afterwards."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.adam.step()
        self.adam.zero_grad()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.data_ptr() != master.data_ptr():
                parameter.data.copy_(master)

    def bytes(self) -> int:
        """Of the copies and Adam's moments."""
        copies = [m for p, m in zip(self.parameters, self.masters, strict=True) if p.data_ptr() != m.data_ptr()]
        moments = [tensor for state in self.adam.state.values() for tensor in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in copies + moments)


class Model:
    """A tuned LLaMA of random weights with its optimizer."""

    def __init__(self, kind: str, frozen: LlamaForCausalLM, recompute: str) -> None:
        """kind: "neural", also with " liger" or " compiled" behind it, "lora" or "released"."""
        what, _, speedup = kind.partition(" ")
        settings: dict[str, Any] = {
            "neural": {},
            "lora": {"tuner": "lora"},
            "released": {"mechanism": "released", "first_tuned_layer": frozen.config.num_hidden_layers // 2},
        }[what]
        asked = TrainArguments(liger=speedup == "liger", compile_layers=speedup == "compiled")
        llm = twin(frozen, own_tables=what == "released")
        plain_rope = modeling_llama.apply_rotary_pos_emb
        speedups.patch(llm, asked)
        # Liger's RoPE takes the place of all LLaMAs': it is put there for this model's steps alone.
        self.rope, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, plain_rope
        arguments = ModelArguments(base="random", clip="random", **settings)
        self.tuner = parts.make_tuner(arguments, llm, CLIP, seed=0, gradient_checkpointing=recompute)  # type: ignore[arg-type]
        initialise(self.tuner, 0)
        self.tuner.to(frozen.device).train()
        trained = list(self.tuner.trained_parameters().values())
        for parameter in trained:
            # Parameters alone, as DeepSpeed does it: buffers such as RoPE's frequencies stay in fp32.
            parameter.data = parameter.data.to(frozen.dtype)
        speedups.compiled(llm, asked)
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = MasterAdamW(trained)

    def step(self, step: Step, batch: Batch, features: VisionFeatures) -> None:
        """Forward, backward, AdamW; adds to the step's figures."""
        device = batch.input_ids.device
        cuda = device.type == "cuda"
        self.tuner.llm.set_attn_implementation(step.attn)
        modeling_llama.apply_rotary_pos_emb = self.rope
        counts = batch.counts()
        norms = Norms(tokens=counts.tokens, masks=counts.masks, pictures=counts.pictures)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if cuda else 0
        wall, cpu = time.perf_counter(), time.process_time()
        step.loss(self.tuner, batch, features, norms).backward()
        self.optimizer.step()
        if cuda:
            torch.cuda.synchronize()
            # Of this model alone: the others of the run are held too.
            own = sum(p.numel() * p.element_size() for p in self.tuner.parameters())
            step.peak = max(step.peak, torch.cuda.max_memory_allocated() - held + own + self.optimizer.bytes())
        step.wall.append(time.perf_counter() - wall)
        step.cpu.append(time.process_time() - cpu)
        step.tokens += int(batch.attention_mask.sum())


def run(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Step], dict[str, Model]]:
    """All rounds of all steps, after two on one and two samples that do not count."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kinds = ["neural", "lora", "released"]
    kinds += ["neural liger"] * arguments.liger + ["neural compiled"] * arguments.compile_layers
    chosen = [step for step in (Step(*fields) for fields in STEPS) if step.model in kinds]  # type: ignore[arg-type]
    frozen = make_llm(SIZES[arguments.size], device, dtype)
    models = {kind: Model(kind, frozen, arguments.gradient_checkpointing) for kind in kinds}
    lengths = json.loads(LENGTHS.read_text())["samples"]
    features = make_features(arguments.samples).to(device)
    for step in chosen:
        model = models[step.model]
        # Two lengths: torch.compile makes its graph for any number of tokens when it sees the second.
        for few in (1, 2):
            model.step(step, make_batch(lengths[:few], model.tuner, step.budget).to(device), features)
        step.wall, step.cpu, step.tokens = [], [], 0
    for number in range(arguments.rounds):
        first = number * arguments.samples % (len(lengths) - arguments.samples + 1)
        samples = lengths[first : first + arguments.samples]
        for step in chosen:
            model = models[step.model]
            model.step(step, make_batch(samples, model.tuner, step.budget).to(device), features)
            print(f"round {number + 1}  {step.name:16s} {step.wall[-1]:8.2f} s, CPU {step.cpu[-1]:8.2f} s", flush=True)
    return chosen, models


def figures(step: Step, model: Model, samples: int, device: torch.device) -> dict[str, float]:
    """What goes into the table and the CSV."""
    wall, rounds = sum(step.wall), len(step.wall)
    found = {
        "samples_per_s": samples * rounds / wall,
        "tokens_per_s": step.tokens / wall,
        "cpu_s_per_sample": sum(step.cpu) / (samples * rounds),
        "trained_parameters": model.trained,
    }
    if device.type == "cuda":
        found["peak_gib"] = step.peak / 2**30
        if peak := peak_flops(device):
            found["mfu"] = step.tokens * flops_per_token(model.tuner) / wall / peak
    return found


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown; beside the figures, how many times the samples per second of the two peers each step makes."""
    names = list(next(iter(results.values())))
    peers = ("LoRA, plain", "released, plain")
    heads = ["step", *names, *(f"samples/s, {peer} = 1" for peer in peers)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, found in results.items():
        cells = [f"{value:,.0f}" if value > 1000 else f"{value:.3g}" for value in found.values()]
        cells += [f"{found['samples_per_s'] / results[peer]['samples_per_s']:.2f}" for peer in peers]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def where(device: torch.device, threads: int) -> str:
    """The machine, versions and commit, for a row of the CSV."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        machine = f"{named or platform.machine()}, {threads} of {os.cpu_count()} cores"
    versions = package_versions()
    versions["peft"] = importlib.metadata.version("peft")
    shown = " ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return f"{machine}; {shown}; commit {(git_state(Path(__file__).parent)['commit'] or 'unknown')[:8]}"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=SIZES, default="cpu", help="the LLaMA (default: cpu, 134M parameters; small: 106M)"
    )
    parser.add_argument("--samples", type=int, default=12, help="samples per step (default: 12, the paper's)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each kind that count (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--gradient_checkpointing",
        choices=("none", *CHECKPOINTED),
        default="none",
        help="recomputed, in all steps alike",
    )
    parser.add_argument("--liger", action="store_true", help="a line with Liger's kernels (a GPU)")
    parser.add_argument("--compile_layers", action="store_true", help="a line with compiled norms and MLPs")
    parser.add_argument("--csv", default="", help="file that the results are appended to")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and arguments.size in ("7b", "13b")
    if not cuda and arguments.size in ("7b", "13b"):
        parser.error(f"--size {arguments.size} needs a GPU; without one take --size cpu")
    asked = TrainArguments(liger=arguments.liger)
    try:
        speedups.check(asked, device_type="cuda" if cuda else "cpu", stage=2, quant="none", model_type="llama")
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if cuda else "cpu")
    steps, models = run(arguments, device)
    results = {step.name: figures(step, models[step.model], arguments.samples, device) for step in steps}
    print(f"\n{arguments.size}, {arguments.samples} samples a step, {where(device, arguments.threads)}\n")
    print(table(results))
    if arguments.csv:
        append_csv(Path(arguments.csv), f"train_step {arguments.size}", results, where(device, arguments.threads))


def append_csv(path: Path, benchmark: str, results: dict[str, dict[str, float]], place: str) -> None:
    """One line per figure: date, benchmark, case, metric, value, where."""
    new = not path.exists()
    today = datetime.date.today().isoformat()
    with path.open("a", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        if new:
            lines.writerow(["date", "benchmark", "case", "metric", "value", "where"])
        for name, found in results.items():
            lines.writerows([today, benchmark, name, metric, f"{value:.5g}", place] for metric, value in found.items())


if __name__ == "__main__":
    main()
