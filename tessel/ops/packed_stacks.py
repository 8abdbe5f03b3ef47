"""Stacks of matrices in few bits: the weights of a layer of experts.

    unpacked(words [e, n, w], scale [e, n, g], ...) -> [e, n, k]           all of them written out
    packed_experts(x, words, ..., index, scale) -> (out, pre)               only those that some token asks for

Codes, scales, zeros and tables are those of ``packed_linear``, the layer is that of ``experts``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import Dim, product
from .common import arg_types, need_tensor, result, table
from .emit import Emit
from .experts import by_expert, gated
from .fold import need_float
from .packed import dequantized, emit_weight, whole_numbers
from .rounding import WHOLE_TENSOR, rounded_ref

__all__ = [
    "PACKED_STACKS",
    "experts_by_integers",
    "join_packed",
    "open_unpacked",
    "packed_experts_ref",
    "unpacked_ref",
]


def unpacked_ref(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    lut: Tensor | None = None,
    bits: int = 4,
    k: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrices ``[e, n, k]`` in a dtype.

    Args:
        words: [e, n, ceil(k / (32 // bits))] int32; scale, zero: [e, n, groups] float32, zero or None.
        lut: [2 ** bits] float32: what the codes stand for; None: integers.
    """
    flat = [None if t is None else t.flatten(0, 1) for t in (words, scale, zero)]
    made = dequantized(flat[0], flat[1], flat[2], lut, bits, k, dtype)  # type: ignore[arg-type]
    return made.unflatten(0, words.shape[:2])


def packed_experts_ref(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    lut: Tensor | None,
    down_words: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    down_bias: Tensor | None,
    down_lut: Tensor | None,
    index: Tensor,
    scale: Tensor,
    bits: int = 4,
    exponent: int = 0,
    act: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float = 0.0,
    inputs: int = 0,
    floats: tuple[Any, ...] = (),
    linear: Any = None,
) -> tuple[Tensor, Tensor]:
    """The layer by its definition, one expert after another, each unpacked where it is used.

    Args:
        x: [t, h]; index, scale: [t, c]; words: [e, 2i, h * bits / 32] and its scales [e, 2i, g], zeros, bias [e, 2i] or
            None, what the codes stand for or None; down_words: [e, o, i * bits / 32] and so on.
        exponent: as of ``packed_linear``.
        act, interleaved, alpha, limit: as of ``experts``.
        inputs: bits that tokens, and what becomes of gate and up, are rounded to, as of ``packed_linear``.
        floats: the same of small floats: the attributes of ``rounded``, one after another; (): not rounded to these.
        linear: what multiplies: of the arguments and attributes of ``packed_linear_ref``, which it is without.

    Returns:
        ``out`` [t, o] and nothing, in the place of what ``experts`` keeps for a backward.
    """
    from .packed import packed_linear_ref

    linear = packed_linear_ref if linear is None else linear
    choices, wide = index.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.new_zeros((index.numel(), down_words.shape[1]), dtype=wide)
    by_slot = scale.reshape(-1)
    first = (words, scales, zeros, bias)
    second = (down_words, down_scales, down_zeros, down_bias)
    attrs: dict[str, int] = {"bits": bits, "inputs": inputs, "exponent": exponent}
    parts = list(by_expert(index, words.shape[0], 0))

    def own(e: int, given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        return [None if t is None else t[e] for t in given]

    def inner(e: int, slots: Tensor) -> Tensor:
        pre = linear(x[slots // choices], *own(e, first), lut, **attrs)
        return gated(pre, act, interleaved, alpha, limit)

    held = None
    if floats:  # all of them, since one scale may be above all
        x = rounded_ref(x, *floats)
        held = x.new_zeros((index.numel(), words.shape[1] // 2))
        for e, slots in parts:
            held[slots] = inner(e, slots)
        held = rounded_ref(held, *floats)
    for e, slots in parts:
        got = linear(inner(e, slots) if held is None else held[slots], *own(e, second), down_lut, **attrs)
        rows[slots] = got.to(wide) * by_slot[slots, None].to(wide)
    return rows.unflatten(0, (-1, choices)).sum(1).to(x.dtype), x.new_empty(0)


# ---------------------------------------------------------------- types and axes


def _unpacked_infer(
    words: Any, scale: Any, zero: Any = None, lut: Any = None, bits: int = 4, k: int = 0, dtype: Any = torch.float32
) -> Any:
    need_tensor("unpacked", words, scale)
    fits = words.rank == scale.rank == 3 and words.dtype == torch.int32 and 1 <= bits <= 8
    check(fits, lambda: f"unpacked: {words} and {scale}, {bits} bits: not of the ranks and dtypes it takes")
    groups, per = scale.shape[2], 32 // bits
    if isinstance(groups, int) and isinstance(words.shape[2], int):
        fits = groups > 0 and k % groups == 0 and words.shape[2] == -(-k // per)
        check(fits, lambda: f"unpacked: {words} and {scale} hold no rows of {k} codes of {bits} bits")
    return (result((*words.shape[:2], k), dtype, words),)


def _unpacked_dims(node: Node) -> str:
    _, _, zero, lut = (arg_types(node) + [None] * 2)[:4]
    given = ["e n w*", "e n g*", "e n g*" if zero is not None else "", "t*" if lut is not None else ""]
    return f"{', '.join(filter(None, given))} -> e n k*"


def _infer(x: Any, words: Any, *rest: Any, **attrs: Any) -> Any:
    need_float("packed_experts", x)
    need_tensor("packed_experts", words, rest[0], rest[4], rest[5], rest[9], rest[10])
    down, index = rest[4], rest[9]
    fits = x.rank == index.rank == 2 and words.rank == down.rank == 3 and index.dtype == torch.int64
    check(fits, lambda: f"packed_experts: {x}, {words}, {down} and {index} are not of the ranks and dtypes it takes")
    bits = attrs.get("inputs", 0)
    check(bits in (0, *range(2, 9)), lambda: f"packed_experts: inputs of {bits} bits; 2 to 8, or 0, are possible")
    group, inner = (attrs.get("floats") or (0,))[0], words.shape[1] // 2
    fits = group <= 0 or not any(isinstance(n, int) and n % group for n in (x.shape[1], inner))
    check(fits, lambda: f"packed_experts: inputs in groups of {group} for rows of {x.shape[1]} and {inner} values")
    return result((x.shape[0], down.shape[1]), x.dtype, x), result((0,), x.dtype, x)


def _dims(node: Node) -> str:
    _, _, _, zero, bias, lut, _, _, down_zero, down_bias, down_lut, _, _ = arg_types(node)
    floats = node.attrs.get("floats")
    t = "t*" if floats and (floats[0] == WHOLE_TENSOR or floats[-1] == "e4m3") else "t"  # one scale above all tokens
    given = [f"{t} h*", "e* p* w*", "e* p* g*", "e* p* g*" if zero is not None else ""]
    given += ["e* p*" if bias is not None else "", "l*" if lut is not None else ""]
    given += ["e* o v*", "e* o q*", "e* o q*" if down_zero is not None else "", "e* o" if down_bias is not None else ""]
    given += ["m*" if down_lut is not None else "", f"{t} c*", f"{t} c*"]
    return f"{', '.join(filter(None, given))} -> {t} o, no_pre*"


def _flops(node: Node) -> Dim:
    x, words, *rest = arg_types(node)
    slots, down = product(rest[9].shape), rest[4]
    inner = words.shape[1] // 2
    return product((2, slots, x.shape[1], words.shape[1])) + product((2, slots, inner, down.shape[1]))


def experts_by_integers(node: Node) -> bool:
    """Whether both products of ``packed_experts`` may be ones of whole numbers, see ``by_integers``."""
    x, words, scale, _, _, lut, _, down_scale, _, _, down_lut, _, _ = arg_types(node)
    inputs = node.attrs.get("inputs", 0)
    first = whole_numbers(inputs, x.shape[1], scale.shape[2], lut)
    return first and whole_numbers(inputs, words.shape[1] // 2, down_scale.shape[2], down_lut)


# ---------------------------------------------------------------- rewrites


def open_unpacked(builder: Builder, node: Node) -> tuple[Value, ...]:
    """The matrices in simple operators."""
    words, scale, zero, lut = (list(node.args) + [None] * 2)[:4]
    e, (experts, n, _) = Emit(builder), scale.shape
    flat = partial(_rows, e, experts, n)
    attrs = node.attrs
    made = emit_weight(
        e,
        flat(words),
        flat(scale),
        None if zero is None else flat(zero),
        lut,
        attrs["bits"],
        attrs["k"],
        attrs["dtype"],
    )
    return (e.reshape(made, (experts, n, attrs["k"])),)


def _rows(e: Emit, experts: Dim, n: Dim, x: Value) -> Value:
    return e.reshape(x, (experts * n, x.shape[2]))


def join_packed(builder: Builder, node: Node) -> tuple[Value, ...] | None:
    """``experts`` of matrices that ``unpacked`` writes out, for which no backward will ask, as ``packed_experts``."""
    x, gate_up, bias, down, down_bias, index, scale = node.args
    attrs = dict(node.attrs)
    if attrs.pop("keep", False) or attrs.pop("offset", 0):
        return None
    turned = attrs.pop("turned", False)
    stacks = [_stack(v, turned) for v in (gate_up, down)]
    if None in stacks:
        return None
    first, second = stacks
    assert first is not None and second is not None
    if first[4] != second[4]:
        return None
    bits, exponent = first[4]
    more = {"bits": bits, "exponent": exponent}
    args = (x, *first[:3], bias, first[3], *second[:3], down_bias, second[3], index, scale)
    return builder.node(PACKED_STACKS["packed_experts"], *args, **attrs, **more).outs


def _stack(value: Value, turned: bool) -> tuple[Any, ...] | None:
    """Words, scales, zeros, table, and bits of codes and exponents, of what unpacks matrices ``[e, n, k]``."""
    if turned:
        if value.op.name != "permute" or tuple(value.node.attrs["dims"]) != (0, 2, 1):
            return None
        value = value.node.args[0]
    if value.op.name != "unpacked":
        return None
    words, scale, zero, lut = (list(value.node.args) + [None] * 2)[:4]
    return words, scale, zero, lut, (value.node.attrs["bits"], value.node.attrs.get("exponent", 0))


PACKED_STACKS = table(
    Op(
        "unpacked",
        "library",
        dims=_unpacked_dims,
        ref=lambda *args, exponent=0, **attrs: unpacked_ref(*args, **attrs),
        infer=lambda *args, exponent=0, **attrs: _unpacked_infer(*args, **attrs),
        cost=10,
        doc="unpacked(words [e, n, w], scale [e, n, g], zero|None, table|None, bits=, k=, dtype=, exponent=)",
    ),
    Op(
        "packed_experts",
        "library",
        dims=_dims,
        ref=packed_experts_ref,
        infer=_infer,
        flops=_flops,
        cost=1000,
        doc="packed_experts(x, words, scale, zero|None, bias|None, table|None, down: the same five, index, scale, "
        "bits=, exponent=, act=, interleaved=, alpha=, limit=, inputs=, floats=) -> (out, nothing)",
    ),
)
