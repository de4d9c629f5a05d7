"""Memory of loading a 13B-shaped LLaMA in ZeRO-3's pieces: peak per rank, while it loads and with the engine made.

    python benchmarks/zero3_load.py                       # 1.1 GB on 2 CPU ranks; the model is made in --folder first
    python benchmarks/zero3_load.py --whole               # the same without loading in pieces, to compare

The model has LLaMA-2-13B's 40 layers and vocabulary at a fifth of its width, random weights, in bf16 safetensors of at
most 100 MB. Each rank reads its own RssAnon (memory that is its alone) and RssFile (pages of the files, mapped, which
the kernel takes back when it needs them) from /proc/self/status every 2 ms. malloc is told to map each weight by
itself, as it does of its own accord with weights of 13B's size (above 32 MB): the holes that small ones leave would
else be counted. Prints one JSON object; exit status 1 if a rank's RssAnon grew by more than its share of the base and
--constant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.model.initialise import initialise
from pipeline.runtime import engine as runtime
from pipeline.runtime.ds_config import OptimizerSettings, plan_batch, resolve
from pipeline.runtime.ranks import detect, free_port

_SETTINGS = {"DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "131072"}
FIELDS = ("RssAnon", "RssFile")


class Peak:
    """The most of each of FIELDS since the start, and what there was then, in bytes."""

    def __init__(self) -> None:
        self.start = self.now()
        self.most = dict(self.start)
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> dict[str, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(lines[name].split()[0]) * 1024 for name in FIELDS}

    def _watch(self) -> None:
        while True:
            for name, value in self.now().items():
                self.most[name] = max(self.most[name], value)
            time.sleep(0.002)

    def grown(self) -> dict[str, int]:
        return {name: self.most[name] - self.start[name] for name in FIELDS}


def make_base(folder: Path, width: int, layers: int) -> int:
    """Saves the model unless it is there; its bytes on disk."""
    if not (folder / "config.json").exists():
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=width * 27 // 10,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
        )
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Beside(torch.nn.Module):
    """A frozen LM with something to train, which an engine must have."""

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.llm = llm.requires_grad_(False)
        self.trained = torch.nn.Linear(8, 8)


def load(folder: Path, pieces: bool) -> dict[str, Any]:
    """Loads on this rank and makes an engine; what it took."""
    ranks = detect()
    runtime.start(ranks)
    settings = OptimizerSettings(lr=1e-3)
    raw = {"zero_optimization": {"stage": 3}}
    config = resolve(raw, plan=plan_batch(2, ranks.world_size), optimizer=settings, bf16=True, on_cpu=True)
    ranks.barrier()
    peak, began = Peak(), time.perf_counter()
    with runtime.loading_in_pieces(config if pieces else {"zero_optimization": {"stage": 0}}):
        model = Beside(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    loaded = peak.grown()
    initialise(model, 0, runtime.whole)
    runtime.Engine(model, [{"params": list(model.trained.parameters())}], config, ranks, optimizer=settings)
    facts = {
        "rank": ranks.rank,
        "seconds": round(time.perf_counter() - began, 1),
        "loading": loaded,
        "with_engine": peak.grown(),
        "kept": {name: value - peak.start[name] for name, value in peak.now().items()},
    }
    return {"ranks": ranks.gather(facts), "main": ranks.is_main}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/zero3_load/base"), help="of the model's files")
    parser.add_argument("--width", type=int, default=1024, help="hidden size, a multiple of 128 (13B: 5120)")
    parser.add_argument("--layers", type=int, default=40, help="layers (13B: 40)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--constant", type=float, default=0.25, help="GB that a rank may take above its share")
    parser.add_argument("--whole", action="store_true", help="load the model whole on each rank, as without ZeRO-3")
    args = parser.parse_args()
    if "RANK" in os.environ:
        facts = load(args.folder, not args.whole)
        if facts["main"]:
            (args.folder / "facts.json").write_text(json.dumps(facts["ranks"]))
        runtime.close()
        runtime.leave(0)
    size = make_base(args.folder, args.width, args.layers)
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(args.ranks)}
    jobs = []
    for rank in range(args.ranks):
        env = {**os.environ, **given, "RANK": str(rank), "LOCAL_RANK": str(rank), **_SETTINGS}
        jobs.append(subprocess.Popen([sys.executable, *sys.argv], env=env))
    codes = [job.wait() for job in jobs]
    if any(codes):
        return 1
    found = json.loads((args.folder / "facts.json").read_text())
    limit = size / args.ranks + args.constant * 1e9
    most = max(rank["with_engine"]["RssAnon"] for rank in found)
    print(json.dumps({"base_bytes": size, "limit": limit, "most_anon": most, "ranks": found}, indent=1))
    return int(most > limit)


if __name__ == "__main__":
    sys.exit(main())
