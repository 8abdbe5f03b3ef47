"""Calls to torch: operators with no generated kernel (yet), and the fallback for everything else.

Positional arguments are those of the ATen operator of that name, keyword-only ones are attributes;
tuples stand for lists. Their types are what the importer saw. ``call`` takes any operator by its
full name; nothing is known of it, so nothing of it may be split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from ..errors import TesselError
from ..ir.nested import leaves
from ..ir.node import Node, Op, Value
from ..ir.types import Dim, TensorType, dim_equal, product
from .common import along, axis, is_one, letters, operand_types, table, whole_dims, words
from .dims import Piece, Window, divide
from .index import index_words


@cache
def torch_op(target: str) -> Callable[..., Any]:
    """The torch operator of a full name: ``namespace.name`` or ``namespace.name.overload``.

    Raises ``TesselError`` if this torch has none of that name.

    >>> torch_op("aten.relu.default")
    <OpOverload(op='aten.relu', overload='default')>
    """
    found: Any = torch.ops
    for part in target.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise TesselError(
                f"torch {torch.__version__} has no operator {target}; is its package imported?"
            ) from None
    return found  # type: ignore[no-any-return]


def aten_ref(name: str) -> Callable[..., Any]:
    """The ATen operator ``name`` (any overload that fits), looked up when it is first called."""

    def ref(*args: Any, **attrs: Any) -> Any:
        got = torch_op(f"aten.{name}")(*args, **attrs)
        return got if isinstance(got, torch.Tensor) else tuple(leaves(got, torch.Tensor))

    return ref


def call_target(target: str) -> Callable[..., Any]:
    """What a call runs: the torch operator of that name, or the function that the target itself carries."""
    carried = getattr(target, "fn", None)
    return torch_op(target) if carried is None else carried


def _call_ref(
    *args: Any,
    target: str,
    kwargs: tuple[tuple[str, Any], ...] = (),
    names: tuple[str, ...] = (),
    symbol: str = "",
) -> Any:
    """``names``: the last arguments are keyword arguments of these names. ``symbol``: the size it binds."""
    cut = len(args) - len(names)
    got = call_target(target)(*args[:cut], **dict(kwargs), **dict(zip(names, args[cut:], strict=True)))
    return got if isinstance(got, torch.Tensor) else tuple(leaves(got, torch.Tensor))


def lib(name: str, dims: Any = whole_dims, target: str = "", ref: Any = None, **fields: Any) -> Op:
    """A library table entry; ``dims`` is whole unless said."""
    return Op(name, "library", dims=dims, ref=ref or aten_ref(target or name), **fields)


def arg(node: Node, place: int, name: str, default: Any) -> Any:
    """An argument given by position or by name."""
    return node.args[place] if len(node.args) > place else node.attrs.get(name, default)


def _dim_of(node: Node, place: int = 1, default: int = -1) -> int:
    return axis(node.op.name, arg(node, place, "dim", default), max(operand_types(node)[0].rank, 1))


# ---------------------------------------------------------------- dims writers


def along_dim(place: int = 1, default: int = -1, mark: str = "*") -> Callable[[Node], str]:
    """Operand and results of one shape; the dimension of argument ``place`` is held."""
    return lambda node: along(
        node, () if not operand_types(node)[0].rank else (_dim_of(node, place, default),), mark
    )


def held_last(n: int) -> Callable[[Node], str]:
    """Leading dimensions map, the last ``n`` stay whole and may change size; all operands alike."""

    def dims(node: Node) -> str:
        count = 0
        sides = []
        for types in (operand_types(node), [t for t in node.types if isinstance(t, TensorType)]):
            side = []
            for t in types:
                lead = letters(t.rank - n)
                side.append([*lead, *(f"w{count + i}*" for i in range(n))])
                count += n
            sides.append(side)
        return words(*sides)

    return dims


def _topk_dims(node: Node) -> str:
    (x,) = operand_types(node)
    if not x.rank:
        return ". -> ., ."
    d = _dim_of(node, 2)
    before = [w + "*" if i == d else w for i, w in enumerate(letters(x.rank))]
    after = [w + "_k*" if i == d else w for i, w in enumerate(letters(x.rank))]
    return words([before], [after, after])


def _scatter_dims(reduced: bool) -> Callable[[Node], str]:
    """self, (dim), index[, src] -> self: the other dimensions map where all sizes agree."""

    def dims(node: Node) -> str:
        types = operand_types(node)
        if not types[0].rank:
            return whole_dims(node)
        d = axis(node.op.name, node.args[1], types[0].rank)
        out, index, source = [], [], []
        for i, w in enumerate(letters(types[0].rank)):
            if i == d:
                out.append(w + "_v*")
                index.append(w + ("+" if reduced else "*"))
                source.append(index[-1] if dim_equal(types[-1].shape[i], types[1].shape[i]) else w + "_s*")
            elif all(dim_equal(t.shape[i], types[0].shape[i]) for t in types[1:]):
                out.append(w)
                index.append(w)
                source.append(w)
            else:
                out.append(w + "_v*")
                index.append(w + "_i*")
                source.append(w + "_s*")
        if index[d] != source[d]:  # a longer source is not cut where the index is
            index[d] = letters(1, d)[0] + "*"
        return words([out, index, source][: len(types)], [out])

    return dims


def _first_once(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """What is added to counts once."""
    factors = node.op.dims(node) if callable(node.op.dims) else node.op.dims
    return Piece(once=(0,)) if f"{factor}+" in factors else Piece()


def _index_add_dims(node: Node) -> str:
    x, index = operand_types(node)[:2]
    if not x.rank or not index.rank:
        return whole_dims(node)
    d = axis(node.op.name, node.args[1], x.rank)
    mark = "+" if node.op.name == "index_add" else "*"
    out = [w + "_v*" if i == d else w for i, w in enumerate(letters(x.rank))]
    at = letters(1, d)[0] + mark
    return words([out, [at], [at if i == d else w for i, w in enumerate(letters(x.rank))]], [out])


def _index_put_dims(node: Node) -> str:
    indices = [i.type if isinstance(i, Value) else None for i in node.args[1]]
    types = operand_types(node)
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return whole_dims(node)
    x, values = types[0], types[-1]
    read, at, made = index_words(node.op.name, x, indices)
    mark = "+" if arg(node, 3, "accumulate", False) else "*"
    given = made[len(made) - values.rank :]
    given = ["1" if is_one(n) else w for w, n in zip(given, values.shape, strict=True)]

    # Places that the values do not have are written again by every piece: those stay whole.
    def marked(w: str) -> str:
        if not w[0].isupper():
            return w
        return w + (mark if mark == "*" or w in given else "*")

    return words([read, *([marked(w) for w in i] for i in at), [marked(w) for w in given]], [read])


def _histc_dims(node: Node) -> str:
    (x,) = operand_types(node)
    low, high = arg(node, 2, "min", 0), arg(node, 3, "max", 0)
    mark = "*" if low == high else "+"  # without a range the data's own is taken
    return words([[w + mark for w in letters(x.rank)]], [["bins*"]])


def _grid_dims(node: Node) -> str:
    return "n c h* w*, n y x u* -> n c y x"


def _fft_dims(node: Node) -> str:
    (x,) = operand_types(node)
    held = {axis(node.op.name, d, x.rank) for d in node.args[1]}
    names = [(w, i in held) for i, w in enumerate(letters(x.rank))]
    return words([[w + "*" if h else w for w, h in names]], [[w + "_f*" if h else w for w, h in names]])


def _real_dims(node: Node) -> str:
    names = letters(min(operand_types(node)[0].rank, node.type.rank))
    one, two = names, [*names, "u*"]
    return words([one], [two]) if node.type.rank > len(names) else words([two], [one])


def _embedding_backward_dims(node: Node) -> str:
    mark = "*" if arg(node, 4, "scale_grad_by_freq", False) else "+"
    places = [w.upper() + mark for w in letters(operand_types(node)[1].rank)]
    return words([[*places, "d"], places], [["v*", "d"]])


# ---------------------------------------------------------------- convolution and pooling


def spread(value: Any, n: int) -> tuple[int, ...]:
    """A number for each of ``n`` spatial dims; one number stands for all."""
    got = tuple(value) if isinstance(value, Sequence) else (value,)
    return got * n if len(got) == 1 else got


def _convolution_dims(node: Node) -> str:
    x, _, *bias = operand_types(node)
    transposed, groups = node.args[6], node.args[8]
    space = letters(x.rank - 2, 7)  # h, i, j
    kernel = [f"k{s}*" for s in space]
    many = not is_one(groups)
    channel, out = ("(g c+)", "(g o)") if many else ("c+", "o")
    if bias and transposed:
        channel = channel.replace("+", "*")
    weight = [channel, "o", *kernel] if transposed else [out, "c*" if "*" in channel else "c+", *kernel]
    before = [s + ("*" if transposed else "^") for s in space]
    after = [s + "_o*" if transposed else s + "^" for s in space]
    return words([["n", channel, *before], weight, *([[out]] if bias else [])], [["n", out, *after]])


def _convolution_split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    x, w, *bias = operand_types(node)
    n = x.rank - 2
    space = letters(n, 7)
    if factor == "g":
        return Piece(args={8: size})
    if factor == "c" and bias:
        return Piece(once=(2,))
    if factor in space and not node.args[6]:
        d = space.index(factor)
        stride, padding, dilation = (spread(node.args[i], n) for i in (3, 4, 5))
        reach = dilation[d] * (w.shape[2 + d] - 1)
        window = Window(stride[d], padding[d], reach - padding[d])
        return Piece(args={4: tuple(0 if i == d else p for i, p in enumerate(padding))}, window=window)
    return Piece()


def _convolution_backward_dims(node: Node) -> str:
    """Rows of the batch and channels; places stay whole, since those of one gradient meet several of the other."""
    x = operand_types(node)[1]
    transposed, groups, wanted = node.args[7], node.args[9], node.args[10]
    space = letters(x.rank - 2, 7)
    held = ([s + "*" for s in space], [f"{s}_o*" for s in space], [f"k{s}*" for s in space])
    channel, out, each = ("c", "o+", "c") if is_one(groups) else ("(g c*)", "(g o*)", "c*")
    if transposed:
        channel, out, each = "c*", "o*", "p*"
    at_x, at_grad = ["n+", channel, *held[0]], ["n+", out, *held[1]]
    weight = ["c*" if transposed else out, each, *held[2]]
    results = [r for r, want in zip((at_x, weight, [out]), wanted, strict=True) if want]
    return words([at_grad, at_x, weight], results)


def _convolution_backward_split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """The number of channels is an argument too."""
    channels = node.args[3]
    if factor == "o" and channels:
        return Piece(args={3: (size,)})
    if factor == "g":
        each = divide(operand_types(node)[0].shape[1], node.args[9])
        return Piece(args={9: size} | ({3: (product((size, each)),)} if channels else {}))
    return Piece()


def _convolution_flops(node: Node) -> Dim:
    x, w = operand_types(node)[:2]
    at = x.shape if node.args[6] else node.type.shape  # each place of it meets the whole kernel
    per_place = product((w.shape[1], *w.shape[2:]))
    return product((2, at[0], *at[2:], w.shape[0], per_place))


def _avg_pool_dims(node: Node) -> str:
    (x,) = operand_types(node)
    lead, space = letters(x.rank - 2), ["y", "x"]
    padding = spread(arg(node, 3, "padding", 0), 2)
    ceil = arg(node, 4, "ceil_mode", False)
    counted = arg(node, 5, "count_include_pad", True)
    if ceil or (any(padding) and not counted):  # the divisor depends on the place
        return words([[*lead, *(s + "*" for s in space)]], [[*lead, *(s + "_o*" for s in space)]])
    shape = [*lead, *(s + "^" for s in space)]
    return words([shape], [shape])


def _avg_pool_split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    if factor not in ("y", "x"):
        return Piece()
    d = ("y", "x").index(factor)
    kernel = spread(node.args[1], 2)
    stride = spread(arg(node, 2, "stride", ()) or kernel, 2)
    padding = spread(arg(node, 3, "padding", 0), 2)
    window = Window(stride[d], padding[d], kernel[d] - 1 - padding[d])
    left = {3: tuple(0 if i == d else p for i, p in enumerate(padding))} if padding[d] else {}
    return Piece(args=left, window=window)


LIBRARY = table(
    lib(
        "convolution",
        _convolution_dims,
        split=_convolution_split,
        flops=_convolution_flops,
        cost=1000,
        doc="convolution(x, w, bias|None, stride, padding, dilation, transposed, output_padding, groups)",
    ),
    lib("convolution_backward", _convolution_backward_dims, split=_convolution_backward_split, cost=1000),
    lib("avg_pool2d", _avg_pool_dims, split=_avg_pool_split),
    lib("max_pool2d_with_indices", held_last(2)),
    lib("avg_pool2d_backward", held_last(2)),
    lib("max_pool2d_with_indices_backward", held_last(2)),
    lib("upsample_bilinear2d", held_last(2)),
    lib("upsample_nearest2d", held_last(2)),
    lib("grid_sampler_2d", _grid_dims),
    lib("sort", along_dim()),
    lib("topk", _topk_dims),
    lib("cumsum", along_dim(mark="+scan")),
    lib("cumprod", along_dim()),
    lib("logcumsumexp", along_dim()),
    lib("index_put", _index_put_dims, split=_first_once),
    lib("index_add", _index_add_dims, split=_first_once),
    lib("index_copy", _index_add_dims),
    lib("scatter", _scatter_dims(False)),
    lib("scatter_add", _scatter_dims(True), split=_first_once),
    lib("scatter_reduce", _scatter_dims(False)),
    lib("embedding_dense_backward", _embedding_backward_dims),
    lib("histc", _histc_dims),
    lib("fft_c2c", _fft_dims, "_fft_c2c"),
    lib("fft_r2c", _fft_dims, "_fft_r2c"),
    lib("fft_c2r", _fft_dims, "_fft_c2r"),
    lib("view_as_real", _real_dims),
    lib("view_as_complex", _real_dims),
    lib("as_strided", whole_dims),
    lib("nonzero"),
    lib("masked_select"),
    Op(
        "call",
        "library",
        dims=whole_dims,
        ref=_call_ref,
        cost=1000,
        doc='call(args..., target="aten.foo.default", kwargs=): any operator of torch, opaque',
    ),
    Op(
        "call_random",
        "library",
        dims=whole_dims,
        ref=_call_ref,
        cost=1000,
        random=True,
        doc="call, for an operator that draws random numbers or must keep its place for another reason",
    ),
)

__all__ = ["LIBRARY", "arg", "aten_ref", "call_target", "lib", "spread", "torch_op"]
