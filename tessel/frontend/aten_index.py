"""ATen operators that read or write at computed places, and those that stay calls to a library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..ir.node import Value
from ..ir.types import simplify_dim
from .compat import OpOverload
from .lower import INTEGERS, Lowering, Opaque, Table, axis, nest, register

TABLE: Table = {}

_INDEX = (torch.int64, torch.int32)


def _place(c: Lowering, index: Value) -> Value:
    return index if index.dtype in _INDEX else c.cast(index, torch.int64)


@register(TABLE, "aten.embedding.default")
def _embedding(
    c: Lowering,
    weight: Value,
    index: Value,
    padding_idx: Any = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Value:
    return c("embedding", weight, _place(c, index))


@register(TABLE, "aten.gather.default")
def _gather(c: Lowering, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    if len(x.shape) != len(index.shape):
        raise Opaque("gather with a 0-d tensor or index")
    if not x.shape:
        x, index = c.reshape(x, (1,)), c.reshape(index, (1,))
    got = c("gather", x, _place(c, index), dim=axis(dim, len(x.shape)))
    return c.reshape(got, c.out.shape)


@register(TABLE, "aten.index_select.default")
def _index_select(c: Lowering, x: Value, dim: int, index: Value) -> Value:
    if not x.shape:
        raise Opaque("index_select from a 0-d tensor")
    if not index.shape:
        index = c.reshape(index, (1,))
    return c("index_select", x, _place(c, index), dim=axis(dim, len(x.shape)))


@register(TABLE, "aten.index.Tensor", "aten._unsafe_index.Tensor")
def _index(c: Lowering, x: Value, indices: Sequence[Value | None]) -> Value:
    if any(i is not None and i.dtype not in INTEGERS - {torch.uint8} for i in indices):
        raise Opaque("a mask as an index: the result's size depends on data")
    given = tuple(None if i is None else _place(c, i) for i in indices)
    while given and given[-1] is None:
        given = given[:-1]
    return c("index", x, given) if given else x


# ---------------------------------------------------------------- library calls


def library(name: str) -> Any:
    """An entry that makes the library operator ``name`` of an ATen call, arguments as ATen has them."""

    def lower(c: Lowering, *args: Any, **kwargs: Any) -> Any:
        assert c.node is not None
        if c.node.meta.get("unbacked_bindings"):
            raise Opaque("the result's size depends on data")
        positional, attrs = by_schema(c.node, args, kwargs)
        if any(isinstance(v, Value) for a in attrs.values() for v in (a if isinstance(a, tuple) else (a,))):
            raise Opaque("a tensor among the keyword arguments")
        outs = c.builder.node(c.find(name), *positional, types=c.types, **attrs).outs
        return nest(c.node.meta["val"], iter(outs))

    lower.any_dtype = True  # type: ignore[attr-defined]
    return lower


# Says nothing that the result's type does not say.
_SILENT = ("layout", "pin_memory")


def by_schema(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments in ATen's order, and keyword-only ones by name (``None`` left out).

    Positional arguments that were given by name are put in their place, with defaults before them.
    """
    positional, attrs = list(args), {}
    rest = dict(kwargs)
    target = node.target
    if isinstance(target, OpOverload):
        waiting: list[Any] = []
        for arg in target._schema.arguments[len(args) :]:
            if arg.kwarg_only:
                break
            default = tuple(arg.default_value) if isinstance(arg.default_value, list) else arg.default_value
            waiting.append(rest.pop(arg.name) if arg.name in rest else default)
            if arg.name in kwargs:
                positional += waiting
                waiting = []
    for key, value in rest.items():
        a: Any = value
        if a is None or key in _SILENT:
            continue
        if isinstance(a, torch.device):
            a = str(a)
        if not isinstance(a, int | float | bool | str | tuple | torch.dtype | torch.memory_format | Value):
            raise Opaque(f"the argument {key}")
        attrs[key] = a
    return tuple(positional), attrs


_LIBRARY: dict[str, str] = {
    "convolution": "default",
    "convolution_backward": "default",
    "avg_pool2d": "default",
    "avg_pool2d_backward": "default",
    "max_pool2d_with_indices": "default",
    "max_pool2d_with_indices_backward": "default",
    "upsample_bilinear2d": "default vec",
    "upsample_nearest2d": "default vec",
    "grid_sampler_2d": "default",
    "sort": "default stable",
    "topk": "default",
    "cumsum": "default",
    "cumprod": "default",
    "logcumsumexp": "default",
    "index_put": "default",
    "scatter": "src value reduce value_reduce",
    "scatter_add": "default",
    "scatter_reduce": "two",
    "embedding_dense_backward": "default",
    "histc": "default",
    "rand": "default",
    "randn": "default",
    "randint": "default low",
    "randperm": "default",
    "rand_like": "default",
    "randn_like": "default",
    "bernoulli": "default p Tensor",
    "multinomial": "default",
    "native_dropout": "default",
}
for _target in ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"):
    TABLE[_target] = library("grouped_mm")
for _name, _overloads in _LIBRARY.items():
    for _overload in _overloads.split():
        TABLE[f"aten.{_name}.{_overload}"] = library(_name)
for _name in ("_fft_c2c", "_fft_r2c", "_fft_c2r"):
    TABLE[f"aten.{_name}.default"] = library(_name.removeprefix("_"))
for _name in ("view_as_real", "view_as_complex"):
    TABLE[f"aten.{_name}.default"] = library(_name)


@register(TABLE, "aten.as_strided.default")
def _as_strided(c: Lowering, x: Value, size: Any, stride: Any, storage_offset: Any = None) -> Value:
    """Strides are those of the storage: the call reads the value that the storage belongs to."""
    assert c.node is not None
    owner: Any = c.node.args[0]
    at = storage_offset
    if at is None:
        at = c.offset(owner)
    while owner.op == "call_function" and c.is_view(owner):
        owner = owner.args[0]
    value = c.env[owner]
    if not isinstance(value, Value):
        raise Opaque("as_strided on a part of a tuple")
    if owner.op != "placeholder":
        at = simplify_dim(at - c.offset(owner))
    return c.typed("as_strided", value, tuple(size), tuple(stride), at)
