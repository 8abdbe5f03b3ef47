"""``experts`` and its backward on the CPU, by Tessel's kernels (``codegen/templates/experts.hpp``)."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch

from ..codegen.cpp.whole import experts_unit
from ..ops.experts import ACTS
from .native import build, stop
from .results import in_huge_pages

__all__ = ["backward", "forward", "prepare"]

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_ACT_NUMBERS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "limited": 4}
assert set(_ACT_NUMBERS) == set(ACTS)

Operands = tuple[Any, ...]


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def _function(name: str) -> Any:
    """The compiled function ``name`` of ``experts_unit``; TesselError when it cannot be compiled here."""
    return build(experts_unit(name))[0][name]


def _name(kind: str, dtype: torch.dtype, turned: bool) -> str:
    return f"{kind}_{_NAMES[dtype]}_{'kn' if turned else 'nk'}"


def prepare(kind: str, dtype: torch.dtype, turned: bool = False) -> None:
    """Compile what the operator ``kind`` needs, before it is called.

    Raises:
        TesselError: it cannot be compiled here.
    """
    _function(_name(kind, dtype, turned))


def forward(*given: Any, keep: bool = False, **attrs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``experts_ref``, whose operands and attributes these are."""
    operands, x = _dense(*given), given[0]
    sizes = _sizes(operands, attrs)
    tokens, choices, _, _, inner, out_width = sizes[:6]
    out = x.new_empty((tokens, out_width))
    pre = x.new_empty((tokens * choices, 2 * inner) if keep else (0,))
    if tokens * choices == 0 or not sizes[2]:
        return out.zero_(), pre.zero_()
    _run("experts", operands, sizes, attrs, (out.data_ptr(), _address(pre if keep else None)))
    return out, pre


def backward(
    grad: torch.Tensor, *given: Any, wanted: tuple[bool, bool, bool] = (True, True, True), **attrs: Any
) -> tuple[torch.Tensor, ...]:
    """See ``experts_backward_ref``, whose operands and attributes these are."""
    *layer, pre = given
    operands, x, index, scale = _dense(*layer), layer[0], layer[5], layer[6]
    sizes = _sizes(operands, attrs)
    wants = (wanted[0], *(wanted[1],) * 4, wanted[2])
    like = (*operands[:5], operands[6])
    made = [None if t is None or not w else torch.empty_like(t) for t, w in zip(like, wants, strict=True)]
    for t in made:
        if t is not None:
            in_huge_pages(t.data_ptr(), t.nbytes)  # as large as the weights, new at every step
    if index.numel() == 0 or not sizes[2]:
        made = [None if t is None else t.zero_() for t in made]
    else:
        grad, pre = grad.contiguous(), pre.contiguous()
        _run("experts_backward", operands, sizes, attrs, (grad.data_ptr(), pre.data_ptr(), *map(_address, made)))
    dscale = made.pop()
    results = [x.new_empty(0) if t is None else t for t in made]
    return *results, scale.new_empty(0) if dscale is None else dscale.to(scale.dtype)


def _run(name: str, operands: Operands, sizes: tuple[int, ...], attrs: dict[str, Any], more: tuple[int, ...]) -> None:
    fn = _function(_name(name, operands[0].dtype, bool(attrs.get("turned"))))
    fn.argtypes, fn.restype = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64], ctypes.c_int
    args = (*map(_address, operands), *sizes, _ACT_NUMBERS[attrs.get("act", "silu")], *more)
    numbers = struct.pack("2d", attrs.get("alpha", 1.0), attrs.get("limit", 0.0))
    bad = fn(struct.pack(f"{len(args)}q", *args), numbers, torch.get_num_threads())
    if bad:
        stop(bad)


def _dense(*operands: Any) -> Operands:
    *rest, scale = operands
    return *(None if t is None else t.contiguous() for t in rest), scale.to(torch.float32).contiguous()


def _sizes(operands: Operands, attrs: dict[str, Any]) -> tuple[int, ...]:
    """Tokens, choices, experts, hidden, inner, out, offset, interleaved: as ``experts::Layer`` has them."""
    x, _, _, down, _, index, _ = operands
    inner, out = down.shape[1:] if attrs.get("turned") else down.shape[:0:-1]
    interleaved = int(attrs.get("interleaved", False))
    return (*index.shape, down.shape[0], x.shape[1], inner, out, attrs.get("offset", 0), interleaved)
