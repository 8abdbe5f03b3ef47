"""``linear_cross_entropy`` and its backward on the CPU, by Tessel's kernels (``codegen/templates/loss.hpp``)."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch

from ..codegen.cpp_whole import headers, loss_unit
from .native import build, stop

__all__ = ["backward", "forward", "prepare"]

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_NO_CLASS = 8


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _along_k(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _function(name: str) -> Any:
    return build(loss_unit(name), headers("loss"))[0][name]


def prepare(kind: str, dtype: torch.dtype, turned: bool = False) -> None:
    """Compile what the operator ``kind`` needs, before it is called.

    Raises:
        TesselError: it cannot be compiled here.
    """
    _function(_name(kind, dtype))


def _name(kind: str, dtype: torch.dtype) -> str:
    return f"{kind.replace('linear_cross_entropy', 'loss')}_{_NAMES[dtype]}"


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
    offset: int = 0,
    classes: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``linear_cross_entropy_ref``; ``chunk`` is the kernel's own."""
    (n, k), v = x.shape, weight.shape[0]
    x, weight, target = _along_k(x), _along_k(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    loss, lse = (x.new_empty(n, dtype=torch.float32) for _ in range(2))
    operands = (x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), _address(bias), target.data_ptr())
    args = (*operands, loss.data_ptr(), lse.data_ptr(), n, v, k, offset, classes or v, ignore_index)
    _run(_name("loss", x.dtype), args, (label_smoothing, softcap))
    return loss, lse


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
    offset: int = 0,
    classes: int = 0,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``linear_cross_entropy_backward_ref``."""
    (n, k), v = x.shape, weight.shape[0]
    x, weight, target = _along_k(x), _along_k(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    grad, lse = grad.to(torch.float32).contiguous(), lse.contiguous()
    want_bias = wanted[2] and bias is not None
    dx = x.new_empty((n, k) if wanted[0] else (0,))
    dweight = x.new_empty((v, k) if wanted[1] else (0,))
    dbias = x.new_empty((v,) if want_bias else (0,))
    if n == 0 or v == 0:
        return dx.zero_(), dweight.zero_(), dbias.zero_()
    operands = (x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), _address(bias), target.data_ptr())
    results = (_address(d if w else None) for d, w in zip((dx, dweight, dbias), (*wanted[:2], want_bias), strict=True))
    args = (grad.data_ptr(), *operands, lse.data_ptr(), *results, n, v, k, offset, classes or v, ignore_index)
    _run(_name("loss_backward", x.dtype), args, (label_smoothing, softcap))
    return dx, dweight, dbias


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
