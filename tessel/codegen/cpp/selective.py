"""The C++ unit of the selective scan's gradients, around ``templates/selective_scan.hpp``."""

from __future__ import annotations

from .text import unit

__all__ = ["STEPS", "selective_unit"]

STEPS = 16  # of a chunk, as the template has it
_STATES = (8, 16, 32, 64)  # sizes of a state that have loops of their own


def selective_unit() -> str:
    """``selective_backward``: ``int f(const i64* args, i64 threads)``.

    The arguments are addresses in the order of ``selective::backward``, then batches, steps, channels and states.
    ``selective_lanes`` says how many channels a block has, ``selective_scratch`` how many floats a thread needs.
    """
    operands = "(const float*)p[0], (const float*)p[1], (const float*)p[2], (const float*)p[3], (const float*)p[4],"
    results = ", ".join(f"(float*)p[{i}]" for i in range(6, 14))
    lines = []
    for n in (0, *_STATES):
        lines += [
            f"static int backward_{n}(const i64* p, selective::Sizes s, i64 threads) {{",
            f"  return selective::backward<{n}>({operands} (const float*)p[5],",
            f"      {results}, s, threads);",
            "}",
        ]
    lines += ["EXPORT i64 selective_lanes() { return W; }"]
    lines += ["EXPORT i64 selective_scratch(i64 n) { return selective::scratch_size(n); }"]
    lines += ["EXPORT int selective_backward(const i64* p, i64 threads) {"]
    lines += ["  const selective::Sizes s{p[14], p[15], p[16], p[17]};", "  switch (s.n) {"]
    lines += [f"    case {n}: return backward_{n}(p, s, threads);" for n in _STATES]
    lines += ["    default: return backward_0(p, s, threads);", "  }", "}"]
    return unit("selective_scan", lines)
