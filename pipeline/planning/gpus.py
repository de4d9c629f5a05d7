"""The GPUs that plans are made for: figures of their makers' data sheets, and the share of them that is assumed.

Every figure is per GPU. Data sheets, all by NVIDIA: "A100 Tensor Core GPU" (2021), "Ada GPU architecture" (2023, RTX
4090), "H100 Tensor Core GPU" (2023), "H200 Tensor Core GPU" (2024). Matrix rates are dense, without sparsity; rates of
links are of one direction, half of what the sheets print.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU in the machine it usually stands in."""

    name: str
    device_names: tuple[str, ...]
    """What torch.cuda.get_device_name holds, for a lookup by device."""
    memory_gib: float
    """As nvidia-smi prints it: what CUDA can hand out, its own context included."""
    flops: float
    """Dense bf16 matrix FLOP/s with fp32 sums."""
    fp32_flops: float
    """FLOP/s of fp32 products outside the tensor cores: PyTorch's default for fp32."""
    memory_rate: float
    """Bytes/s of the GPU's own memory."""
    peer_rate: float
    """Bytes/s to another GPU of the node, one direction."""
    host_rate: float
    """Bytes/s to the CPU's memory, one direction."""
    node_rate: float
    """Bytes/s of the node's network, one direction, all its GPUs together; 0 for one without."""
    per_node: int
    """GPUs in a node."""

    @property
    def memory(self) -> float:
        """Bytes of memory."""
        return self.memory_gib * 2**30


_GB, _TB, _T = 1e9, 1e12, 1e12
_A100: dict[str, Any] = {
    "flops": 312 * _T,
    "fp32_flops": 19.5 * _T,
    "peer_rate": 300 * _GB,  # NVLink 3, 600 GB/s in both directions
    "host_rate": 32 * _GB,  # PCIe 4.0 x16
    "node_rate": 100 * _GB,  # DGX A100: eight ports of 100 Gbit/s at the least, as cloud nodes have them too
    "per_node": 8,
}
_HOPPER: dict[str, Any] = {
    "flops": 989.4 * _T,
    "fp32_flops": 67 * _T,
    "peer_rate": 450 * _GB,  # NVLink 4, 900 GB/s in both directions
    "host_rate": 64 * _GB,  # PCIe 5.0 x16
    "node_rate": 400 * _GB,  # DGX H100: eight ports of 400 Gbit/s
    "per_node": 8,
}
_KINDS = (
    Gpu(
        name="A100-40",
        device_names=("A100-SXM4-40GB", "A100-PCIE-40GB"),
        memory_gib=40.0,
        memory_rate=1.555 * _TB,
        **_A100,
    ),
    Gpu(name="A100-80", device_names=("A100-SXM4-80GB", "A100"), memory_gib=80.0, memory_rate=2.039 * _TB, **_A100),
    Gpu(
        name="4090",
        device_names=("4090",),
        memory_gib=24.0,
        flops=165.2 * _T,  # half of the rate with fp16 sums, as the architecture paper lists it
        fp32_flops=82.6 * _T,
        memory_rate=1.008 * _TB,
        # No NVLink, and the driver allows no copies between GPUs: two crossings of PCIe 4.0 x16 by way of the CPU.
        peer_rate=16 * _GB,
        host_rate=32 * _GB,
        node_rate=1.25 * _GB,  # not in a data sheet: one port of 10 Gbit/s, as workstation boards have
        per_node=4,
    ),
    Gpu(
        name="H100-PCIe",
        device_names=("H100 PCIe",),
        memory_gib=79.6,
        memory_rate=2.0 * _TB,
        **{**_HOPPER, "flops": 756 * _T, "fp32_flops": 51 * _T, "peer_rate": 64 * _GB},
    ),
    Gpu(name="H100", device_names=("H100",), memory_gib=79.6, memory_rate=3.35 * _TB, **_HOPPER),
    Gpu(name="H200", device_names=("H200",), memory_gib=140.4, memory_rate=4.8 * _TB, **_HOPPER),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _KINDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What is assumed of how near real programs come to a data sheet. None of it has been measured here.

    A plan's seconds stand or fall with these; its parameters, FLOPs and bytes do not depend on them.
    """

    matrix: float = 0.60
    """Share of `Gpu.flops` (or fp32_flops) in large matrix products."""
    memory: float = 0.80
    """Share of `Gpu.memory_rate` in operations that only move data."""
    link: float = 0.70
    """Share of a link's rate in large collectives."""
    overlap: float = 0.80
    """Share of the computing time under which communication of gradients and ZeRO-3 weights can hide."""
    latency: float = 2e-5
    """Seconds that one collective takes however small it is, per doubling of the ranks."""
    launch: float = 4e-6
    """Seconds that an operation takes at the least (PyTorch's dispatch and the kernel's start)."""
    reserve_gib: float = 1.5
    """Memory that is no tensor of ours: CUDA's context, cuBLAS's and NCCL's buffers."""
    fragmentation: float = 0.05
    """Share of the GPU's memory that the allocator holds and cannot use."""
    host_adam: float = 5e8
    """Elements per second and rank that DeepSpeed's CPU Adam steps."""


ASSUMED = Efficiency()


def named(name: str) -> Gpu:
    """The GPU kind of this name. Raises ValueError listing the names there are."""
    if name not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}, found {name!r}")
    return GPUS[name]


def of_device(device_name: str) -> Gpu | None:
    """The kind whose name torch.cuda.get_device_name's answer holds, or None."""
    return next((gpu for gpu in _KINDS if any(part in device_name for part in gpu.device_names)), None)
