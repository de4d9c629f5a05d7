"""Sampling of an image prior's codes with its KV cache, and without one: seconds, and whether the codes are the same.

    python benchmarks/sampling.py                                   # the mini prior: 64 codes of a picture
    python benchmarks/sampling.py --prior models/prior --batch 4    # another one

One line per way, the least of some repetitions: on a CPU processor seconds, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from pipeline.model.prior import ImagePrior

REPO = Path(__file__).resolve().parent.parent
TOP_K, TOP_P = 100, 0.95


def sample_without_cache(prior: ImagePrior, embedding_BE: Tensor, seed: int) -> Tensor:
    """Codes [B,N] by a forward over all codes so far for each new one, with the draws of `ImagePrior.sample`."""
    torch.manual_seed(seed)
    codes_BN = torch.zeros(len(embedding_BE), 0, dtype=torch.long, device=embedding_BE.device)
    warpers = TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)
    for _ in range(prior.config.n_tokens):
        # The last code is the one to be predicted: the prior does not look at it.
        asked_BN = torch.cat([codes_BN, codes_BN.new_zeros(len(codes_BN), 1)], dim=1)
        with torch.no_grad():
            logits_BV = prior(embedding_BE, asked_BN)[:, -1]
        for warper in warpers:
            logits_BV = warper(codes_BN, logits_BV)
        codes_BN = torch.cat([codes_BN, torch.multinomial(logits_BV.softmax(-1), 1)], dim=1)
    return codes_BN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, default=REPO / "models/mini/prior", help="folder of the prior")
    parser.add_argument("--batch", type=int, default=32, help="pictures drawn together")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, of which the fastest counts")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = ImagePrior.load(args.prior).to(device)
    config = prior.config
    embedding = torch.randn(args.batch, config.embed_dim, generator=torch.Generator().manual_seed(0)).to(device)
    print(f"{config.layers} layers x {config.width}, {args.batch} pictures of {config.n_tokens} codes, {device.type}")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    ways = {
        "with": lambda: prior.sample(embedding, top_k=TOP_K, top_p=TOP_P, seed=0),
        "without": lambda: sample_without_cache(prior, embedding, seed=0),
    }
    seconds, codes = {}, {}
    for name, draw in ways.items():
        times = []
        for _ in range(args.repeat):
            start = clock()
            codes[name] = draw().cpu()
            times.append(clock() - start)
        seconds[name] = min(times)
        print(f"{name} the cache: {seconds[name]:.3f} s")
    same = "the same" if torch.equal(codes["with"], codes["without"]) else "NOT the same"
    print(f"{seconds['without'] / seconds['with']:.1f} times as fast with it; the codes are {same}")


if __name__ == "__main__":
    main()
