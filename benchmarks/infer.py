"""How fast a tuned model answers: first token, tokens per second, end to end by task, beside what the memory allows.

    python benchmarks/infer.py --checkpoint runs/quickstart                # real answers of a tuned model
    python benchmarks/infer.py --shape 7b --device cuda                    # LLaMA-2-7B's shape, random weights
    python benchmarks/infer.py --shape 13b --device cuda --tokens 64

The limit of a token at batch 1 is one reading of the LLM's weights: their bytes over the bandwidth that this device
reads a large buffer with, measured here. Random weights answer with --tokens tokens each; CLIP ViT-L/14 has
random weights too, and nothing is drawn. Prints a Markdown table; seconds are medians of --repeats after a warm-up.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation import BaseStreamer

from pipeline.assembly import parts
from pipeline.assembly.loading import Loaded, Trained
from pipeline.config import PRESETS, DataArguments, ModelArguments
from pipeline.data.tokens import TokenMap
from pipeline.inference import NeuralTuner
from pipeline.mini.source import MiniSource
from pipeline.model.initialise import initialise
from pipeline.model.vision import VisionTower

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


class Clock(BaseStreamer):
    """Notes when each token of a single answer is there."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self.sync, self.times = sync, []  # type: ignore[var-annotated]

    def put(self, value: Any) -> None:
        self.sync()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def shaped(shape: str, device: torch.device, layers: int) -> NeuralTuner:
    """A model of LLaMA-2's shape with random weights, bf16 on a GPU."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **sizes)
        llm = LlamaForCausalLM._from_config(config, dtype=dtype)
    model = ModelArguments(clip="ViT-L-14-quickgelu")
    clip = open_clip.create_model(model.clip, pretrained=None)
    vision = VisionTower(clip, open_clip.get_tokenizer(model.clip)).to(device)
    tuner = parts.make_tuner(model, llm, vision, seed=0).to(device)
    initialise(tuner, 0)
    token_map = TokenMap(AutoTokenizer.from_pretrained(PRESETS["mini"]["base"]), 32000, model.max_objects)
    collator = parts.make_collator(model, DataArguments(), token_map, vision, 0)
    trained = Trained(Path(f"random-{shape}"), model, DataArguments(), {})
    return NeuralTuner(Loaded(trained, tuner.eval(), vision, token_map, collator, None, device))


def bandwidth(size: int, device: torch.device, sync: Callable[[], None]) -> float:
    """Bytes per second at which a buffer of `size` bytes is read, the best of twenty readings.

    On a GPU the buffer takes half of the memory that is free at the most: the weights lie there too.
    """
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 2)
    buffer, best = torch.ones(max(size // 4, 1), device=device), float("inf")
    for _ in range(20):
        sync()
        start = time.perf_counter()
        buffer.sum()
        sync()
        best = min(best, time.perf_counter() - start)
    return buffer.numel() * 4 / best


def median(call: Callable[[], Any], repeats: int, sync: Callable[[], None]) -> float:
    """Seconds of a call, the median of `repeats` after one that does not count."""
    call()
    took = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        call()
        sync()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="", help="a tuned model; empty: that of this checkout")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--layers", type=int, default=0, help="with --shape: only so many layers, to try it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8, help="pairs answered together in the batched columns")
    parser.add_argument("--tokens", type=int, default=32, help="with --shape: tokens of every answer")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if args.shape:
        model = shaped(args.shape, device, args.layers)
        fixed = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
    else:
        model, fixed = NeuralTuner.from_pretrained(args.checkpoint, device=device), {"max_new_tokens": 64}

    samples = [MiniSource().load("test", i) for i in range(args.batch)]
    pictures, questions = [s.image for s in samples], [s.question for s in samples]
    phrases = [s.objects[0].phrases[0] if s.objects[0].phrases else "the object" for s in samples]
    weights = sum(p.numel() * p.element_size() for p in model.tuner.llm.parameters())
    embedding = model.tuner.llm.get_input_embeddings().base.weight
    # A token reads one row of the input embedding; all else is read whole.
    weights -= embedding.numel() * embedding.element_size()
    rate = bandwidth(weights, device, sync)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{model.loaded.trained.folder.name} on {name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"Weights read per token: {weights / 1e6:.1f} MB at {rate / 1e9:.1f} GB/s: {1e3 * weights / rate:.2f} ms,")
    print(f"that is {rate / weights:.0f} tokens/s at most at batch 1.\n")

    def ask(task: str, images: Any, texts: Any, **more: Any) -> Any:
        options = {**fixed, **more}
        return model.caption(images, **options) if task == "caption" else getattr(model, task)(images, texts, **options)

    def decode(task: str, text: str, **more: Any) -> tuple[float, float]:
        """(seconds to the first token, tokens per second after it) of one answer, medians."""
        firsts, rates = [], []
        for turn in range(args.repeats + 1):
            clock = Clock(sync)
            sync()
            start = time.perf_counter()
            ask(task, pictures[0], text, streamer=clock, **more)
            # The first call of a streamer brings the prompt.
            times = clock.times[1:]
            if turn and len(times) > 1:
                firsts.append(times[0] - start)
                rates.append((len(times) - 1) / (times[-1] - times[0]))
        return statistics.median(firsts), statistics.median(rates)

    print(f"| task | first token, ms | tokens/s | of the limit | a pair, ms | a pair in {args.batch}, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for task, texts in (("reason", questions), ("segment", phrases), ("caption", questions)):
        first, speed = decode(task, texts[0])
        one = median(lambda task=task, texts=texts: ask(task, pictures[0], texts[0]), args.repeats, sync)
        many = median(
            lambda task=task, texts=texts: ask(task, pictures, texts, batch_size=args.batch), args.repeats, sync
        )
        share = speed * weights / rate
        cells = f"{1e3 * first:.1f} | {speed:.0f} | {share:.0%} | {1e3 * one:.1f} | {1e3 * many / args.batch:.1f}"
        print(f"| {task} | {cells} |")
    if model.loaded.painter is not None:
        texts = [s.caption for s in samples]
        one = median(lambda: model.generate(texts[0], candidates=1), args.repeats, sync)
        best = median(lambda: model.generate(texts[0]), args.repeats, sync)
        for count, took in ((1, one), (model.loaded.painter.sampling.candidates, best)):
            print(f"| generate, best of {count} | | | | {1e3 * took:.1f} | |")

    count = args.batch
    print(f"\n| {count} questions about one picture | all, ms |\n|---|---:|")
    look = median(lambda: model.look(pictures[0]), args.repeats, sync)
    apart = median(lambda: [ask("reason", pictures[0], q) for q in questions], args.repeats, sync)
    batch = median(lambda: ask("reason", [pictures[0]] * count, questions, batch_size=count), args.repeats, sync)
    shared = median(lambda: ask("reason", pictures[0], questions, batch_size=count), args.repeats, sync)
    for what, took in (
        ("one after the other", apart),
        (f"in a batch, the picture seen {count} times", batch),
        ("in a batch, its features and prefix shared", shared),
        ("CLIP alone, once", look),
    ):
        print(f"| {what} | {1e3 * took:.1f} |")
    static = median(lambda: ask("reason", pictures[0], questions[0], cache_implementation="static"), args.repeats, sync)
    print(f"\nOne reasoning pair with transformers' static cache: {1e3 * static:.1f} ms.")


if __name__ == "__main__":
    main()
