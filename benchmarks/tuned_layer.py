"""What tuning costs: forward and backward of a frozen LLaMA-2-7B-shaped layer, with and without its sparse network.

    python benchmarks/tuned_layer.py                                  # on a GPU; the kernels, then plain PyTorch
    python benchmarks/tuned_layer.py --batch 12 --tokens 367 --layers 4
    python benchmarks/tuned_layer.py --smoke                          # toy size, on any machine

Random weights; what is timed does not depend on them. Both models get a gradient for their input, as a layer in the
middle of the LM does; the tuned one for Wz and Wb besides. Times are per layer: median, p20 and p80 of whole passes
through --layers layers, divided by their number. Nothing is written: put what a GPU says into the README by hand, with
GPU, date and commit.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.model.backbone import tune_layers
from pipeline.model.sparse import SparseNetwork
from sparse_kernels.timing import Timing, measure


def model(layers: int, hidden: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """`layers` frozen decoder layers `hidden` wide, heads and MLP in LLaMA-2-7B's proportions."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 128, 1),
    )
    return LlamaForCausalLM(config).to(device, dtype).requires_grad_(False).train()


def tuned(base: LlamaForCausalLM, z_dim: int) -> LlamaForCausalLM:
    """A copy of `base` with a sparse network beside each layer, Wb filled so that nothing is zero."""
    llm = copy.deepcopy(base)
    weight = next(base.parameters())

    def make(index: int, width: int, out_features: dict[str, int]) -> SparseNetwork:
        network = SparseNetwork(width, z_dim, out_features, layer_index=index).to(weight.device, weight.dtype)
        torch.nn.init.normal_(network.wb, std=0.02)
        return network

    tune_layers(llm, first_layer=0, projections="qv", make_network=make)
    return llm


def per_layer(llm: LlamaForCausalLM, h: torch.Tensor, layers: int, smoke: bool) -> Timing:
    """Milliseconds of forward and backward, for one layer."""
    trained = [parameter for parameter in llm.model.layers.parameters() if parameter.requires_grad]
    grad = torch.randn_like(h)

    def both() -> object:
        out = llm.model(inputs_embeds=h, use_cache=False).last_hidden_state
        return torch.autograd.grad(out, [h, *trained], grad)

    timing = measure(both, h.device, runs=3 if smoke else 30, warm_up=1 if smoke else 5)
    return Timing(timing.median / layers, timing.p20 / layers, timing.p80 / layers)


def main() -> None:
    """Times the frozen model, then the tuned one on each implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=12, help="rows (default: 12, the paper's)")
    parser.add_argument("--tokens", type=int, default=367, help="tokens per row (default: 257 of the image + 110)")
    parser.add_argument("--layers", type=int, default=4, help="layers that share the start-up cost (default: 4)")
    parser.add_argument("--hidden", type=int, default=4096, help="width (default: 4096, LLaMA-2-7B's)")
    parser.add_argument("--z_dim", type=int, default=128, help="width of the sparse vector (default: 128)")
    parser.add_argument("--smoke", action="store_true", help="toy size, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.batch, options.tokens, options.layers, options.hidden = 1, 5, 2, 256
    cuda = torch.cuda.is_available()
    if not cuda and not options.smoke:
        parser.error("no CUDA device: the figures would say nothing (--smoke runs a toy size)")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    base = model(options.layers, options.hidden, device, dtype)
    llm = tuned(base, options.z_dim)
    h = torch.randn(options.batch, options.tokens, options.hidden, device=device, dtype=dtype, requires_grad=True)
    print(torch.cuda.get_device_name() if cuda else "CPU", f"torch {torch.__version__}", list(h.shape), dtype)
    frozen = per_layer(base, h, options.layers, options.smoke)
    print(f"frozen            {frozen.median:9.4f} ms  p20 {frozen.p20:.4f}  p80 {frozen.p80:.4f}")
    for path in ("triton", "reference") if cuda else ("reference",):
        os.environ["SPARSE_KERNELS"] = path
        found = per_layer(llm, h, options.layers, options.smoke)
        more = 100.0 * (found.median / frozen.median - 1.0)
        print(f"tuned, {path:9s}  {found.median:9.4f} ms  p20 {found.p20:.4f}  p80 {found.p80:.4f}  +{more:.1f} %")


if __name__ == "__main__":
    main()
