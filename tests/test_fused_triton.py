"""Triton kernels of losses and experts: against float64 in the interpreter, and compiled for absent GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from offline_record import Recorded

import tessel
from tessel.codegen.fused import grouped_source, loss_source
from tessel.ops.experts import experts_backward_ref, experts_ref
from tessel.ops.loss import linear_cross_entropy_backward_ref, linear_cross_entropy_ref
from tessel.runtime.fused_gpu import GpuExperts, GpuLoss
from tessel.targets import get_target

INTERPRET = get_target("triton-interpret")


def near(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        if w.numel():
            assert (g.double() - w).abs().max() <= 3e-6 * w.abs().max().clamp(min=1e-3)


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("bias", [False, True])
def test_loss(bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    attrs: dict[str, Any] = {"softcap": 3.0, "label_smoothing": 0.1, "ignore_index": 3} if bias else {}
    x, weight, target = torch.randn(19, 21), torch.randn(140, 21) / 4, torch.randint(0, 140, (19,))
    target[::4] = attrs.get("ignore_index", -100)
    operands = (x, weight, torch.randn(140) if bias else None, target)
    kernels = GpuLoss(INTERPRET, tmp_path)
    got = kernels.forward(*operands, **attrs)
    want = linear_cross_entropy_ref(*map(wide, operands), **attrs)
    near(got, want)
    grad = torch.randn(19)
    back = kernels.backward(grad, *operands, got[1], chunk=48, **attrs)
    near(back, linear_cross_entropy_backward_ref(grad.double(), *map(wide, operands), want[1], **attrs))
    with pytest.raises(IndexError, match="Target 140 is out of bounds"):
        kernels.forward(x, weight, None, torch.full((19,), 140))


@pytest.mark.parametrize("act", ["silu", "limited", "gelu", "gelu_tanh", "relu"])
def test_experts(act: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    turned = bias = act in ("limited", "gelu")
    attrs: dict[str, Any] = {"act": act, "interleaved": act == "limited", "turned": turned}
    attrs |= {"alpha": 1.7, "limit": 0.8} if act == "limited" else {}
    t, h, e, i, o = 18, 20, 4, 19, 21
    gate_up, down = torch.randn(e, 2 * i, h) / 4, torch.randn(e, o, i) / 4
    if turned:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = (torch.randn(e, 2 * i), torch.randn(e, o)) if bias else (None, None)
    index = torch.randint(0, e, (t, 2))
    if act == "relu":
        index[:] = 2  # the other experts have nothing
    operands = (torch.randn(t, h), gate_up, biases[0], down, biases[1], index, torch.rand(t, 2))
    kernels = GpuExperts(INTERPRET, tmp_path)
    got = kernels.forward(*operands, keep=True, **attrs)
    want = experts_ref(*map(wide, operands), keep=True, **attrs)
    near(got, want)
    grad = torch.randn(t, o)
    back = kernels.backward(grad, *operands, got[1], **attrs)
    near(back, experts_backward_ref(grad.double(), *map(wide, operands), want[1], **attrs))


def test_whole_graphs_run_by_them() -> None:
    """Through the compiler: forward and gradients of a loss, on the interpreter's target."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = torch.randn(50, 8, requires_grad=True)

    def fn(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    x, target = torch.randn(6, 8), torch.randint(0, 50, (6,))
    fast = tessel.compile(fn, target="triton-interpret")
    want = torch.autograd.grad(fn(x, target), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(fast(x, target), weight)[0], want)
    (reason,) = {c.reason for r in tessel.explain(fast).compilations for c in r.calls if "linear" in c.operator}
    assert reason.startswith("Tessel's kernels")


@pytest.mark.slow
@pytest.mark.parametrize("target", ("a100", "h100", "b200", "mi300x"))
def test_compile_offline(target: str, offline: Recorded) -> None:
    record = get_target(target)
    limited = {"act": "limited", "interleaved": True, "alpha": 1.7, "limit": 7.0}
    half = torch.bfloat16
    sources = [
        loss_source("fold", half, record, {"classes": 32000, "label_smoothing": 0.1, "softcap": 30.0}, True),
        loss_source("gradients", half, record, {"classes": 32000}, False),
        grouped_source("product", half, record, {"bias": True, "scaled": True}),
        grouped_source("inner", half, record, {**limited, "bias": True, "keep": True}),
        grouped_source("back", half, record, {"act": "gelu_tanh"}),
        grouped_source("outer", half, record, {"gathered": "left"}),
    ]
    offline.fitting(sources, record, spills=63)
