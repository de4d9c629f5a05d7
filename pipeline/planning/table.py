"""A plan's report as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe(report: Mapping[str, Any], command: str) -> str:
    """Lines for people, of what plan.py's --json holds."""
    parameters, memory = report["parameters_by_part"], report["memory_gib"]
    flags, traffic = report["flags"], report["bytes_per_step"]
    trained = {name: number for name, number in parameters.items() if name not in ("base", "clip")}
    lines = [
        f"{flags['preset']} on {report['gpus']} x {report['gpu']}, {flags['deepspeed']}, "
        f"micro-batch {flags['micro_batch']} of {flags['global_batch']}, "
        f"checkpointing {flags['gradient_checkpointing']}, base {flags['base_quant']}",
        "",
        f"parameters     {report['parameters']:,}, of which trained {sum(trained.values()):,} "
        f"({report['trainable_share']:.2%}; the sparse network is {report['sparse_share']:.2%} of the LM)",
        *(f"  {name:<12} {number:>15,}" for name, number in parameters.items()),
        f"TMAC per pair  {report['tmac_per_pair']:.2f} (one forward of the LM, picture and text)",
        "",
        f"memory per GPU {memory['total']:.1f} GiB of {report['usable_gib']:.1f} usable: "
        + ("fits" if report["fits"] else "DOES NOT FIT"),
        *(f"  {name:<16} {size:>8.2f}" for name, size in memory.items() if name not in ("total", "host")),
        *([f"  in CPU memory    {memory['host']:>8.2f} per GPU"] if memory["host"] else []),
        "",
        f"between ranks  {traffic['ranks'] / 1e9:.3f} GB sent per rank and step"
        + (f", {traffic['host'] / 1e9:.3f} GB to and from the CPU" if traffic["host"] else ""),
        f"predicted step {report['step_seconds']:.3f} s; most of it {report['bottleneck']}; MFU {report['mfu']:.0%}",
        *(f"  {name:<16} {s:>8.3f} s" for name, s in report["step_seconds_by_part"].items() if s >= 5e-4),
        f"predicted run  {report['hours']:.1f} h for {report['steps']:,} steps",
        "",
        "Times are predictions from data sheets and assumed efficiencies; no GPU has checked them.",
        f"Run it with: {command} --base ... --clip_weights ... --data ...",
    ]
    return "\n".join(lines)
