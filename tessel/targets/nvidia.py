"""NVIDIA GPUs. Peak rates are dense (no 2:4 sparsity).

A source that ends in "unconfirmed" was written from memory; confirm it before you lean on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from .target import Level, Limits, MatrixInstruction, Target

__all__ = ["NVIDIA"]

KIB, MIB, GB = 2**10, 2**20, 10**9

# KiB of shared memory and warps an SM, by architecture; a block gets 1 KiB less, which the driver keeps.
_SM = {"sm_80": (164, 64), "sm_89": (100, 48), "sm_90": (228, 64), "sm_100": (228, 64)}
_SM_SOURCE = "NVIDIA CCCL, cuda/__device/arch_traits.h, {arch}"

_MMA_SYNC = MatrixInstruction(
    "mma.sync", 16, 8, 32, 1, 1.0, False, "PTX ISA, mma.sync: m16n8 and 32 bytes of k (k16 for 16-bit types)"
)
_MATRIX = {
    "sm_80": (_MMA_SYNC,),
    "sm_89": (_MMA_SYNC,),
    "sm_90": (
        MatrixInstruction(
            "wgmma", 64, 256, 32, 4, 1.0, True, "PTX ISA, wgmma.mma_async: m64nNk16 for 16-bit types, N up to 256"
        ),
        MatrixInstruction(
            "mma.sync", 16, 8, 32, 1, 0.62, False, "PTX ISA; rate: Luo et al., arXiv 2501.12084 (62% of peak on Hopper)"
        ),
    ),
    "sm_100": (
        MatrixInstruction(
            "tcgen05", 128, 256, 32, 1, 1.0, True, "PTX ISA, tcgen05.mma, one CTA: m128, N up to 256, one thread issues"
        ),
        MatrixInstruction("mma.sync", 16, 8, 32, 1, 0.5, False, "PTX ISA; rate: assumed, as little as half of tcgen05"),
    ),
}


def _nvidia(
    name: str,
    arch: str,
    *,
    units: tuple[int, str],
    clock_hz: tuple[float, str],
    l2_bytes: tuple[int, str],
    memory: tuple[int, str],
    memory_bandwidth: tuple[float, str],
    flops: Mapping[str, float],
    flops_source: str | Mapping[str, str],
    link: tuple[float, str],
    device_names: tuple[str, ...],
    reached: Mapping[str, tuple[float, str]] | None = None,
    tensor_memory: tuple[int, str] | None = None,
) -> Target:
    """A record from numbers paired with their sources; what follows from the architecture is filled in."""
    shared_kib, warps = _SM[arch]
    arch_source = _SM_SOURCE.format(arch=arch)
    limits = Limits(
        shared_bytes_per_block=(shared_kib - 1) * KIB,
        shared_bytes_per_unit=shared_kib * KIB,
        registers_per_unit=64 * KIB,
        registers_per_thread=255,
        warps_per_unit=warps,
        threads_per_block=1024,
        warp_size=32,
    )
    levels = [Level("registers", 256 * KIB, None, "unit")]
    unknown = "unknown: no trustworthy source; measure it"
    sources = {
        "units": units[1],
        "clock_hz": clock_hz[1],
        "levels.registers.capacity_bytes": f"64 Ki registers of 4 bytes; {arch_source}",
        "levels.registers.bandwidth_bytes_per_s": unknown,
        "levels.shared.capacity_bytes": arch_source,
        "levels.shared.bandwidth_bytes_per_s": "derived: 128 bytes a clock an SM (32 banks of 4 bytes, CUDA "
        "programming guide) × SMs × clock",
        "levels.l2.capacity_bytes": l2_bytes[1],
        "levels.l2.bandwidth_bytes_per_s": unknown,
        "levels.memory.capacity_bytes": memory[1],
        "levels.memory.bandwidth_bytes_per_s": memory_bandwidth[1],
        "link_bytes_per_s": link[1],
    }
    if tensor_memory is not None:
        levels.append(Level("tensor", tensor_memory[0], None, "unit"))
        sources["levels.tensor.capacity_bytes"] = tensor_memory[1]
        sources["levels.tensor.bandwidth_bytes_per_s"] = unknown
    levels += [
        Level("shared", shared_kib * KIB, 128.0 * units[0] * clock_hz[0], "unit"),
        Level("l2", l2_bytes[0], None, "device"),
        Level("memory", memory[0], memory_bandwidth[0], "device"),
    ]
    for dtype in flops:
        sources[f"flops.{dtype}"] = flops_source if isinstance(flops_source, str) else flops_source[dtype]
    sources.update({f"limits.{f.name}": arch_source for f in fields(Limits)})
    sources.update({f"reached.{what}": source for what, (_, source) in (reached or {}).items()})
    return Target(
        name=name,
        vendor="nvidia",
        arch=arch,
        units=units[0],
        clock_hz=clock_hz[0],
        levels=tuple(levels),
        flops=dict(flops),
        limits=limits,
        link_bytes_per_s=link[0],
        gpu_target=("cuda", int(arch.removeprefix("sm_")), 32),
        sources=sources,
        device_names=device_names,
        reached={what: value for what, (value, _) in (reached or {}).items()},
        matrix=_MATRIX[arch],
    )


_HOPPER_FLOPS = {
    "f64": 66.9e12,
    "f32": 66.9e12,
    "tf32": 494.7e12,
    "f16": 989.4e12,
    "bf16": 989.4e12,
    "f8": 1978.9e12,
    "i8": 1978.9e12,
}
_HOPPER_CLOCK = (1.83e9, "derived: 989.4 TFLOP/s ÷ (132 SMs × 4096 operations a clock)")
_HOPPER_LINK = (450e9, "NVIDIA data sheet: NVLink 4, 900 GB/s both directions")
_ADA_L2 = "NVIDIA Ada architecture: {mib} MiB (the full die has 98,304 KiB); unconfirmed for this part"
_PCIE4 = (32e9, "NVIDIA data sheet: PCIe 4 x16, 64 GB/s both directions; no NVLink")
_PUBLISHED = "published large GEMM, torch.matmul or better; unconfirmed"

A100 = _nvidia(
    "a100",
    "sm_80",
    units=(108, "NVIDIA A100 data sheet and deviceQuery"),
    clock_hz=(1.41e9, "deviceQuery: maximum clock"),
    l2_bytes=(40 * MIB, "deviceQuery: 41,943,040 bytes"),
    memory=(80 * GB, "NVIDIA A100 80 GB SXM data sheet"),
    memory_bandwidth=(2.039e12, "NVIDIA A100 80 GB SXM data sheet: 2,039 GB/s"),
    flops={"f64": 19.5e12, "f32": 19.5e12, "tf32": 156e12, "f16": 312e12, "bf16": 312e12, "i8": 624e12},
    flops_source="NVIDIA A100 data sheet, dense",
    link=(300e9, "NVIDIA A100 data sheet: NVLink 3, 600 GB/s both directions"),
    device_names=("A100",),
    reached={"bf16": (271e12, _PUBLISHED)},
)

H100 = _nvidia(
    "h100",
    "sm_90",
    units=(132, "NVIDIA H100 white paper, SXM5"),
    clock_hz=_HOPPER_CLOCK,
    l2_bytes=(50 * MIB, "NVIDIA H100 white paper"),
    memory=(80 * GB, "NVIDIA H100 data sheet, SXM5"),
    memory_bandwidth=(3.35e12, "NVIDIA H100 data sheet, SXM5"),
    flops=_HOPPER_FLOPS,
    flops_source="NVIDIA H100 white paper, SXM5, dense",
    link=_HOPPER_LINK,
    device_names=("H100",),
    reached={"bf16": (794e12, _PUBLISHED)},
)

H200 = _nvidia(
    "h200",
    "sm_90",
    units=(132, "the H100's die (GH100); NVIDIA H200 data sheet gives the same rates"),
    clock_hz=_HOPPER_CLOCK,
    l2_bytes=(50 * MIB, "the H100's die; torch reports 60 MB on an H200"),
    memory=(141 * GB, "NVIDIA H200 data sheet"),
    memory_bandwidth=(4.8e12, "NVIDIA H200 data sheet"),
    flops=_HOPPER_FLOPS,
    flops_source="NVIDIA H100 white paper, SXM5, dense; the H200 data sheet gives the same",
    link=_HOPPER_LINK,
    device_names=("H200",),
    reached={
        "bf16": (788e12, "measured: torch.matmul on one H200; date not recorded"),
        "memory": (4.3e12, "measured: a large copy on one H200; date not recorded"),
    },
)

B200 = _nvidia(
    "b200",
    "sm_100",
    units=(148, "Chips and Cheese, Nvidia's B200: 74 SMs on each of two dies"),
    clock_hz=(1.856e9, "derived: 2250 TFLOP/s ÷ (148 SMs × 8192 operations a clock)"),
    l2_bytes=(126 * MIB, "deviceQuery reports; unconfirmed"),
    memory=(180 * GB, "NVIDIA HGX B200 data sheet"),
    memory_bandwidth=(8.0e12, "NVIDIA B200: 8 TB/s; the HGX B200 data sheet says 7.7"),
    flops={
        "f64": 37e12,
        "f32": 75e12,
        "tf32": 1.1e15,
        "f16": 2.25e15,
        "bf16": 2.25e15,
        "f8": 4.5e15,
        "i8": 4.5e15,
    },
    flops_source="NVIDIA HGX B200 data sheet, half of the rates with sparsity (f32, f64: as given)",
    link=(900e9, "NVIDIA HGX B200 data sheet: NVLink 5, 1.8 TB/s both directions"),
    device_names=("B200",),
    reached={"bf16": (1745e12, _PUBLISHED)},
    tensor_memory=(
        256 * KIB,
        "Cornell Virtual Workshop, Inside a Blackwell B200 SM: 512 columns × 128 lanes × 4 B",
    ),
)

L40S = _nvidia(
    "l40s",
    "sm_89",
    units=(142, "NVIDIA L40S data sheet: 18,176 cores, 128 an SM"),
    clock_hz=(2.52e9, "published boost clock"),
    l2_bytes=(96 * MIB, _ADA_L2.format(mib=96) + "; one database says 48"),
    memory=(48 * GB, "NVIDIA L40S data sheet"),
    memory_bandwidth=(864e9, "NVIDIA L40S data sheet"),
    flops={"f32": 91.6e12, "tf32": 183e12, "f16": 362.05e12, "bf16": 362.05e12, "f8": 733e12, "i8": 733e12},
    flops_source={
        **dict.fromkeys(("f32", "tf32", "f16", "bf16", "f8"), "NVIDIA L40S data sheet, dense"),
        "i8": "as f8, as on every Ada part; unconfirmed",
    },
    link=_PCIE4,
    device_names=("L40S",),
)

RTX4090 = _nvidia(
    "rtx4090",
    "sm_89",
    units=(128, "NVIDIA GeForce RTX 4090 specifications (thefpsreview.com): 16,384 cores, 128 an SM"),
    clock_hz=(2.52e9, "published boost clock"),
    l2_bytes=(72 * MIB, "published: 72 of the die's 96 MiB; unconfirmed"),
    memory=(24 * GB, "published: 24 GB GDDR6X"),
    memory_bandwidth=(1.008e12, "NVIDIA GeForce RTX 4090 specifications (thefpsreview.com): 1,008 GB/s"),
    flops={
        "f32": 82.6e12,
        "tf32": 82.6e12,
        "f16": 165.2e12,
        "bf16": 165.2e12,
        "f8": 330.3e12,
        "i8": 660.6e12,
    },
    flops_source="published database figures, dense, accumulating in f32 (i8 in i32); unconfirmed",
    link=(32e9, "published: PCIe 4 x16, 64 GB/s both directions; no NVLink"),
    device_names=("RTX 4090",),
)

NVIDIA = (A100, H100, H200, B200, L40S, RTX4090)
