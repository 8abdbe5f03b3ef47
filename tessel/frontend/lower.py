"""What the entries of the ATen table work with: the builder, the fx node at hand, dtype rules.

An entry is ``fn(c: Lowering, *args, **kwargs)`` with the ATen arguments, tensors replaced by ``Value``,
symbolic sizes by sympy expressions and lists by tuples. It appends nodes and returns the value (or the
tuple of values) of the fx node. It raises ``Opaque`` for a form that has no IR operators: the importer
then makes an opaque call and keeps the reason for ``explain``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import sympy
import torch

from ..errors import TesselError
from ..ir.node import Builder, Op, Value
from ..ir.types import Dim, TensorType, dim_equal, product, simplify_dim
from .compat import HigherOrderOperator, OpOverload

Entry: TypeAlias = Callable[..., Any]
Table: TypeAlias = dict[str, Entry]

HALF = frozenset({torch.float16, torch.bfloat16})
INTEGERS = frozenset(
    {
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
)
FLOATS = frozenset({torch.float64, torch.float32, *HALF})
# Everything else (complex, float8, quantized) only passes through opaque calls.
PLAIN = INTEGERS | FLOATS | {torch.bool}


# What shares storage with its first argument in eager.
VIEWS = frozenset(
    "aten.view.default aten._unsafe_view.default aten.reshape.default aten._reshape_alias.default "
    "aten.permute.default aten.t.default aten.transpose.int aten.expand.default aten.unsqueeze.default "
    "aten.squeeze.default aten.squeeze.dim aten.squeeze.dims aten.slice.Tensor aten.select.int "
    "aten.narrow.default aten.alias.default aten.detach.default aten.split.Tensor aten.chunk.default "
    "aten.split_with_sizes.default aten.unbind.int _operator.getitem aten.as_strided.default "
    "aten.diagonal.default aten.unfold.default aten.view_as_real.default aten.view_as_complex.default "
    "aten.view.dtype aten.flatten.using_ints aten.unflatten.int aten.lift_fresh.default "
    "aten._conj.default aten.numpy_T.default aten.mT.default".split()
)


def target_name(target: Any) -> str:
    """The name of an fx target: ``aten.add.Tensor``, ``higher_order.cond``, ``_operator.mul``."""
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def nest(val: Any, outs: Iterator[Value]) -> Any:
    """Flat tensor results put where the fake result ``val`` has its tensors."""
    if isinstance(val, torch.Tensor):
        return next(outs)
    if isinstance(val, dict):
        return {k: nest(v, outs) for k, v in val.items()}
    return tuple(nest(v, outs) for v in val) if isinstance(val, tuple | list) else None


class Opaque(Exception):
    """This form of the operator has no IR operators: make an opaque call. The text is the reason."""


def merge(*tables: Table) -> Table:
    """One table of several; a target that comes twice raises ``TesselError``."""
    out: Table = {}
    for table in tables:
        for name, entry in table.items():
            if name in out:
                raise TesselError(f"the ATen target {name} is in the table twice")
            out[name] = entry
    return out


class Lowering:
    """Builds the IR of one fx node after another.

    Attributes:
        builder: where nodes go.
        types: the type of each tensor result of the fx node at hand, as eager has it.
        node: the fx node at hand, for its metadata.
        device: what a type without a device stands for.
        env: what each fx node became.
        offset: the storage offset of an fx node's tensor, in elements.
    """

    def __init__(self, builder: Builder, ops: dict[str, Op], hints: dict[str, int], device: str) -> None:
        self.builder = builder
        self.device = device
        self.table = ops
        self.hints = hints
        self.env: dict[torch.fx.Node, Any] = {}
        self.offset: Callable[[torch.fx.Node], Dim] = lambda node: 0
        self.callees = 0
        self.types: tuple[TensorType, ...] = ()
        self.node: torch.fx.Node | None = None

    # ------------------------------------------------------------ results

    @property
    def out(self) -> TensorType:
        """The type eager gives the first tensor result."""
        return self.types[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.types[0].dtype

    # ------------------------------------------------------------ nodes

    def find(self, name: str) -> Op:
        """The operator of that name."""
        op = self.table.get(name)
        if op is None:
            raise TesselError(f"internal error: the importer needs an IR operator {name!r}, not defined")
        return op

    def __call__(self, name: str, *args: Any, **attrs: Any) -> Value:
        """Append ``name(*args, **attrs)`` and return its first result."""
        return self.builder.add(self.find(name), *args, **attrs)

    def many(self, name: str, *args: Any, **attrs: Any) -> tuple[Value, ...]:
        """Append ``name(*args, **attrs)`` and return all its results."""
        return self.builder.node(self.find(name), *args, **attrs).outs

    def typed(self, name: str, *args: Any, types: Sequence[TensorType] | None = None, **attrs: Any) -> Any:
        """Append a library call whose result types are eager's (or ``types``)."""
        given = tuple(self.types if types is None else types)
        outs = self.builder.node(self.find(name), *args, types=given, **attrs).outs
        return outs[0] if len(outs) == 1 else outs

    def is_view(self, node: torch.fx.Node) -> bool:
        """Whether eager's result shares its storage with the first argument."""
        return target_name(node.target) in VIEWS

    def unique_callee(self, name: str) -> str:
        """A name for a Python function that a call carries."""
        self.callees += 1
        return f"{name}#{self.callees}"

    # ------------------------------------------------------------ dtypes

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """``x`` in that dtype; ``x`` itself if it already is."""
        return x if x.dtype == dtype else self("cast", x, dtype=dtype)

    def operand(self, x: Any, dtype: torch.dtype) -> Any:
        """A tensor cast to ``dtype``, or a literal that fits it."""
        if isinstance(x, Value):
            return self.cast(x, dtype)
        return literal(x, dtype)

    def pointwise(self, name: str, *args: Any, dtype: torch.dtype | None = None) -> Value:
        """A pointwise operator on operands brought to one dtype (by default the result's)."""
        dtype = self.dtype if dtype is None else dtype
        return self(name, *(self.operand(a, dtype) for a in args))

    def wide(self, x: Value) -> Value:
        """f16 and bf16 as f32, in which torch computes them; other dtypes as they are."""
        return self.cast(x, torch.float32) if x.dtype in HALF else x

    # ------------------------------------------------------------ shapes

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """``x`` with that shape; ``x`` itself if it has it."""
        if same_shape(x.shape, shape):
            return x
        return self("reshape", x, shape=tuple(shape))

    def permute(self, x: Value, dims: Sequence[int]) -> Value:
        dims = tuple(dims)
        return x if dims == tuple(range(len(dims))) else self("permute", x, dims=dims)

    def transpose(self, x: Value) -> Value:
        """The last two axes swapped."""
        rank = len(x.shape)
        return self.permute(x, (*range(rank - 2), rank - 1, rank - 2))

    def expand(self, x: Value, shape: Sequence[Dim]) -> Value:
        """``x`` broadcast to that shape."""
        if same_shape(x.shape, shape):
            return x
        lead = len(shape) - len(x.shape)
        if lead:
            x = self.reshape(x, (*(1,) * lead, *x.shape))
        return x if same_shape(x.shape, shape) else self("expand", x, shape=tuple(shape))

    def unsqueeze(self, x: Value, *dims: int) -> Value:
        """Axes of size one put in at these places (places in the result, in rising order)."""
        shape = list(x.shape)
        for d in dims:
            shape.insert(d, 1)
        return self.reshape(x, shape)

    def slice(self, x: Value, dim: int, start: Dim, size: Dim, step: Dim = 1) -> Value:
        if step == 1 and dim_equal(size, x.shape[dim]):
            return x
        return self("slice", x, dim=dim, start=start, size=size, step=step)

    def full(self, shape: Sequence[Dim], value: Any, dtype: torch.dtype) -> Value:
        return self("full", shape=tuple(shape), value=literal(value, dtype), dtype=dtype, **self.placed())

    def placed(self) -> dict[str, str]:
        """The attribute of a tensor made from nothing that is not on the graph's own device."""
        device = self.types[0].device if self.types else None
        return {} if device is None else {"device": device}

    def iota(self, size: Dim, like: int, rank: int, dtype: torch.dtype = torch.int64) -> Value:
        """0, 1, ... along axis ``like`` of a tensor of ``rank`` axes, the other axes of size one."""
        x = self("iota", shape=(size,), start=0, step=1, dtype=dtype, **self.placed())
        return self.reshape(x, tuple(size if i == like else 1 for i in range(rank)))

    def hint(self, d: Dim) -> int | None:
        """The size in the example inputs, None where it depends on data."""
        if isinstance(d, int):
            return d
        if any(s.name not in self.hints for s in d.free_symbols):
            return None
        got = d.subs({s: self.hints[s.name] for s in d.free_symbols})
        return int(got)

    def known(self, d: Dim, why: str) -> int:
        """Like ``hint``; torch has guarded on the comparison made with it, or the node becomes opaque."""
        got = self.hint(d)
        if got is None:
            raise Opaque(f"{why} depends on data")
        return got


def literal(x: Any, dtype: torch.dtype) -> Any:
    """A Python number or expression as a literal of ``dtype``."""
    if isinstance(x, sympy.Basic):
        return x
    if isinstance(x, complex):
        raise Opaque("complex number")
    if dtype == torch.bool:
        return bool(x)
    if dtype in INTEGERS:
        return int(x)
    return float(x)


def axis(dim: int, rank: int) -> int:
    """A dimension counted from the front; a 0-d tensor counts as having one axis."""
    return dim % max(rank, 1)


def axes(dims: Any, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front; None or an empty list mean all."""
    if dims is None or dims == ():
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    return tuple(axis(d, rank) for d in dims) if rank else ()


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    a, b = tuple(a), tuple(b)
    return a == b or (len(a) == len(b) and all(map(dim_equal, a, b)))


def numel(shape: Sequence[Dim]) -> Dim:
    return product(shape)


def less(a: Dim, b: Dim) -> Dim:
    return simplify_dim(sympy.sympify(a) - b) if not (isinstance(a, int) and isinstance(b, int)) else a - b


def promoted(*args: Any) -> torch.dtype:
    """The dtype torch computes these in: tensors with axes count first, then 0-d ones, then numbers.

    >>> from ..ir.node import make_input
    >>> x = make_input("x", TensorType((3,), torch.int32)).out
    >>> promoted(x, 2), promoted(x, 2.5)
    (torch.int32, torch.float32)
    """
    ranks: list[torch.dtype | None] = [None, None, None]
    for a in args:
        if isinstance(a, Value):
            level, dtype = (0, a.dtype) if a.shape else (1, a.dtype)
        else:
            level, dtype = 2, number_dtype(a)
        seen = ranks[level]
        ranks[level] = dtype if seen is None else torch.promote_types(seen, dtype)
    found = _stronger(_stronger(ranks[0], ranks[1]), ranks[2])
    assert found is not None
    return found


def _stronger(high: torch.dtype | None, low: torch.dtype | None) -> torch.dtype | None:
    """A weaker operand changes the dtype only where its category (bool, integer, float) is higher."""
    if high is None or low is None:
        return low if high is None else high
    if high.is_floating_point or (high in INTEGERS and not low.is_floating_point):
        return high
    return torch.promote_types(high, low)


def number_dtype(x: Any) -> torch.dtype:
    """The dtype a Python number or expression has where nothing else decides."""
    if isinstance(x, bool):
        return torch.bool
    if isinstance(x, int):
        return torch.int64
    if isinstance(x, complex):
        raise Opaque("complex number")
    if isinstance(x, sympy.Basic):
        if x.is_Boolean:  # type: ignore[attr-defined]
            return torch.bool
        return torch.int64 if x.is_integer else torch.get_default_dtype()  # type: ignore[attr-defined]
    return torch.get_default_dtype()


def register(table: Table, *targets: str) -> Callable[[Entry], Entry]:
    """A decorator that enters a function under ATen targets; a repeated target raises."""

    def enter(fn: Entry) -> Entry:
        for target in targets:
            if target in table:
                raise TesselError(f"the ATen target {target} is in the table twice")
            table[target] = fn
        return fn

    return enter

