"""``linear_cross_entropy`` and its gradients on the CPU, by Tessel's kernels (``codegen/templates/loss.hpp``).

Only tokens that count are multiplied: the others' losses and gradients are zero.
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache
from typing import Any

import torch

from ..codegen.cpp.whole import loss_unit
from ..frontend.compat import keeps_graph
from ..ops.loss import LossAttrs, scaled_gradients_ref
from .native import build, stop
from .results import in_huge_pages

__all__ = ["backward", "forward", "gradients", "prepare", "scaled"]

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_NO_CLASS = 8


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _along_k(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _function(name: str) -> Any:
    return build(loss_unit(name))[0][name]


def prepare(kind: str, dtype: torch.dtype, turned: bool = False) -> None:
    """Compile what the operator ``kind`` needs, before it is called.

    Raises:
        TesselError: it cannot be compiled here.
    """
    _function(_name(kind, dtype))


def _name(kind: str, dtype: torch.dtype) -> str:
    return f"{kind.replace('linear_cross_entropy', 'loss')}_{_NAMES[dtype]}"


class _Call:
    """The operands of a kernel: what counts of them, where it lies."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, attrs: LossAttrs
    ) -> None:
        self.tokens = x.shape[0]
        counted = torch.nonzero(target != attrs.ignore_index)[:, 0]
        self.at = counted if counted.numel() < self.tokens else None
        self.x, self.target = _along_k(self.only(x)), self.only(target).contiguous()
        self.weight, self.bias = _along_k(weight), None if bias is None else bias.contiguous()
        self.attrs = attrs
        (self.n, self.k), self.v = self.x.shape, weight.shape[0]
        self.addresses = (
            *(self.x.data_ptr(), self.x.stride(0), self.weight.data_ptr(), self.weight.stride(0)),
            *(_address(self.bias), self.target.data_ptr()),
        )

    def only(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of tokens that count."""
        return rows if self.at is None else rows[self.at]

    def all(self, rows: torch.Tensor, wanted: bool = True) -> torch.Tensor:
        """Rows of all tokens from those that count."""
        if self.at is None or not wanted:
            return rows
        return rows.new_zeros((self.tokens, *rows.shape[1:])).index_copy_(0, self.at, rows)

    def rooms(self, wanted: tuple[bool, bool, bool]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Memory of the gradients; what is not wanted is empty."""
        want_bias = wanted[2] and self.bias is not None
        shapes = ((self.n, self.k), (self.v, self.k), (self.v,))
        dx, dweight, dbias = (
            self.x.new_empty(s if w else (0,)) for s, w in zip(shapes, (*wanted[:2], want_bias), strict=True)
        )
        in_huge_pages(dweight.data_ptr(), dweight.nbytes)  # as large as the weight, new at every step
        return dx, dweight, dbias

    def run(self, kind: str, before: tuple[int, ...], after: tuple[torch.Tensor, ...], wanted: Any = ()) -> None:
        """Call a kernel with the operands between addresses ``before`` and those of ``after``, null if not wanted."""
        a = self.attrs
        given = (*(True,) * (len(after) - len(wanted)), *wanted)
        results = (_address(t if w else None) for t, w in zip(after, given, strict=True))
        sizes = (self.n, self.v, self.k, a.offset, a.classes or self.v, a.ignore_index)
        _run(_name(kind, self.x.dtype), (*before, *self.addresses, *results, *sizes), (a.label_smoothing, a.softcap))


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, **attrs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``linear_cross_entropy_ref``; of a token that does not count, ``lse`` is zero."""
    call = _Call(x, weight, bias, target, LossAttrs(**attrs))
    loss, lse = (x.new_empty(call.n, dtype=torch.float32) for _ in range(2))
    call.run("loss", (), (loss, lse))
    return call.all(loss), call.all(lse)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    **attrs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``linear_cross_entropy_backward_ref``."""
    call = _Call(x, weight, bias, target, LossAttrs(**attrs))
    grad, lse = call.only(grad.to(torch.float32)).contiguous(), call.only(lse).contiguous()
    dx, dweight, dbias = rooms = call.rooms(wanted)
    if call.n == 0 or call.v == 0:
        return call.all(dx.zero_(), wanted[0]), dweight.zero_(), dbias.zero_()
    wants = (*wanted[:2], dbias.numel() > 0)
    call.run("loss_backward", (grad.data_ptr(),), (lse, *rooms), wants)
    return call.all(dx, wanted[0]), dweight, dbias


def gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    **attrs: Any,
) -> tuple[torch.Tensor, ...]:
    """See ``linear_cross_entropy_gradients_ref``."""
    call = _Call(x, weight, bias, target, LossAttrs(**attrs))
    loss = x.new_empty(call.n, dtype=torch.float32)
    dx, dweight, dbias = rooms = call.rooms(wanted)
    if call.n == 0 or call.v == 0:
        return call.all(loss), call.all(dx.zero_(), wanted[0]), dweight.zero_(), dbias.zero_()
    call.run("loss_gradients", (), (loss, *rooms), (*wanted[:2], dbias.numel() > 0))
    return call.all(loss), call.all(dx, wanted[0]), dweight, dbias


def scaled(
    dx: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor, by: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``scaled_gradients_ref``; in place where the backward runs for the last time and frees what was saved."""
    number = float(by)
    if keeps_graph() or not math.isfinite(number):
        return scaled_gradients_ref(dx, dweight, dbias, by)
    return dx.mul_(number), dweight.mul_(number), dbias.mul_(number)


def _run(name: str, args: tuple[int, ...], numbers: tuple[float, float]) -> None:
    wrong = ctypes.c_int64()
    fn = _function(name)
    fn.argtypes, fn.restype = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64], ctypes.c_int
    packed = struct.pack(f"{len(args) + 1}q", *args, ctypes.addressof(wrong))
    bad = fn(packed, struct.pack("2d", *numbers), torch.get_num_threads())
    if bad & _NO_CLASS:
        raise IndexError(f"Target {wrong.value} is out of bounds.")
    if bad:
        stop(bad)
