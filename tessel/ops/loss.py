"""Losses.

``linear_cross_entropy`` is a linear layer and the cross-entropy of its results in one: of the logits
only what a chunk of tokens has is held at a time. Over a split vocabulary its results merge like
partial sums of exponentials (the idea of online softmax; Wijmans et al. 2024, "Cut your losses").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import check
from ..ir.node import Node, Op, Value
from ..ir.types import Dim, TensorType, dim_equal, product
from .common import arg_types, need_tensor, operand_types, result, table
from .dims import Piece
from .emit import Emit, wide_dtype
from .fold import composite, need_float

REDUCTIONS = ("none", "mean", "sum")


def _infer(x: Any, target: Any, ignore_index: int = -100, reduction: str = "mean") -> tuple[TensorType, ...]:
    need_float("cross_entropy", x)
    need_tensor("cross_entropy", target)
    fits = x.rank == 2 and target.rank == 1 and dim_equal(x.shape[0], target.shape[0])
    check(fits, lambda: f"cross_entropy: {x} and target {target} must be [n, classes] and [n]")
    check(target.dtype == torch.int64, lambda: f"cross_entropy: the target is {target}, it must be i64")
    check(reduction in REDUCTIONS, lambda: f"cross_entropy: reduction {reduction!r} is none of {REDUCTIONS}")
    return (result(target.shape if reduction == "none" else (), x.dtype, x),)


def _dims(node: Node) -> str:
    reduction = node.attrs.get("reduction", "mean")
    if reduction == "none":
        return "n c*, n -> n"
    # The mean counts only rows that are not ignored, so pieces do not weigh by their size.
    return "n+ c*, n+ -> ." if reduction == "sum" else "n* c*, n* -> ."


def _decompose(e: Emit, x: Value, target: Value, ignore_index: int = -100, reduction: str = "mean") -> Value:
    wide, rows = e.wide(x), target.shape[0]
    top = e("amax", wide, dims=(1,), keepdim=True)
    shifted = e("sub", wide, top)
    total = e("log", e("sum", e("exp", shifted), dims=(1,), keepdim=False))
    counted = e("ne", target, ignore_index)
    place = e("where", counted, target, 0)
    picked = e.reshape(e("gather", shifted, e.reshape(place, (rows, 1)), dim=1), (rows,))
    loss = e("where", counted, e("sub", total, picked), 0.0)
    if reduction == "none":
        return loss
    summed = e("sum", loss, dims=(0,), keepdim=False)
    if reduction == "sum":
        return summed
    return e("div", summed, e("sum", e.cast(counted, wide.dtype), dims=(0,), keepdim=False))


def _ref(x: torch.Tensor, target: torch.Tensor, ignore_index: int = -100, reduction: str = "mean") -> torch.Tensor:
    return F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)


def _flops(node: Node) -> Any:
    return 4 * operand_types(node)[0].numel


# ---------------------------------------------------------------- fused with the linear layer


@dataclass(frozen=True)
class LossAttrs:
    """Attributes of ``linear_cross_entropy``, its backward and its gradients, as references and kernels take them.

    Attributes:
        ignore_index: tokens with this target have loss 0.
        label_smoothing: part of the target that is spread over all classes.
        softcap: c: the logits are c * tanh(logits / c); 0: as they are.
        chunk: tokens whose logits a reference holds at a time; 0: as memory allows.
        offset, classes: the weights are those of classes ``offset`` and on, of ``classes`` in all (0: all).
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    chunk: int = 0
    offset: int = 0
    classes: int = 0


_HELD = 1 << 22  # logits that the references hold at a time


def _rows_at_once(classes: int, chunk: int) -> int:
    """How many tokens' logits are held at a time; ``chunk`` 0: as many as make about four million."""
    return chunk or max(1, _HELD // max(classes, 1))


def _counted(target: torch.Tensor, ignore_index: int, classes: int) -> torch.Tensor:
    """Which tokens count.

    Raises:
        IndexError: one that counts is no class, in the words of torch's own kernel.
    """
    counted = target != ignore_index
    wrong = counted & ((target < 0) | (target >= classes))
    if target.device.type == "cpu" and bool(wrong.any()):
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")
    return counted


def _chunks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float, chunk: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Chunks of tokens: where, their logits in f32 (float64 of float64), and the slope of the soft cap there."""
    wide = wide_dtype(x.dtype)
    step = _rows_at_once(weight.shape[0], chunk)
    for i in range(0, x.shape[0], step):
        part = slice(i, i + step)
        logits = (x[part] @ weight.t()).to(wide)
        if bias is not None:
            logits = logits + bias.to(wide)
        slope = None
        if softcap:
            logits = torch.tanh(logits / softcap)
            slope = 1 - logits * logits
            logits = logits * softcap
        yield part, logits, slope


def _places(target: torch.Tensor, counted: torch.Tensor, offset: int, here: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets are among these classes, and their places (0 for the others)."""
    mine = counted & (target >= offset) & (target < offset + here)
    return mine, torch.where(mine, target - offset, 0)


def linear_cross_entropy_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    **attrs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of ``x @ weight.T + bias``, and the log-sum-exp of each token's logits.

    Args:
        x: [n, k]; weight: [v, k]; bias: [v] or None; target: [n] of i64.
        attrs: those of ``LossAttrs``.

    Returns:
        (loss [n], lse [n]) in f32 (float64 of float64). A target of another piece adds nothing to the loss. Nobody
        reads ``lse`` of a token that does not count: kernels leave it out.

    Raises:
        IndexError: a target that is no class.
    """
    a, here = LossAttrs(**attrs), weight.shape[0]
    smoothing, classes = a.label_smoothing, a.classes or here
    counted = _counted(target, a.ignore_index, classes)
    mine, place = _places(target, counted, a.offset, here)
    loss, lse = (x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype)) for _ in range(2))
    for part, logits, _ in _chunks(x, weight, bias, a.softcap, a.chunk):
        lse[part] = torch.logsumexp(logits, 1)
        picked = torch.where(mine[part], logits.gather(1, place[part, None])[:, 0], 0)
        if smoothing:
            picked = (1 - smoothing) * picked + logits.sum(1) * (smoothing / classes)
        loss[part] = torch.where(counted[part], lse[part] - picked, 0)
    return loss, lse


def linear_cross_entropy_backward_ref(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    **attrs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias, given that of the losses; the logits are computed again, a chunk at a time.

    Args:
        grad: [n], in the dtype of ``lse``; what it says of ignored tokens is not read.
        lse: what the forward gave.
        wanted: which of the gradients; the others, and that of no bias, are empty.
    """
    a, wide, here = LossAttrs(**attrs), wide_dtype(x.dtype), weight.shape[0]
    smoothing, classes = a.label_smoothing, a.classes or here
    counted = _counted(target, a.ignore_index, classes)
    mine, place = _places(target, counted, a.offset, here)
    want_x, want_weight, want_bias = wanted[0], wanted[1], wanted[2] and bias is not None
    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    dweight = weight.new_zeros(weight.shape if want_weight else 0, dtype=wide)
    dbias = weight.new_zeros(here if want_bias else 0, dtype=wide)
    for part, logits, slope in _chunks(x, weight, bias, a.softcap, a.chunk):
        d = torch.exp(logits - lse[part, None])
        if smoothing:
            d -= smoothing / classes
        d.scatter_add_(1, place[part, None], torch.where(mine[part], smoothing - 1, 0.0)[:, None].to(wide))
        d = d * grad[part, None]
        d = torch.where(counted[part, None], d if slope is None else d * slope, 0)
        rounded = d.to(x.dtype)
        if want_x:
            dx[part] = rounded @ weight
        if want_weight:
            dweight += (rounded.t() @ x[part]).to(wide)
        if want_bias:
            dbias += d.sum(0)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def linear_cross_entropy_gradients_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    **attrs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses, and the gradients of their sum: the two operators above in one.

    Returns:
        (loss [n], dx, dweight, dbias); what is not wanted is empty.
    """
    loss, lse = linear_cross_entropy_ref(x, weight, bias, target, **attrs)
    ones = torch.ones_like(loss)
    return loss, *linear_cross_entropy_backward_ref(ones, x, weight, bias, target, lse, wanted, **attrs)


def scaled_gradients_ref(
    dx: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor, by: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a sum, times the gradient of that sum.

    Zero stays zero whatever it is multiplied by: from tokens that do not count comes nothing, in a mean over none too.
    """
    one, two, three = (torch.where(d == 0, 0, d.to(by.dtype) * by).to(d.dtype) for d in (dx, dweight, dbias))
    return one, two, three


def _need_linear(name: str, x: Any, weight: Any, bias: Any, target: Any) -> None:
    need_float(name, x)
    need_tensor(name, weight, target)
    fits = x.rank == weight.rank == 2 and target.rank == 1 and dim_equal(x.shape[1], weight.shape[1])
    fits = fits and dim_equal(x.shape[0], target.shape[0]) and x.dtype == weight.dtype
    check(fits, lambda: f"{name}: {x}, {weight} and {target} must be [n, k] and [v, k] of one dtype, and [n]")
    check(target.dtype == torch.int64, lambda: f"{name}: the target is {target}, it must be i64")
    if bias is not None:
        fits = bias.rank == 1 and dim_equal(bias.shape[0], weight.shape[0]) and bias.dtype == weight.dtype
        check(fits, lambda: f"{name}: the bias is {bias}, it must be [v] like {weight}")


def _linear_infer(x: Any, weight: Any, bias: Any, target: Any, **attrs: Any) -> tuple[TensorType, ...]:
    _need_linear("linear_cross_entropy", x, weight, bias, target)
    return (result(target.shape, wide_dtype(x.dtype), x),) * 2


def _linear_backward_infer(
    grad: Any, x: Any, weight: Any, bias: Any, target: Any, lse: Any, wanted: Any = (True,) * 3, **attrs: Any
) -> tuple[TensorType, ...]:
    name = "linear_cross_entropy_backward"
    _need_linear(name, x, weight, bias, target)
    need_tensor(name, grad, lse)
    fits = all(t.rank == 1 and dim_equal(t.shape[0], x.shape[0]) for t in (grad, lse))
    check(fits, lambda: f"{name}: {grad} and {lse} must be [n] like {target}")
    dbias = weight.shape[:1] if wanted[2] and bias is not None else (0,)
    return (
        result(x.shape if wanted[0] else (0,), x.dtype, x),
        result(weight.shape if wanted[1] else (0,), weight.dtype, x),
        result(dbias, weight.dtype, x),
    )


def _gradients_infer(
    x: Any, weight: Any, bias: Any, target: Any, wanted: Any = (True,) * 3, **attrs: Any
) -> tuple[TensorType, ...]:
    loss, lse = _linear_infer(x, weight, bias, target)
    return loss, *_linear_backward_infer(loss, x, weight, bias, target, lse, wanted)


def _scaled_infer(dx: Any, dweight: Any, dbias: Any, by: Any) -> tuple[TensorType, ...]:
    need_tensor("scaled_gradients", dx, dweight, dbias, by)
    check(by.rank == 0, lambda: f"scaled_gradients: {by} must be one number")
    return tuple(result(d.shape, d.dtype, d) for d in (dx, dweight, dbias))


def _linear_dims(node: Node) -> str:
    bias = "v+nll-merge, " if arg_types(node)[2] is not None else ""
    return f"n k*, v+nll-merge k*, {bias}n -> n, n"


def _linear_backward_dims(node: Node) -> str:
    wanted = node.attrs.get("wanted", (True,) * 3)
    has_bias = arg_types(node)[3] is not None
    results = [
        "n+ k*" if wanted[0] else "no_x*",
        "v+ k*" if wanted[1] else "no_weight*",
        "v+" if wanted[2] and has_bias else "no_bias*",
    ]
    return f"n+, n+ k*, v+ k*, {'v+, ' if has_bias else ''}n+, n+ -> {', '.join(results)}"


def _gradients_dims(node: Node) -> str:
    """The whole sum over the classes is needed before any gradient: they stay whole."""
    wanted, has_bias = node.attrs.get("wanted", (True,) * 3), arg_types(node)[2] is not None
    results = [
        "n+ k*" if wanted[0] else "no_x*",
        "v* k*" if wanted[1] else "no_weight*",
        "v*" if wanted[2] and has_bias else "no_bias*",
    ]
    return f"n+ k*, v* k*, {'v*, ' if has_bias else ''}n+ -> n+, {', '.join(results)}"


def _scaled_dims(node: Node) -> str:
    letters = iter("abcdefgh")
    words = [" ".join(next(letters) for _ in range(t.rank)) for t in arg_types(node)[:3]]
    return f"{', '.join(words)}, . -> {', '.join(words)}"


def _split_linear(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """A piece of the vocabulary knows where it begins, and how many classes there are in all."""
    if factor != "v":
        return Piece()
    weight = arg_types(node)[1 if node.op.name == "linear_cross_entropy" else 2]
    attrs = node.attrs
    return Piece({"offset": attrs.get("offset", 0) + start, "classes": attrs.get("classes", 0) or weight.shape[0]})


def _linear_flops(node: Node) -> Dim:
    x, weight = arg_types(node)[1 if node.op.name == "linear_cross_entropy_backward" else 0 :][:2]
    products = 1 if node.op.name == "linear_cross_entropy" else 1 + sum(node.attrs.get("wanted", (True,) * 3)[:2])
    return product((2 * products, *x.shape, weight.shape[0]))


LOSS: dict[str, Op] = table(
    composite(
        "cross_entropy",
        _dims,
        _ref,
        _infer,
        _decompose,
        flops=_flops,
        doc='cross_entropy(x [n, classes], target [n], ignore_index=, reduction="none"|"mean"|"sum")',
    ),
    Op(
        "linear_cross_entropy",
        "library",
        dims=_linear_dims,
        ref=linear_cross_entropy_ref,
        infer=_linear_infer,
        flops=_linear_flops,
        split=_split_linear,
        cost=1000,
        doc="linear_cross_entropy(x [n, k], weight [v, k], bias [v]|None, target [n], ...) -> (loss [n], lse [n])",
    ),
    Op(
        "linear_cross_entropy_backward",
        "library",
        dims=_linear_backward_dims,
        ref=linear_cross_entropy_backward_ref,
        infer=_linear_backward_infer,
        flops=_linear_flops,
        split=_split_linear,
        cost=1000,
        doc="linear_cross_entropy_backward(grad [n], x, weight, bias|None, target, lse, ...) -> (dx, dweight, dbias)",
    ),
    Op(
        "linear_cross_entropy_gradients",
        "library",
        dims=_gradients_dims,
        ref=linear_cross_entropy_gradients_ref,
        infer=_gradients_infer,
        flops=_linear_flops,
        cost=1000,
        doc="linear_cross_entropy_gradients(x, weight, bias|None, target, ...) -> (loss [n], dx, dweight, dbias)",
    ),
    Op(
        "scaled_gradients",
        "library",
        dims=_scaled_dims,
        ref=scaled_gradients_ref,
        infer=_scaled_infer,
        doc="scaled_gradients(dx, dweight, dbias, by []) -> (dx, dweight, dbias)",
    ),
)
