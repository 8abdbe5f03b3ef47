"""``linear_attention`` and its backward on the CPU, by Tessel's kernels (``templates/linear_attention.hpp``)."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch

from ..codegen.cpp.linear import NAMES, linear_unit
from ..errors import check
from .linear_calls import LinearCalls
from .native import build, stop

__all__ = ["WIDENED", "LinearKernels"]

WIDENED = {torch.float16: torch.float32}  # dtypes that another kernel computes, and which

_CHUNK = 16  # steps, as the template has it
_STRETCH_FLOATS = 1 << 17  # of states made again at once: half a megabyte, what the second cache holds


class LinearKernels(LinearCalls):
    """The kernels: called as the references of the operators are, with f32 or bf16 and f32 beside them; f16 is widened
    to f32 and what comes out is rounded.

    Each kind (dtype, factors, delta rule) is compiled when it is first called.

    Raises:
        TesselError: a kernel cannot be compiled here, or a dtype has none.
    """

    @staticmethod
    def prepare(name: str, dtype: torch.dtype, channels: bool, delta: bool) -> None:
        """Compile a kernel before it is called; see ``linear_unit``."""
        _compiled(name, WIDENED.get(dtype, dtype), channels, delta)

    def _forward(self, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any, o: Any, last: Any) -> None:
        if q.dtype in WIDENED:
            wide = [x.to(WIDENED[q.dtype]) for x in (q, k, v, o)]
            self._forward(wide[0], wide[1], wide[2], decay, beta, start, wide[3], last)
            o.copy_(wide[3])
            return
        b, h = q.shape[:2]
        operands, kept = _operands(q, k, v, decay, beta, start)
        threads = torch.get_num_threads()
        parts = min(-(-threads // (b * h)), -(-v.shape[3] // _CHUNK))
        _run("linear_attention", (q, decay, beta), [*operands, o.data_ptr(), last.data_ptr(), parts], threads)
        del kept

    def _backward(
        self, grad: Any, grad_last: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any
    ) -> tuple[torch.Tensor, ...]:
        if q.dtype in WIDENED:
            w = [x.to(WIDENED[q.dtype]) for x in (grad, q, k, v)]
            dq, dk, dv, *rest = self._backward(w[0], grad_last, w[1], w[2], w[3], decay, beta, start)
            return *(x.to(q.dtype) for x in (dq, dk, dv)), *rest
        (_, _, steps, keys), values = q.shape, v.shape[3]
        found = [
            torch.empty((0,) if x is None else x.shape, dtype=q.dtype if i < 3 else torch.float32, device=q.device)
            for i, x in enumerate((q, k, v, decay, beta, start))
        ]
        operands, kept = _operands(q, k, v, decay, beta, start)
        grad, grad_last = _rows(grad), None if grad_last is None else grad_last.contiguous()
        results = [x.data_ptr() if x.numel() else 0 for x in found]
        stretch = max(1, min(-(-steps // _CHUNK), _STRETCH_FLOATS // (keys * values)))
        args = [*operands, *_place(grad), 0 if grad_last is None else grad_last.data_ptr(), *results, stretch]
        _run("linear_attention_backward", (q, decay, beta), args, torch.get_num_threads())
        del kept
        return tuple(found)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With consecutive elements in each row."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _place(x: torch.Tensor | None) -> tuple[int, ...]:
    """Address, and elements from batch to batch, head to head and step to step."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])


def _operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[list[int], list[Any]]:
    """Sizes and addresses, and the tensors that must live as long as these are used."""
    if decay is not None and decay.dim() == 4:
        decay = _rows(decay)
    start = None if start is None else start.contiguous()
    given = [*map(_rows, (q, k, v)), decay, beta]
    sizes = [*q.shape, v.shape[3]]
    places = [n for x in given for n in _place(x)]
    return [*sizes, *places, 0 if start is None else start.data_ptr()], [*given, start]


def _run(
    name: str, kind: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None], args: list[int], threads: int
) -> None:
    q, decay, beta = kind
    run, floats = _compiled(name, q.dtype, decay is not None and decay.dim() == 4, beta is not None)
    scratch = torch.empty(threads * floats(struct.pack(f"{len(args)}q", *args)), dtype=torch.float32, device=q.device)
    bad = run(struct.pack(f"{len(args) + 1}q", *args, scratch.data_ptr()), threads)
    if bad:
        stop(bad)


@cache
def _compiled(name: str, dtype: torch.dtype, channels: bool, delta: bool) -> tuple[Any, Any]:
    check(dtype in NAMES, lambda: f"{name}: no kernel for {dtype} on a CPU; cast to float32")
    library, _ = build(linear_unit(name, dtype, channels, delta))
    run, floats = library["run"], library["floats"]
    run.argtypes, run.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int
    floats.argtypes, floats.restype = [ctypes.c_char_p], ctypes.c_int64
    return run, floats
