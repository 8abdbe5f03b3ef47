"""AMD GPUs. Peak rates are dense. "Unit" is a compute unit (CU), "warp" a wavefront of 64."""

from __future__ import annotations

from dataclasses import fields

from .target import Level, Limits, MatrixInstruction, Target

__all__ = ["AMD"]

KIB, MIB, GB = 2**10, 2**20, 10**9

_SPECS = "AMD ROCm documentation, GPU hardware specifications, MI300X"
_SHEET = "AMD Instinct MI300X data sheet"
_UNKNOWN = "unknown: no trustworthy source; measure it"
_LIMITS = Limits(
    shared_bytes_per_block=64 * KIB,
    shared_bytes_per_unit=64 * KIB,
    registers_per_unit=128 * KIB,
    registers_per_thread=512,
    warps_per_unit=32,
    threads_per_block=1024,
    warp_size=64,
)
_LIMIT_SOURCES = {
    "shared_bytes_per_block": _SPECS,
    "shared_bytes_per_unit": _SPECS,
    "registers_per_unit": f"{_SPECS}: VGPR file 512 KiB",
    "registers_per_thread": "AMD CDNA 3 instruction set: 512 VGPRs, half of them accumulation; unconfirmed",
    "warps_per_unit": "8 waves on each of 4 SIMDs; unconfirmed",
    "threads_per_block": "AMD ROCm: 1024 work items a workgroup; unconfirmed",
    "warp_size": _SPECS,
}
_FLOPS = {
    "f64": 163.4e12,
    "f32": 163.4e12,
    "tf32": 653.7e12,
    "f16": 1307.4e12,
    "bf16": 1307.4e12,
    "f8": 2614.9e12,
    "i8": 2614.9e12,
}
_UNITS, _CLOCK = 304, 2.1e9

MI300X = Target(
    name="mi300x",
    vendor="amd",
    arch="gfx942",
    units=_UNITS,
    clock_hz=_CLOCK,
    levels=(
        Level("registers", 512 * KIB, None, "unit"),
        Level("shared", 64 * KIB, 128.0 * _UNITS * _CLOCK, "unit"),
        Level("l2", 32 * MIB, None, "device"),
        Level("l3", 256 * MIB, None, "device"),
        Level("memory", 192 * GB, 5.3e12, "device"),
    ),
    flops=_FLOPS,
    limits=_LIMITS,
    link_bytes_per_s=448e9,
    gpu_target=("hip", "gfx942", 64),
    device_names=("MI300X",),
    reached={"bf16": 668e12},
    matrix=(
        MatrixInstruction(
            "mfma",
            32,
            32,
            16,
            1,
            1.0,
            False,
            "AMD CDNA 3 instruction set: v_mfma_f32_32x32x8_f16",
        ),
    ),
    sources={
        "units": f"{_SPECS}: 304 (38 on each of 8 dies)",
        "clock_hz": f"{_SHEET}: peak engine clock; unconfirmed",
        "levels.registers.capacity_bytes": f"{_SPECS}: VGPR file 512 KiB",
        "levels.registers.bandwidth_bytes_per_s": _UNKNOWN,
        "levels.shared.capacity_bytes": f"{_SPECS}: LDS 64 KiB",
        "levels.shared.bandwidth_bytes_per_s": "derived: 128 bytes a clock a CU × CUs × clock; unconfirmed",
        "levels.l2.capacity_bytes": f"{_SPECS}: 4 MiB on each of 8 dies, each serving its own die",
        "levels.l2.bandwidth_bytes_per_s": _UNKNOWN,
        "levels.l3.capacity_bytes": f"{_SPECS}: Infinity Cache",
        "levels.l3.bandwidth_bytes_per_s": _UNKNOWN,
        "levels.memory.capacity_bytes": f"{_SHEET}: 192 GB HBM3",
        "levels.memory.bandwidth_bytes_per_s": f"{_SHEET}: 5.3 TB/s",
        **{
            f"flops.{t}": f"{_SHEET}, dense, matrix; agrees with the rounded 1.3 and 2.6 PFLOP/s; unconfirmed"
            for t in _FLOPS
        },
        "flops.f64": f"{_SHEET}, matrix; unconfirmed",
        "flops.f32": f"{_SHEET}, vector; unconfirmed",
        **{f"limits.{f.name}": _LIMIT_SOURCES[f.name] for f in fields(Limits)},
        "link_bytes_per_s": "published: 7 Infinity Fabric links, 128 GB/s each in both directions",
        "reached.bf16": "published large GEMM; unconfirmed",
    },
)

AMD = (MI300X,)
