"""The C++ header of register tiles: what every generated matrix product multiplies with.

    text = gemm_header(get_target("cpu").features, [(6, 4)])

A tile of R rows and V vectors of columns keeps its R * V sums in registers. Its shape follows from the number of
vector registers: 6 x 4 sums, four vectors of the right operand and one broadcast element fill 29 of 32
(AVX-512; 64 columns divide most sizes of layers); 4 x 3 fill the 16 of AVX2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache

from ...ir.types import Dim
from ...tiles.header import environment

__all__ = ["few", "gemm_header", "has_matrix_unit", "lanes", "multiplies_bf16", "register_tile"]


def _simd(features: Collection[str]) -> str:
    if "avx512f" in features:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= set(features) else "portable"


def lanes(features: Collection[str]) -> int:
    """How many floats a vector holds.

    >>> lanes(["avx512f"]), lanes(["avx2", "fma"]), lanes([])
    (16, 8, 4)
    """
    return {"avx512": 16, "avx2": 8, "portable": 4}[_simd(features)]


def multiplies_bf16(features: Collection[str]) -> bool:
    """Whether a CPU with these flags multiplies bf16 as it is; otherwise it is widened when packed."""
    return {"avx512f", "avx512_bf16"} <= set(features)


def has_matrix_unit(features: Collection[str]) -> bool:
    """Whether a CPU with these flags multiplies tiles of bf16 at once (AMX).

    >>> has_matrix_unit(["avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]), has_matrix_unit(["avx512f"])
    (True, False)
    """
    return multiplies_bf16(features) and {"amx_tile", "amx_bf16"} <= set(features)


def register_tile(features: Collection[str]) -> tuple[int, int]:
    """The best shape for a CPU with these flags: rows, and vectors of columns.

    >>> register_tile(["avx512f"]), register_tile([])
    ((6, 4), (4, 3))
    """
    return (6, 4) if _simd(features) == "avx512" else (4, 3)


def few(features: Collection[str], bf16: bool = False) -> tuple[int, int]:
    """Rows, and columns, up to which a product is made of dot products: they read both operands where they lie.

    Measured on a Zen 4: with AVX-512 packing pays from 25 to 33 rows on (24: 1.08 to 1.15 times as fast without), and
    a panel of 64 columns from 49 to 64 columns on; with AVX2, whose panels have 24, from 10 rows and 13 columns on.
    A matrix unit makes the turned product of 6 rows of bf16 in 0.83 of the time, of 24 in 0.27, of 4 in 1.6; of 16 rows
    of float32 in 0.9, of 24 in 0.75, of 12 in 1.3 (Granite Rapids, 768 x 3072 from memory).

    >>> few(["avx512f"]), few(["avx2", "fma"]), few(["avx512f", "avx512_bf16", "amx_tile", "amx_bf16"])
    ((24, 48), (8, 8), (15, 48))
    """
    rows, columns = (24, 48) if _simd(features) == "avx512" else (8, 8)
    if has_matrix_unit(features):
        rows = 5 if bf16 else 15
    return rows, columns


def swapped(features: Collection[str]) -> int:
    """Rows up to which a matrix unit makes the turned product: weights are then its left operand, which is not packed.

    Only where there is one: blocks of vectors are multiplied for longer, and packed in less time. Of 256 rows of
    float32 the turned product took 0.91 of the time, of 384 as long (3072 x 768 and 8192 x 768, Granite Rapids).
    """
    return 256 if has_matrix_unit(features) else 0


def forms(features: Collection[str], m: Dim, n: Dim, bf16: bool = False) -> list[str]:
    """How a product of m rows and n columns is made, both operands in memory and along k; what is tried first is first.

    ``dots`` where either is ``few``; ``swapped``, the turned product of few rows by a matrix unit; else ``tiles``.

    >>> xeon = ["avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    >>> forms(xeon, 8, 768), forms(xeon, 64, 768), forms(xeon, 512, 768), forms(["avx512f"], 64, 768)
    (['dots'], ['swapped'], ['tiles'], ['tiles'])
    >>> from tessel.ir.types import symbol
    >>> forms(xeon, symbol("rows"), 768)
    ['dots', 'swapped', 'tiles']
    """
    sizes = (m, n)
    if any(isinstance(x, int) and x <= most for x, most in zip(sizes, few(features, bf16), strict=True)):
        return ["dots"]
    if not (isinstance(m, int) and isinstance(n, int)):
        return ["dots", *(["swapped"] if has_matrix_unit(features) else []), "tiles"]
    return ["swapped" if m <= swapped(features) and n >= 3 * m else "tiles"]


def gemm_header(
    features: Collection[str],
    shapes: Iterable[tuple[int, int]] | None = None,
    l2_bytes: int = 2**20,
    l1_bytes: int | None = None,
    streams: bool = False,
) -> str:
    """The text of ``gemm.hpp``.

    Args:
        features: the CPU's flags as its record names them.
        shapes: register tiles that are needed, ``(rows, vectors)``; without them, the best one. Whole products
            (``tiled``) are made of the first.
        l2_bytes: of a core's second cache. A packed panel may fill a quarter of it: rows of the left operand lie
            beside it. Half of it may lie between what dot products read and what they ask for.
        l1_bytes: of the first one, where a panel for vectors is to fill two thirds of that: on CPUs whose vectors
            multiply faster than the second cache feeds them. A tile on a Granite Rapids ran at 0.85 of the
            multiply-adds so, at 0.95 from the first cache, whole products 1.04 to 1.08 times as fast (2026-11-23); a
            Zen 4, 0.97 from the second, needs none.
        streams: whether dot products read a few long runs of columns at once, each asked for a page ahead, instead of
            neighbours: 768 x 3072 from memory at 22.7 and 31 GB/s on a Granite Rapids (2026-11-23).
    """
    every = tuple(dict.fromkeys(shapes or [register_tile(features)]))
    return _rendered(frozenset(features), every, l2_bytes, l1_bytes, streams)


@lru_cache(maxsize=16)
def _rendered(
    features: frozenset[str], shapes: tuple[tuple[int, int], ...], l2_bytes: int, l1_bytes: int | None, streams: bool
) -> str:
    n = lanes(features)
    halves = [[x for i in range(start, start + n // 2) for x in (i, n + i)] for start in (0, n // 2)]
    low, high = (", ".join(map(str, half)) for half in halves)
    width = 4 * n * shapes[0][1]  # bytes of a row of a panel
    text = environment().get_template("gemm.hpp.j2").render(
        simd=_simd(features),
        lanes=n,
        half=n // 2,
        bits=n.bit_length() - 1,
        lane_names=", ".join(f"l{i}" for i in range(n)),
        low=low,
        high=high,
        bf16=multiplies_bf16(features),
        amx=has_matrix_unit(features),
        few=few(features),
        few_bf16=few(features, bf16=True)[0],
        swapped=swapped(features),
        shapes=shapes,
        tile=f"{shapes[0][0]}x{shapes[0][1]}",
        l2_bytes=l2_bytes,
        streams=streams,
        k_words=max(64, l1_bytes * 2 // 3 // width) if l1_bytes else None,
        longest=max(256, l2_bytes // 4 // width),
        split_words=max(256, l2_bytes * 9 // 32 // (2 * 6 * width // 4) // 32 * 32),
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n")) + "\n"
