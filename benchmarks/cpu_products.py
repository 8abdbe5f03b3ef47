"""The time of a model's matrix products alone: what no fusion can go below.

The products of one eager call are recorded with their operands and replayed in their order, each by every library
that can run it; the fastest counts. Weights are as cold as in the model, since all of them are gone through.
Products inside scaled dot-product attention are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_DENSE = {aten.mm.default, aten.addmm.default}
_OTHER = {aten.bmm.default, aten.baddbmm.default, aten.convolution.default, aten._grouped_mm.default}
_SAME = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest element
Run = Callable[[], torch.Tensor]


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DENSE or func in _OTHER:
            grouped = func is aten.convolution.default and args[-1] != 1  # not a product of matrices
            if not grouped:
                self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _ways(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Run]:
    """Torch's own choice, and oneDNN with plain and with packed weights where it gives the same."""
    ways: list[Run] = [lambda: func(*args, **kwargs)]
    linear = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    a, b = args[-2:]
    if func not in _DENSE or kwargs or linear is None or a.dtype not in _SAME or not a.numel():
        return ways
    bias = args[0] if len(args) == 3 else None
    if a.stride(-1) != 1 or 1 not in b.stride() or (bias is not None and bias.dim() != 1):
        return ways
    want = ways[0]()
    for packed in (False, True):
        try:
            w = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), a.shape[0]) if packed else b.t()
            got = linear(a, w, bias, "none", [], "")
        except (RuntimeError, AttributeError):  # this build of torch has no such form
            continue
        if (got - want).abs().amax() <= _SAME[a.dtype] * want.abs().amax().clamp_min(1e-30):
            ways.append(lambda w=w: linear(a, w, bias, "none", [], ""))  # type: ignore[misc]
    return ways


def products(fn: Callable[..., Any], args: Any, kwargs: Any, seconds: float = 4.0) -> dict[str, float]:
    """``{"products_ms": ..., "products": how many, "products_gflop": ...}`` of one call without gradients."""
    with torch.no_grad(), _Record() as record:
        fn(*args, **kwargs)
    with torch.no_grad():
        ways = [_ways(*call) for call in record.calls]
        most = max(map(len, ways), default=0)
        times: list[list[list[float]]] = [[[] for _ in w] for w in ways]
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 4 or (time.perf_counter() < end and rounds < 100):
            for way in range(most):
                for runs, took in zip(ways, times, strict=True):
                    i = min(way, len(runs) - 1)
                    start = time.perf_counter()
                    runs[i]()
                    took[i].append(time.perf_counter() - start)
            rounds += 1
    best = sum(min(statistics.median(t[1:]) for t in took) for took in times)
    flop = sum(_flop(func, args) for func, args, _ in record.calls)
    return {"products_ms": round(best * 1e3, 3), "products": len(ways), "products_gflop": round(flop / 1e9, 3)}


def _flop(func: Any, args: tuple[Any, ...]) -> float:
    """Two operations a multiply-add; only of plain and batched products."""
    if func is aten.convolution.default:
        x, w = args[0], args[1]
        places = x.shape[0]
        for n, k, s, p in zip(x.shape[2:], w.shape[2:], args[3], args[4], strict=True):
            places *= (n + 2 * p - k) // s + 1
        return 2.0 * places * w.numel()
    if func is aten._grouped_mm.default:
        return 2.0 * args[0].numel() * args[1].shape[-1]
    a, b = args[-2:]
    return 2.0 * a.numel() * b.shape[-1]
