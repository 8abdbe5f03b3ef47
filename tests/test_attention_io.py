"""Bytes that attention's tiles move: counted by hand on small sizes, never under the lower bound of one pass."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import attention_kernel, rand

from tessel.tiles.attention_io import least_bytes, moved_bytes, steps


@given(
    st.integers(1, 5), st.integers(1, 5), st.sampled_from((4, 8)), st.booleans(), st.integers(-6, 6),
    st.sampled_from((None, 1, 3, 9)), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_steps(a: int, b: int, tile: int, causal: bool, offset: int, window: int | None, by_keys: bool) -> None:
    """Rows from the first to the last that some row of a tile sees, or is seen by."""
    m, n = a * tile, b * tile

    def sees(i: int, j: int) -> bool:
        left = window is None or j > i + offset - window
        return left and (j <= i + offset if causal else window is None or j < i + offset + window)

    want, held, streamed = 0, n if by_keys else m, m if by_keys else n
    for start in range(0, held, tile):
        tiles = range(start, start + tile)
        rows = [s for s in range(streamed) if any(sees(s, t) if by_keys else sees(t, s) for t in tiles)]
        want += rows[-1] - rows[0] + 1 if rows else 0
    assert steps(held, streamed, tile, causal, offset, window, by_keys) == want


def test_bytes() -> None:
    q, k, v = (rand(2, 4, 64, 16, dtype=torch.bfloat16) for _ in range(3))
    kernel = attention_kernel(q, k, v)
    queries, keys = 64 * 16 * 2, 64 * (16 + 16) * 2
    assert moved_bytes(kernel, {"BM": 64, "BN": 16}) == 8 * (2 * queries + keys + 64 * 4)
    assert moved_bytes(kernel, {"BM": 16, "BN": 16}) == 8 * (2 * queries + 4 * keys + 64 * 4)
    assert least_bytes(kernel, 1 << 18) == 8 * (2 * queries + keys + 64 * 4)
    assert least_bytes(kernel, 256) == 8 * 64 * 64 * 16 * 16 * 2 // 128  # little fast memory: the second term
    causal = moved_bytes(attention_kernel(q, k, v, causal=True), {"BM": 16, "BN": 16})
    assert causal is not None and causal < 8 * (2 * queries + 4 * keys)
