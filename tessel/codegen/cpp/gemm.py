"""The C++ header of register tiles: what every generated matrix product multiplies with.

    text = gemm_header(get_target("cpu").features, [(6, 4)])

A tile of R rows and V vectors of columns keeps its R * V sums in registers. Its shape follows from the number of
vector registers: 6 x 4 sums, four vectors of the right operand and one broadcast element fill 29 of 32
(AVX-512; 64 columns divide most sizes of layers); 4 x 3 fill the 16 of AVX2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache

from ...tiles.header import environment

__all__ = ["FEW", "gemm_header", "lanes", "multiplies_bf16", "register_tile"]

FEW = 8  # rows or columns up to which products are dot products: packing pays from 9 (f32) to 17 (bf16) rows on


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


def register_tile(features: Collection[str]) -> tuple[int, int]:
    """The best shape for a CPU with these flags: rows, and vectors of columns.

    >>> register_tile(["avx512f"]), register_tile([])
    ((6, 4), (4, 3))
    """
    return (6, 4) if _simd(features) == "avx512" else (4, 3)


def gemm_header(
    features: Collection[str], shapes: Iterable[tuple[int, int]] | None = None, l2_bytes: int = 2**20
) -> str:
    """The text of ``gemm.hpp``, to be included after ``tessel.hpp``.

    Args:
        features: the CPU's flags as its record names them.
        shapes: register tiles that are needed, ``(rows, vectors)``; without them, the best one. Whole products
            (``tiled``) are made of the first.
        l2_bytes: of a core's second cache, a quarter of which a packed panel may fill: rows of the left operand lie
            beside it.
    """
    return _rendered(frozenset(features), tuple(dict.fromkeys(shapes or [register_tile(features)])), l2_bytes)


@lru_cache(maxsize=16)
def _rendered(features: frozenset[str], shapes: tuple[tuple[int, int], ...], l2_bytes: int) -> str:
    n = lanes(features)
    halves = [[x for i in range(start, start + n // 2) for x in (i, n + i)] for start in (0, n // 2)]
    low, high = (", ".join(map(str, half)) for half in halves)
    text = environment().get_template("gemm.hpp.j2").render(
        simd=_simd(features),
        lanes=n,
        half=n // 2,
        bits=n.bit_length() - 1,
        lane_names=", ".join(f"l{i}" for i in range(n)),
        low=low,
        high=high,
        bf16=multiplies_bf16(features),
        few=FEW,
        shapes=shapes,
        tile=f"{shapes[0][0]}x{shapes[0][1]}",
        k_words=max(256, l2_bytes // 4 // (4 * n * shapes[0][1])),
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n")) + "\n"
