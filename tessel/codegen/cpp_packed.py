"""The C++ of linear layers whose weight is stored in few bits (``templates/packed.hpp``)."""

from __future__ import annotations

from .cpp_whole import unit

__all__ = ["packed_unit"]

_TYPES = {"f32": "float", "bf16": "u16"}


def packed_unit(function: str) -> str:
    """``packed_<type>_<bits>``: ``int f(const i64* args, i64 threads)``; args: the fields of ``packed::Layer``."""
    _, name, bits = function.split("_")
    t = _TYPES[name]
    lines = [
        f'extern "C" __attribute__((visibility("default"))) int {function}(const i64* a, i64 threads) {{',
        f"  const gemm::packed::Layer<{t}> layer = {{(const {t}*)a[0], (const u32*)a[1], (const float*)a[2],",
        f"      (const float*)a[3], (const {t}*)a[4], a[5], a[6], a[7], a[8], ({t}*)a[9]}};",
        f"  return gemm::packed::linear<{bits}>(layer, threads);",
        "}",
    ]
    return unit("packed", lines)
