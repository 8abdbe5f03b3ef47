"""C++ units of linear attention and its gradients, around the templates of the same names.

    text = linear_unit("linear_attention_backward", torch.float32, channels=False, delta=True)
"""

from __future__ import annotations

import torch

from .text import unit

__all__ = ["NAMES", "linear_unit"]

NAMES = {torch.float32: "float", torch.bfloat16: "u16"}  # what q, k and v may be, and its C++ type
_ROWS = ("q", "k", "v", "decay", "beta")  # address, and elements from batch to batch, head to head, step to step


def linear_unit(name: str, dtype: torch.dtype, channels: bool, delta: bool) -> str:
    """``run(const i64* args, i64 threads)`` and ``floats(const i64* args)``: what one thread needs beside.

    A unit is one operator of one kind, because a model needs no other and each takes the compiler seconds.

    Args:
        name: ``linear_attention`` or ``linear_attention_backward``.
        dtype: of q, k and v.
        channels: there is a factor for every key channel, else one for a token.
        delta: there is a beta.

    The arguments are the five sizes of ``linear::Sizes``; four numbers for each of q, k, v, decay and beta; start;
    then of the forward o, last and the parts that a head's values are cut into; of the backward four numbers of grad,
    grad_last, six results and the chunks of a stretch; scratch memory at the end.
    """
    t, kind = NAMES[dtype], f"{NAMES[dtype]}, {str(channels).lower()}, {str(delta).lower()}"
    lines = ["static linear::Sizes sizes(const i64* a) { return {a[0], a[1], a[2], a[3], a[4]}; }"]
    types = [t, t, t, "float", "float"]
    rows = ", ".join(_rows(x, 5 + 4 * i) for i, x in enumerate(types))
    at = 5 + 4 * len(_ROWS)
    operands = f"  const linear::Operands<{t}> x = {{{rows}, (const float*)a[{at}], sizes(a)}};"
    rest = at + 1
    if name == "linear_attention":
        floats = f"linear::forward_floats<{kind}>(nullptr, sizes(a))"
        outs = [f"({t}*)a[{rest}]", f"(float*)a[{rest + 1}]", f"a[{rest + 2}]", f"(float*)a[{rest + 3}]"]
        call = f"linear::forward<{kind}>(x, {', '.join(outs)}, threads)"
        given = []
    else:
        outs = [f"({t if i < 3 else 'float'}*)a[{rest + 5 + i}]" for i in range(6)]
        given = [
            f"  const linear::Gradients<{t}> g = {{{_rows(t, rest)}, (const float*)a[{rest + 4}], {', '.join(outs)}}};"
        ]
        floats = f"linear::backward_floats<{kind}>(sizes(a), a[{rest + 11}])"
        call = f"linear::backward<{kind}>(x, g, a[{rest + 11}], (float*)a[{rest + 12}], threads)"
    lines += [f"EXPORT i64 floats(const i64* a) {{ return {floats}; }}"]
    lines += ["EXPORT int run(const i64* a, i64 threads) {", operands, *given, f"  return {call};", "}"]
    return unit(name, lines)


def _rows(t: str, at: int) -> str:
    return f"{{(const {t}*)a[{at}], a[{at + 1}], a[{at + 2}], a[{at + 3}]}}"
