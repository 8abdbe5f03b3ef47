"""The C++ of linear layers whose weight is stored in few bits or without zeros (``packed.hpp``,
``packed_odd.hpp``, ``int8.hpp``, ``sparse.hpp``)."""

from __future__ import annotations

from .text import unit

__all__ = ["INTEGERS", "TABLE", "packed_unit"]

_TYPES = {"f32": "float", "bf16": "u16"}
INTEGERS, TABLE = "integers", "table"
"""What codes stand for; else the bits of a small float's exponent, ``"4"`` or ``"5"``."""

_ODD = ("3", "5", "6", "7")  # bits of codes that do not fill bytes
_KINDS = {INTEGERS: "INTEGERS", TABLE: "TABLE", "4": "E4M3", "5": "E5M2"}


def packed_unit(function: str) -> str:
    """``packed_<type>_<bits>_<kind>``, ``int8_<type>_<bits>`` or ``sparse_<type>``: ``int f(const i64* args, i64
    threads)``; args: the fields of ``packed::Layer``, or x, mask, values, bias, m, n, k, out."""
    family, name, *more = function.split("_")
    t = _TYPES[name]
    head = f"EXPORT int {function}(const i64* a, i64 threads) {{"
    if family == "sparse":
        layer = f"(const {t}*)a[0], (const u32*)a[1], 0, 0, (const {t}*)a[3], a[4], a[5], a[6], a[6], ({t}*)a[7], 0"
        call = f"  return gemm::sparse::linear<{t}>({{{layer}}}, (const {t}*)a[2], threads);"
        return unit("sparse", [head, call, "}"])
    bits, *kind = more
    if family == "int8":
        header, call = "int8", f"int8::linear<{bits}>"
    elif kind == [INTEGERS] and bits in _ODD:
        header, call = "packed_odd", f"packed::linear_odd<{bits}>"
    else:
        header, call = "packed", f"packed::linear<gemm::packed::{_KINDS[kind[0]]}, {bits}>"
    lines = [
        head,
        f"  const gemm::packed::Layer<{t}> layer = {{(const {t}*)a[0], (const u32*)a[1], (const float*)a[2],",
        f"      (const float*)a[3], (const {t}*)a[4], a[5], a[6], a[7], a[8], ({t}*)a[9], (const float*)a[10]}};",
        f"  return gemm::{call}(layer, threads);",
        "}",
    ]
    return unit(header, lines)
