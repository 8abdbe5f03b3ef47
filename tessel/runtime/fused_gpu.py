"""Losses and experts by Triton kernels: what a GPU runs, and through the interpreter the CPU.

Each is a host function over the kernels of ``codegen/fused.py``: called as the references of the operators are. Logits
exist a chunk of classes at a time; slots are sorted by expert on the device, and nothing is read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..codegen.fused import SPAN, grouped_source, loss_source, packed_source, packed_tile_of
from ..ops.packed import rounded_rows
from ..ops.rounding import rounded_ref
from ..targets import Target
from .launch import load

__all__ = ["FusedKernels", "GpuExperts", "GpuLoss", "GpuPackedExperts"]

_HELD = 1 << 25  # elements of a chunk of logits


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class FusedKernels:
    """Rendered, loaded and kept by what they depend on."""

    def __init__(self, target: Target, directory: Path) -> None:
        self.target, self.directory = target, directory
        self.loaded: dict[Any, Any] = {}

    def get(self, key: Any, make: Any) -> Any:
        found = self.loaded.get(key)
        if found is None:
            found = self.loaded[key] = load(make(), self.directory)
        return found


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A library product whose result is f32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class GpuLoss(FusedKernels):
    """``linear_cross_entropy`` and its backward."""

    def _kernel(self, part: str, dtype: torch.dtype, bias: bool, attrs: dict[str, Any]) -> Any:
        key = (part, dtype, bias, *sorted(attrs.items()))
        return self.get(key, lambda: loss_source(part, dtype, self.target, attrs, bias))

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        chunk: int = 0,
        **attrs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``linear_cross_entropy_ref``."""
        attrs["classes"] = classes = attrs.get("classes", 0) or weight.shape[0]
        x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
        (n, k), v = x.shape, weight.shape[0]
        _check_targets(target, attrs.get("ignore_index", -100), classes)
        kernel = self._kernel("fold", x.dtype, bias is not None, attrs)
        knobs = kernel.source.knobs
        spans = _cdiv(v, knobs["BN"] * SPAN)
        top, total, plain, picked = torch.empty((4, spans, n), dtype=torch.float32, device=x.device)
        operands = [x, weight, *([] if bias is None else [bias.contiguous()]), target]
        kernel((_cdiv(n, knobs["BM"]) * spans,), *operands, top, total, plain, picked, n, v, k, k, k)
        lse = torch.logsumexp(top + total.log(), 0)
        smoothing = attrs.get("label_smoothing", 0.0)
        mine = picked.sum(0) * (1 - smoothing)
        if smoothing:
            mine = mine + plain.sum(0) * (smoothing / classes)
        return torch.where(target != attrs.get("ignore_index", -100), lse - mine, 0.0), lse

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        lse: torch.Tensor,
        chunk: int = 0,
        wanted: tuple[bool, bool, bool] = (True, True, True),
        **attrs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``linear_cross_entropy_backward_ref``; ``chunk`` is of classes here."""
        attrs["classes"] = attrs.get("classes", 0) or weight.shape[0]
        x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
        grad, lse = grad.float().contiguous(), lse.contiguous()
        (n, k), v = x.shape, weight.shape[0]
        want_x, want_weight, want_bias = wanted[0], wanted[1], wanted[2] and bias is not None
        dx = torch.zeros((n, k) if want_x else (0,), dtype=torch.float32, device=x.device)
        dweight = torch.empty((v, k) if want_weight else (0,), dtype=weight.dtype, device=x.device)
        dbias = torch.empty(v if want_bias else 0, dtype=weight.dtype, device=x.device)
        kernel = self._kernel("gradients", x.dtype, bias is not None, attrs)
        knobs = kernel.source.knobs
        step = chunk or max(knobs["BN"], _HELD // max(n, 1) // knobs["BN"] * knobs["BN"])
        for first in range(0, v, step):
            part = slice(first, min(first + step, v))
            size = part.stop - first
            d = torch.empty((n, size), dtype=x.dtype, device=x.device)
            operands = [x, weight[part], *([] if bias is None else [bias[part].contiguous()]), target, lse, grad]
            kernel((_cdiv(n, knobs["BM"]) * _cdiv(size, knobs["BN"]),), *operands, d, n, size, k, k, k, first)
            if want_x:
                dx += _wide_product(d, weight[part])
            if want_weight:
                dweight[part] = d.t() @ x
            if want_bias:
                dbias[part] = d.sum(0, dtype=torch.float32).to(dbias.dtype)
        return dx.to(x.dtype), dweight, dbias


def _check_targets(target: torch.Tensor, ignore: int, classes: int) -> None:
    """A target that is no class: eager's error on the CPU, its assertion on the device elsewhere."""
    wrong = (target != ignore) & ((target < 0) | (target >= classes))
    if target.device.type != "cpu":
        torch._assert_async(~wrong.any(), "a target is out of bounds")
    elif bool(wrong.any()):
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")


class GpuExperts(FusedKernels):
    """``experts`` and its backward."""

    def _kernel(self, part: str, dtype: torch.dtype, attrs: dict[str, Any]) -> Any:
        key = (part, dtype, *sorted(attrs.items()))
        return self.get(key, lambda: grouped_source(part, dtype, self.target, attrs))

    def _by_expert(self, kernel: Any, route: Any, operands: list[Any], outs: list[Any], n: int, k: int, b: Any) -> None:
        order, bounds = route[:2]
        knobs = kernel.source.knobs
        tiles = (_cdiv(order.numel(), knobs["BM"]) + bounds.numel() - 1) * _cdiv(n, knobs["BN"])
        kernel((tiles,), *operands, order, bounds, *outs, bounds.numel() - 1, n, k, *b, order.numel(), route[2])

    def forward(
        self,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        index: torch.Tensor,
        scale: torch.Tensor,
        keep: bool = False,
        offset: int = 0,
        turned: bool = False,
        **attrs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``experts_ref``."""
        x, gate_up, down, gate_up_bias, down_bias = map(_dense, (x, gate_up, down, gate_up_bias, down_bias))
        route = _route(index, gate_up.shape[0], offset)
        inner, out = down.shape[1:] if turned else down.shape[:0:-1]
        slots = index.numel()
        h = x.new_empty((slots, inner))
        pre = x.new_zeros((slots, 2 * inner) if keep else (0,))
        kernel = self._kernel("inner", x.dtype, {**attrs, "bias": gate_up_bias is not None, "keep": keep})
        operands = [x, gate_up, *([] if gate_up_bias is None else [gate_up_bias])]
        outs = [h, *([pre] if keep else [])]
        self._by_expert(kernel, route, operands, outs, inner, x.shape[1], _along(gate_up, turned))
        rows = torch.zeros((slots, out), dtype=torch.float32, device=x.device)
        kernel = self._kernel("product", x.dtype, {"bias": down_bias is not None, "scaled": True})
        operands = [h, down, *([] if down_bias is None else [down_bias]), _wide(scale)]
        self._by_expert(kernel, route, operands, [rows], out, inner, _along(down, turned))
        return rows.unflatten(0, (-1, index.shape[1])).sum(1).to(x.dtype), pre

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        index: torch.Tensor,
        scale: torch.Tensor,
        pre: torch.Tensor,
        offset: int = 0,
        turned: bool = False,
        wanted: tuple[bool, bool, bool] = (True, True, True),
        **attrs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """See ``experts_backward_ref``."""
        x, gate_up, down, grad, pre = map(_dense, (x, gate_up, down, grad, pre))
        route = _route(index, gate_up.shape[0], offset)
        inner, out = down.shape[1:] if turned else down.shape[:0:-1]
        slots, choices, width = index.numel(), index.shape[1], x.shape[1]
        dpre, h = x.new_zeros((slots, 2 * inner)), x.new_zeros((slots, inner))
        kernel = self._kernel("back", x.dtype, attrs)
        parts = torch.zeros((_cdiv(inner, kernel.source.knobs["BN"]), slots), dtype=torch.float32, device=x.device)
        operands = [grad, down, pre, _wide(scale)]
        self._by_expert(kernel, route, operands, [dpre, h, parts], inner, out, _along(down, not turned))
        dx, empty = x.new_empty(0), x.new_empty(0)
        if wanted[0]:
            rows = torch.zeros((slots, width), dtype=torch.float32, device=x.device)
            kernel = self._kernel("product", x.dtype, {})
            self._by_expert(kernel, route, [dpre, gate_up], [rows], width, 2 * inner, _along(gate_up, not turned))
            dx = rows.unflatten(0, (-1, choices)).sum(1).to(x.dtype)
        grads = [empty] * 4
        if wanted[1]:
            first = (x, dpre, "left") if turned else (dpre, x, "right")
            second = (h, grad, "right") if turned else (grad, h, "left")
            grads[0], grads[2] = (self._outer(route, *p, like=w) for p, w in ((first, gate_up), (second, down)))
            order, bounds = route[0].long(), route[1].long()
            if gate_up_bias is not None:
                grads[1] = _sums(dpre, bounds).to(x.dtype)
            if down_bias is not None:
                scaled = grad[order // choices].float() * scale.reshape(-1)[order, None].float()
                grads[3] = _sums(scaled, bounds).to(x.dtype)
        dscale = scale.new_empty(0)
        if wanted[2]:
            sums = parts.sum(0).view(index.shape)
            if down_bias is not None:
                flat = index - offset
                here = (flat >= 0) & (flat < down.shape[0])
                through = (grad[:, None].float() * down_bias[flat.clamp(0, down.shape[0] - 1)].float()).sum(-1)
                sums = sums + torch.where(here, through, 0.0)
            dscale = sums.to(scale.dtype)
        return dx, *grads, dscale

    def _outer(self, route: Any, a: torch.Tensor, b: torch.Tensor, gathered: str, like: torch.Tensor) -> torch.Tensor:
        order, bounds, choices = route
        to = torch.empty_like(like)
        kernel = self._kernel("outer", a.dtype, {"gathered": gathered})
        knobs, (m, n) = kernel.source.knobs, like.shape[1:]
        tiles = like.shape[0] * _cdiv(m, knobs["BM"]) * _cdiv(n, knobs["BN"])
        kernel((tiles,), a, b, order, bounds, to, m, n, like.shape[0], order.numel(), choices)
        return to


class GpuPackedExperts(FusedKernels):
    """``packed_experts``: the matrices' numbers are made where they are multiplied."""

    def forward(self, x: torch.Tensor, *given: Any, **attrs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``packed_experts_ref``."""
        up, down, index, weights = given[:5], given[5:10], given[10], given[11]
        attrs = dict(attrs)
        bits, inputs, floats = attrs.pop("bits", 4), attrs.pop("inputs", 0), attrs.pop("floats", ())
        attrs.pop("exponent", None)  # of a table's codes; the table is what is read
        route = _route(index, up[0].shape[0], 0)
        h = x.new_zeros((index.numel(), up[0].shape[1] // 2))  # slots of no expert count for one scale above all
        x = rounded_ref(x, *floats) if floats else x
        self._multiply("inner", x, up, route, h, bits, inputs, [], attrs)
        h = rounded_ref(h, *floats) if floats else h
        rows = torch.zeros((index.numel(), down[0].shape[1]), dtype=torch.float32, device=x.device)
        self._multiply("product", h, down, route, rows, bits, inputs, [_wide(weights)], {"scaled": True})
        return rows.unflatten(0, (-1, index.shape[1])).sum(1).to(x.dtype), x.new_empty(0)

    def _multiply(
        self,
        part: str,
        a: torch.Tensor,
        stack: Any,
        route: Any,
        out: torch.Tensor,
        bits: int,
        inputs: int,
        weights: list[torch.Tensor],
        attrs: dict[str, Any],
    ) -> None:
        words, scales, zeros, bias, table = map(_dense, stack)
        (order, bounds, choices), dtype, (_, k) = route, a.dtype, a.shape
        groups, n = scales.shape[2], words.shape[1] // (2 if part == "inner" else 1)
        knobs = packed_tile_of(part, self.target, dtype)
        once = groups == 1 or k // groups % knobs["BK"] == 0
        whole = inputs == 8 and once and table is None
        own: list[torch.Tensor] = []
        a = a.contiguous()
        if inputs:
            codes, row_scale = rounded_rows(a, inputs)
            a = codes.to(torch.int8) if whole else (codes * row_scale).to(dtype)
            own = [_wide(row_scale)] if whole else []
        packed = {"bits": bits, "zero": zeros is not None, "table": table is not None, "once": once, "whole": whole}
        attrs = {**attrs, "bias": bias is not None}
        key = (part, dtype, *sorted(attrs.items()), *packed.values())
        kernel = self.get(key, lambda: packed_source(part, dtype, self.target, {**attrs, "packed": packed}))
        operands = [t for t in (a, words, scales, zeros, table, *own, bias, *weights) if t is not None]
        tiles = (_cdiv(order.numel(), knobs["BM"]) + bounds.numel() - 1) * _cdiv(n, knobs["BN"])
        sizes = (bounds.numel() - 1, n, k, words.shape[2], groups, order.numel(), choices)
        kernel((tiles,), *operands, order, bounds, out, *sizes)


def _dense(x: Any) -> Any:
    return None if x is None else x.contiguous()


def _wide(scale: torch.Tensor) -> torch.Tensor:
    return scale.float().contiguous()


def _along(b: torch.Tensor, turned: bool) -> tuple[int, int, int]:
    """Elements from expert to expert, column to column and row to row of [e, columns, k], or turned [e, k, columns]."""
    apart, one, two = b.stride()
    return (apart, two, one) if turned else (apart, one, two)


def _route(index: torch.Tensor, experts: int, offset: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Slots in the order of their experts, where each expert's begin, and the choices of a token."""
    numbers, order = torch.sort(index.reshape(-1) - offset, stable=True)
    marks = torch.arange(experts + 1, device=index.device)
    return order.to(torch.int32), torch.searchsorted(numbers, marks, out_int32=True), index.shape[1]


def _sums(rows: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Sums of rows from bound to bound, in f32, always in the same order."""
    return torch.segment_reduce(rows.float(), "sum", offsets=bounds, axis=0, initial=0.0, unsafe=True)
