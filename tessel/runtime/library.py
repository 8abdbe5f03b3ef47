"""What torch computes: IR operators and opaque calls as torch callables.

Every operator that has no generated kernel at some place runs through here: opaque calls (``call``),
library operators, and any other operator by its plain reference. Aliasing is told per callable, so
that buffer planning knows whose memory a result may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..codegen.steps import Called
from ..ir.node import Node
from ..ops.inplace import INPLACE
from ..ops.library import torch_op

__all__ = ["called", "fast_attention", "fast_attention_backward"]

# Operators whose reference returns (a view of) its argument in some case.
_SHARING = frozenset(
    {"cast", "clamp", "pad", "cat", "where", "as_strided", "view_as_real", "view_as_complex", "rand_like"}
)


def called(
    node: Node,
    attention: str = "auto",
    device: str = "cpu",
    product: Callable[..., torch.Tensor] | None = None,
) -> Called:
    """The callable that runs a node of any kind on torch tensors.

    Args:
        node: a node that is neither a view nor a kernel.
        attention: as ``Options.attention``; "template" asks for the plain definition.
        device: where a node without a device of its own puts what it makes.
        product: what multiplies two matrices, and adds a bias if it is given one, in place of torch's default.

    Raises:
        TesselError: the node's operator has no torch reference, or the target of a call is unknown.
    """
    name = node.op.name
    if "target" in node.attrs:
        return _opaque(node)
    if name in INPLACE:
        return Called(f"op_{name}", _IN_PLACE.get(name) or torch_op(f"aten.{name}"), dict(node.attrs))
    if product is not None and name in ("matmul", "mm", "addmm") and node.type.rank == 2:
        return Called(name, product, owned=True)
    if name in _ATTENTION and attention != "template":
        return Called(name, _ATTENTION[name], dict(node.attrs), owned=True)
    attrs = dict(node.attrs)
    if node.op.kind == "generate" and attrs.get("device") is None:
        attrs["device"] = device
    if node.op.kind == "library":
        attrs.pop("symbol", None)
    owned = node.op.kind not in ("view", "effect", "composite") and name not in _SHARING
    flat = node.op.kind == "library" and len(node.types) > 1
    return Called(f"op_{name}", node.op.ref, attrs, owned, flat=flat)


# The IR drops copies that only change the layout, so a view may meet a tensor that it cannot be a view of.
_AS_RESHAPE: dict[str, Callable[..., Any]] = dict.fromkeys(
    ("aten.view.default", "aten._unsafe_view.default"), torch.reshape
)


def _opaque(node: Node) -> Called:
    """A call by name. Tensors handed over by keyword are the last arguments, ``names`` says which."""
    target = node.attrs["target"]
    held = getattr(target, "fn", None)  # a Python function instead of an operator
    fn = held if held is not None else _AS_RESHAPE.get(str(target)) or torch_op(str(target))
    kwargs = dict(node.attrs.get("kwargs") or ())
    returns = getattr(getattr(fn, "_schema", None), "returns", None)
    simple = returns is not None and all(str(r.type) == "Tensor" for r in returns) and len(returns) == len(node.types)
    names = tuple(node.attrs.get("names") or ())
    return Called(_readable(str(target)), fn, kwargs, _owned_schema(fn), names, flat=not simple)


def _slice_scatter_(x: torch.Tensor, src: torch.Tensor, dim: int, start: int, size: int, step: int = 1) -> torch.Tensor:
    where = [slice(None)] * x.dim()
    where[dim] = slice(start, start + size * step, step)
    x[tuple(where)] = src
    return x


_IN_PLACE: dict[str, Callable[..., Any]] = {"slice_scatter_": _slice_scatter_}


def _readable(target: str) -> str:
    text = target.removesuffix(".default").replace(".", "_").replace("::", "_")
    text = text if not text[:1].isdigit() else f"op_{text}"
    return "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in text)


def _owned_schema(fn: Any) -> bool:
    """Whether the operator's schema promises new memory for every result."""
    schema = getattr(fn, "_schema", None)
    if schema is None:
        return False
    try:
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(fn.name(), "CompositeImplicitAutograd")
    except RuntimeError:
        composite = True
    # Composite operators (dropout, contiguous) may hand back their argument whatever the schema says.
    return not composite and all(r.alias_info is None for r in schema.returns)


def fast_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by torch's own kernel, with its log-sum-exp; by definition where it has none for the case."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    plain = (mask, sink, offset, window, softcap) == (None, None, 0, None, None)
    if q.device.type == "cuda" and half and plain and q.numel() and k.numel() and q.shape[-1] == v.shape[-1]:
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        return flash(q, k, v, 0.0, causal, False, scale=scale)[:2]  # type: ignore[no-any-return]
    edits = (sink, offset, window, softcap)
    return torch.ops.tessel.attention.default(q, k, v, mask, causal, scale, *edits)  # type: ignore[no-any-return]


def fast_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    mask_grad: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The gradients of attention by torch's own kernel; by definition where it has none for the case."""
    how = (causal, scale, offset, window, softcap, mask_grad)
    *grads, dmask, dsink = torch.ops.tessel.attention_backward.default(grad, q, k, v, mask, sink, out, lse, *how)
    return *grads, *((dmask,) if mask_grad else ()), *(() if sink is None else (dsink,))


_ATTENTION: dict[str, Callable[..., Any]] = {"attention": fast_attention, "attention_backward": fast_attention_backward}
