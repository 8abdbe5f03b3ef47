"""C++ units of the kernels that are made of several matrix products, around the templates of the same names.

    text = loss_unit("loss_backward_bf16")    # of linear_cross_entropy
"""

from __future__ import annotations

from .text import unit

__all__ = ["experts_unit", "loss_unit"]

_TYPES = {"f32": "float", "bf16": "u16"}


def loss_unit(function: str) -> str:
    """One of ``loss[_backward|_gradients]_<type>``: ``int f(const i64* args, const double* numbers, i64 threads)``.

    The arguments are addresses and sizes in the order of ``loss::forward``, ``backward`` and ``together``, then offset,
    total, ignored target, and the address where a wrong target is put; the numbers are smoothing and soft cap. A unit
    has one function, because a model often needs no other and each takes the compiler seconds.
    """
    kind, name = function.rsplit("_", 1)
    t = _TYPES[name]
    if kind == "loss":
        body = [
            f"  return loss::forward<{t}>((const {t}*)a[0], a[1], (const {t}*)a[2], a[3], (const {t}*)a[4],",
            "      (const i64*)a[5], (float*)a[6], (float*)a[7], a[8], a[9], a[10],",
            "      {a[11], a[12], a[13], (float)f[0], (float)f[1]}, (i64*)a[14], threads);",
        ]
    elif kind == "loss_gradients":
        body = [
            f"  return loss::together<{t}>((const {t}*)a[0], a[1], (const {t}*)a[2], a[3], (const {t}*)a[4],",
            f"      (const i64*)a[5], (float*)a[6], ({t}*)a[7], ({t}*)a[8], ({t}*)a[9], a[10], a[11], a[12],",
            "      {a[13], a[14], a[15], (float)f[0], (float)f[1]}, (i64*)a[16], threads);",
        ]
    else:
        body = [
            f"  return loss::backward<{t}>((const float*)a[0], (const {t}*)a[1], a[2], (const {t}*)a[3], a[4],",
            f"      (const {t}*)a[5], (const i64*)a[6], (const float*)a[7], ({t}*)a[8], ({t}*)a[9], ({t}*)a[10],",
            "      a[11], a[12], a[13], {a[14], a[15], a[16], (float)f[0], (float)f[1]}, (i64*)a[17], threads);",
        ]
    return unit("loss", [_head(function), *body, "}"])


def experts_unit(function: str) -> str:
    """One of ``experts[_backward]_<type>_<order>``, called as in ``loss_unit``.

    The arguments are the fields of ``experts::Layer`` up to ``interleaved`` and the activation's number, then the
    addresses of what ``experts::forward`` and ``experts::backward`` take after it; the numbers are alpha and limit.
    ``nk``: matrices [e, 2i, h] and [e, o, i]; ``kn``: [e, h, 2i] and [e, i, o].
    """
    kind, name, order = function.rsplit("_", 2)
    t, turned = _TYPES[name], {"nk": "false", "kn": "true"}[order]
    pointers = ", ".join(f"(const {t}*)a[{i}]" for i in range(5))
    sizes = ", ".join(f"a[{i}]" for i in range(7, 15))
    head = [
        _head(function),
        f"  const experts::Layer<{t}> layer = {{{pointers}, (const i64*)a[5], (const float*)a[6],",
        f"      {sizes}, {{a[15], (float)f[0], (float)f[1]}}}};",
    ]
    if kind == "experts":
        body = [f"  return experts::forward<{t}, {turned}>(layer, ({t}*)a[16], ({t}*)a[17], threads);"]
    else:
        grads = ", ".join(f"({t}*)a[{i}]" for i in range(18, 23))
        body = [
            f"  return experts::backward<{t}, {turned}>(layer, (const {t}*)a[16], (const {t}*)a[17],",
            f"      {grads}, (float*)a[23], threads);",
        ]
    return unit("experts", [*head, *body, "}"])


def _head(function: str) -> str:
    return f"EXPORT int {function}(const i64* a, const double* f, i64 threads) {{"
