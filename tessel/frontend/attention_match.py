"""Attention that a model writes out by hand becomes the attention operator, in the Dynamo graph or an exported one.

    scores = matmul(q, k.transpose(-1, -2)) * scale + bias
    weights = softmax(scores.float(), -1).to(q.dtype)
    out = matmul(dropout(weights, 0.0), v)
becomes
    out = tessel.attention(q, k, v, bias, False, scale)[0]

Before AOTAutograd, so that forward and backward agree on one operator and gradients (a bias' too) come from it. From
a softmax the matcher walks down to the product with the values and up to the product of queries and keys, and keeps
what lies between as the operator says it: one scale, one soft cap, masks, a sink column. It never guesses: whatever
else it meets, or a score that something else reads, is a ``Refused`` with a reason, and the graph stays as it is.

Rows that hide every key by -inf give zeros, as ``scaled_dot_product_attention`` says; by hand they give NaN.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from .attention_op import attention

# A score further down than this weighs nothing beside one that is not hidden, and swallows what it is added to.
_HIDDEN = -1e30

_CASTS = frozenset({"to", "_to_copy", "type", "type_as", "float", "double", "half", "bfloat16"})
_SAME = _CASTS | {"contiguous", "clone", "alias"}
_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})
_NAMES = dict(
    pair.split(":")
    for pair in "iadd:add isub:sub imul:mul __rmul__:mul multiply:mul divide:div itruediv:div truediv:div "
    "true_divide:div bmm:matmul __matmul__:matmul _softmax:softmax concat:cat slice:getitem".split()
)


class Refused(Exception):
    """Why something that looks like attention is left as it is, in words."""


def value_of(x: Any) -> Any:
    """What a node holds, as an example (a fake tensor, a size); anything else as it is."""
    return x.meta.get("example_value", x.meta.get("val")) if isinstance(x, fx.Node) else x


def op_name(node: Any) -> str:
    """What a node does, one name for the function, the method, the in-place form and the ATen operator; "" if unknown.

    >>> g = fx.Graph()
    >>> op_name(g.call_function(operator.iadd, (1, 2))), op_name(g.call_function(torch.ops.aten.bmm.default))
    ('add', 'matmul')
    """
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        namespace, _, name = packet._qualified_op_name.partition("::")
        if namespace != "aten":
            return ""
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
    name = name.rstrip("_") if not name.startswith("__") else name
    return _NAMES.get(name, name)


def shape_of(x: Any) -> tuple[Any, ...]:
    """The sizes of a node that holds a tensor. Raises ``Refused`` for anything else."""
    value = value_of(x)
    if not isinstance(value, torch.Tensor):
        raise Refused("something between the products is no tensor")
    return tuple(value.shape)


def same_size(a: Any, b: Any) -> bool:
    """Equal, without asking for a new guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and bool(a.node.expr == b.node.expr)


def constant(x: Any) -> float | None:
    """The number that an argument is: a Python number, or a 0-d tensor filled with one."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, fx.Node):
        name = op_name(x)
        if name in _SAME and x.args:
            return constant(x.args[0])
        if name in ("tensor", "scalar_tensor", "lift_fresh_copy") and x.args:
            return constant(x.args[0])
        if name == "full" and not tuple(x.args[0] if len(x.args) > 1 else x.kwargs.get("size", (1,))):  # type: ignore[arg-type]
            return constant(x.args[1] if len(x.args) > 1 else x.kwargs.get("fill_value"))
    return None


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a node's numbers; assertions of its type, which torch.export adds, do not."""
    return [u for u in node.users if op_name(u) != "_assert_tensor_metadata"]


def _only_reader(node: fx.Node) -> fx.Node:
    readers = _readers(node)
    if len(readers) != 1:
        raise Refused("something else reads the weights (a result of the model?)")
    return readers[0]


# ---------------------------------------------------------------- from the weights to the result


@dataclass(frozen=True)
class _Weights:
    """Down from the softmax: the product with the values, whether a last column is dropped on the way."""

    product: fx.Node
    v: fx.Node
    drops_column: bool


def _down(softmax: fx.Node) -> _Weights:
    node, drops = softmax, False
    while True:
        user = _only_reader(node)
        name = op_name(user)
        if name in ("matmul", "baddbmm", "__matmul__") and user.args and user.args[0] is node and name != "baddbmm":
            v = argument(user, 1, "other", user.kwargs.get("mat2"))
            if not isinstance(v, fx.Node):
                raise Refused("the values are no tensor")
            return _Weights(user, v, drops)
        if not user.args or user.args[0] is not node:
            raise Refused(f"the weights are an argument of {name or user.target}")
        if name == "dropout":
            if argument(user, 1, "p", 0.5) != 0 and argument(user, 2, "training", argument(user, 2, "train", True)):
                raise Refused("dropout of the weights")
        elif name == "getitem" and not drops and _drops_last(user, node):
            drops = True
        elif name not in _SAME and not (name in _VIEWS and _same_matrix(user, node)):
            raise Refused(f"{name or user.target} of the weights")
        node = user


def _same_matrix(a: fx.Node, b: fx.Node) -> bool:
    """Whether a view leaves the last two dims alone."""
    x, y = shape_of(a), shape_of(b)
    return len(x) >= 2 and len(y) >= 2 and all(map(same_size, x[-2:], y[-2:]))


def _drops_last(node: fx.Node, of: fx.Node) -> bool:
    """Whether a slice drops one column, the last one."""
    after, before = shape_of(node), shape_of(of)
    index = node.args[1]
    if isinstance(index, int):  # aten.slice(x, dim, start, end)
        full = index in (-1, len(before) - 1) and argument(node, 2, "start", 0) in (0, None)
    else:
        last = index[-1] if isinstance(index, tuple) else index
        full = isinstance(last, slice) and last.start in (0, None) and last.step in (1, None)
    whole = len(after) == len(before) and all(map(same_size, after[:-1], before[:-1]))
    return full and whole and same_size(after[-1] + 1, before[-1])


# ---------------------------------------------------------------- from the weights to queries and keys

# A mask: a coefficient and what is added; or what must be true (+1) or false (-1) for a key to be seen, and what
# is added where it is not.
_Term: TypeAlias = tuple[float, Any]


@dataclass(frozen=True)
class _Scores:
    """What has been met on the way up from the softmax. ``times`` multiplies all that is still above."""

    times: float = 1.0
    added: tuple[_Term, ...] = ()
    seen: tuple[tuple[fx.Node, bool, float], ...] = ()
    softcap: float | None = None
    sink: fx.Node | None = None
    heads: int | None = None
    column: bool = False
    q: Any = None
    kt: Any = None


def _up(node: Any, s: _Scores) -> _Scores:
    """Up to the product of queries and keys; both sides of an addition are tried."""
    while True:
        if not isinstance(node, fx.Node):
            raise Refused("no product of queries and keys")
        name = op_name(node)
        if len(_readers(node)) > 1 and not _only_its_peak(node):
            raise Refused(f"something else reads the scores (the result of {name})")
        if name == "matmul":
            other = argument(node, 1, "other", node.kwargs.get("mat2"))
            return replace(s, q=node.args[0], kt=other)
        if name == "baddbmm":
            return _baddbmm(node, s)
        if name in ("add", "sub"):
            return _sum(node, name, s)
        before = node.args[0] if node.args else None
        if name in _SAME:
            pass
        elif name in ("mul", "div"):
            before, factor = _scaled(node, name)
            s = replace(s, times=s.times * factor)
        elif name == "masked_fill":
            fill = constant(argument(node, 2, "value"))
            s = _hide(s, argument(node, 1, "mask"), False, fill)
        elif name == "where":
            before, s = _where(node, s)
        elif name == "tanh":
            if s.softcap is not None:
                raise Refused("a second soft cap")
            s = replace(s, softcap=s.times, times=1.0)
        elif name == "cat":
            before, s = _sink(node, s)
        elif name in _VIEWS and isinstance(before, fx.Node) and _same_matrix(node, before):
            s = _heads(node, before, s)
        else:
            raise Refused(f"{name or node.op} among the score edits")
        node = before


def _only_its_peak(node: fx.Node) -> bool:
    """Whether the other readers are the greatest score and its subtraction, which change no softmax."""
    readers = _readers(node)
    return len(readers) == 2 and any(op_name(u) in ("max", "amax") for u in readers)


def _free_of_rows(node: fx.Node) -> bool:
    """Whether a value is the same for all keys of a row."""
    shape = shape_of(node)
    return len(shape) >= 1 and isinstance(shape[-1], int) and shape[-1] == 1


def _sum(node: fx.Node, name: str, s: _Scores) -> _Scores:
    if argument(node, 2, "alpha", 1) != 1:
        raise Refused("an addition with a factor")
    left, right = node.args[0], argument(node, 1, "other")
    sign = 1.0 if name == "add" else -1.0
    if name == "sub" and isinstance(right, fx.Node) and s.sink is None and s.softcap is None and _free_of_rows(right):
        width = shape_of(node)[-1]
        if not (isinstance(width, int) and width == 1):
            return _up(left, s)  # the same number off every score of a row
    problems: list[Refused] = []
    for path, other, c in ((left, right, sign), (right, left, 1.0)):
        if path is right and name == "sub":
            continue
        if not isinstance(path, fx.Node) or not _full(path, node):
            continue
        try:
            return _up(path, _add(s, c, other))
        except Refused as problem:
            problems.append(problem)
    raise problems[-1] if problems else Refused("no product of queries and keys")


def _full(path: fx.Node, node: fx.Node) -> bool:
    a, b = shape_of(path), shape_of(node)
    return len(a) == len(b) and all(map(same_size, a, b))


def _add(s: _Scores, c: float, other: Any) -> _Scores:
    if s.column or s.softcap is not None:
        raise Refused(f"a bias {'of the scores together with their sink' if s.column else 'inside the soft cap'}")
    if isinstance(other, fx.Node):
        value = value_of(other)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise Refused("something that is no floating tensor is added to the scores")
        return replace(s, added=(*s.added, (c * s.times, other)))
    if constant(other) is None or s.sink is not None:
        raise Refused("a number is added to the scores beside a sink")
    return s  # the same number on every score


def _baddbmm(node: fx.Node, s: _Scores) -> _Scores:
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        raise Refused("baddbmm with factors that are not numbers")
    q, kt = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    if beta != 0:
        s = _add(s, float(beta), node.args[0])
    return replace(s, times=s.times * float(alpha), q=q, kt=kt)


def _scaled(node: fx.Node, name: str) -> tuple[Any, float]:
    left, right = node.args[0], argument(node, 1, "other")
    if name == "mul" and constant(left) is not None:
        left, right = right, left
    factor = constant(right)
    if factor is None or not math.isfinite(factor) or factor <= 0 or node.kwargs.get("rounding_mode"):
        raise Refused(f"scores that are {'multiplied' if name == 'mul' else 'divided'} by what is no positive number")
    return left, factor if name == "mul" else 1.0 / factor


def _hide(s: _Scores, mask: Any, shown: bool, fill: float | None) -> _Scores:
    if not isinstance(mask, fx.Node) or value_of(mask).dtype != torch.bool:
        raise Refused("scores hidden by what is no boolean tensor")
    if fill is None or fill > max(_HIDDEN, float(torch.finfo(torch.float16).min)) or math.isnan(fill):
        raise Refused(f"scores replaced by {fill}, which does not hide them")
    if s.column or s.softcap is not None:
        raise Refused(f"a mask {'of the scores together with their sink' if s.column else 'inside the soft cap'}")
    return replace(s, seen=(*s.seen, (mask, shown, fill * s.times)))


def _where(node: fx.Node, s: _Scores) -> tuple[Any, _Scores]:
    cond, yes, no = node.args[0], argument(node, 1, "self"), argument(node, 2, "other")
    if node.op == "call_method":  # scores.where(cond, other)
        cond, yes = argument(node, 1, "condition"), node.args[0]
    if constant(no) is not None:
        return yes, _hide(s, cond, True, constant(no))
    if constant(yes) is not None:
        return no, _hide(s, cond, False, constant(yes))
    raise Refused("a choice between two scores")


def _sink(node: fx.Node, s: _Scores) -> tuple[Any, _Scores]:
    """``cat([scores, column], -1)``."""
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not s.column or s.sink is not None or dim not in (-1, 3) or len(parts) != 2:
        raise Refused("scores that are joined with others")
    if s.added or s.seen or s.softcap is not None or s.times != 1.0:
        raise Refused("scores that are edited together with their sink")
    scores, column = parts
    while op_name(column) in ("expand", *_SAME):
        column = column.args[0]
    shape = shape_of(column)
    heads = shape_of(node)[1]
    if len(shape) != 4 or not all(isinstance(n, int) and n == 1 for n in (shape[0], *shape[2:])) or shape[1] != heads:
        raise Refused("a column of scores that differs by more than the head")
    return scores, replace(s, sink=column, column=False)


def _heads(node: fx.Node, before: Any, s: _Scores) -> _Scores:
    """``[b * h, q, k]`` seen as ``[b, h, q, k]``."""
    after, flat = shape_of(node), shape_of(before)
    if len(after) == len(flat):
        return s
    if len(after) != 4 or len(flat) != 3 or not isinstance(after[1], int) or s.heads is not None:
        raise Refused(f"scores seen as {list(after)} and {list(flat)}")
    return replace(s, heads=after[1])


# ---------------------------------------------------------------- the operator


def _strip(node: Any, dtype: torch.dtype) -> Any:
    """An operand before it was cast up from ``dtype``, the operator's own arithmetic is wide."""
    while op_name(node) in _CASTS and value_of(node).dtype != dtype:
        if not isinstance(node.args[0], fx.Node) or value_of(node.args[0]).dtype != dtype:
            break
        node = node.args[0]
    return node


def _untransposed(node: fx.Node) -> fx.Node | None:
    """The operand of a swap of the last two dims."""
    rank, name = len(shape_of(node)), op_name(node)
    if name in ("transpose", "swapaxes") and {node.args[1] % rank, node.args[2] % rank} == {rank - 2, rank - 1}:  # type: ignore[operator]
        return node.args[0]  # type: ignore[return-value]
    if name == "permute":
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        if [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]:  # type: ignore[union-attr,operator]
            return node.args[0]  # type: ignore[return-value]
    return None


def shared_heads(node: fx.Node) -> tuple[fx.Node, int]:
    """Keys or values before their heads were repeated for groups of query heads, and how often; ``(node, 1)`` if not.

    Knows ``x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)`` and ``x.repeat_interleave(n, 1)``.
    """
    name = op_name(node)
    if name == "repeat_interleave" and isinstance(node.args[0], fx.Node):
        times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        if isinstance(times, int) and dim in (1, -3) and len(shape_of(node)) == 4:
            return node.args[0], times
        return node, 1
    chain: list[fx.Node] = []
    at: Any = node
    while isinstance(at, fx.Node) and op_name(at) in (*_VIEWS, "expand", "getitem", "unsqueeze", "clone", "contiguous"):
        if op_name(at) == "getitem" and not isinstance(value_of(at.args[0]), torch.Tensor):
            break
        chain.append(at)
        at = at.args[0]
        wide = [n for n in chain if op_name(n) == "expand"]
        if len(wide) == 1 and len(shape_of(at)) == 4:
            before, spread, after = shape_of(at), shape_of(wide[0]), shape_of(node)
            opened = shape_of(wide[0].args[0])
            fits = len(spread) == 5 and len(after) == 4 and isinstance(spread[2], int) and opened[2] == 1
            fits = (
                fits
                and all(map(same_size, (*spread[:2], *spread[3:]), before))
                and all(map(same_size, (after[0], *after[2:]), (before[0], *before[2:])))
            )
            return (at, spread[2]) if fits else (node, 1)
    return node, 1


@dataclass
class Maker:
    """Adds nodes to a graph, each with the source lines of the node that it stands for."""

    graph: fx.Graph
    like: fx.Node
    made: list[fx.Node] = field(default_factory=list)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        method = isinstance(target, str)
        new = self.graph.call_method(target, args, kwargs) if method else self.graph.call_function(target, args, kwargs)
        new.meta.update({k: m for k, m in self.like.meta.items() if k not in ("example_value", "val")})
        self.made.append(new)
        return new


def _mask(add: Maker, s: _Scores) -> Any:
    """The one mask of a row of terms: added numbers, and -inf or a finite number where a condition fails."""

    def placed(x: Any) -> Any:
        shape = shape_of(x)
        if s.heads is not None and len(shape) == 3:
            one = isinstance(shape[0], int) and shape[0] == 1
            return add("unsqueeze", x, 0) if one else add("unflatten", x, 0, (-1, s.heads))
        return x

    shown = None
    total = None
    for cond, wanted, fill in s.seen:
        one = placed(cond)
        if fill == -math.inf:
            one = one if wanted else add(torch.logical_not, one)
            shown = one if shown is None else add(torch.logical_and, shown, one)
        else:
            # In f32 a fill of a wider range than the scores' own is still one.
            low = add(torch.full, (), fill, dtype=torch.float32, device=value_of(cond).device)
            zero = add(torch.full, (), 0.0, dtype=torch.float32, device=value_of(cond).device)
            one = add(torch.where, one, zero, low) if wanted else add(torch.where, one, low, zero)
            total = one if total is None else add(torch.add, total, one)
    for c, term in s.added:
        one = placed(term)
        one = one if c == 1.0 else add(torch.mul, one, c)
        total = one if total is None else add(torch.add, total, one)
    if total is None or shown is None:
        return shown if total is None else total
    return add("masked_fill", total, add(torch.logical_not, shown), -math.inf)


def rewrite(softmax: fx.Node) -> fx.Node:
    """Replace the attention around a softmax by the operator; the node of the result.

    Raises:
        Refused: it is something else, or in a form that the operator does not say.
    """
    shape = shape_of(softmax)
    dim = argument(softmax, 1, "dim")
    if dim not in (-1, len(shape) - 1) or len(shape) not in (3, 4):
        raise Refused("a softmax that is not over the keys")
    down = _down(softmax)
    if value_of(softmax).dtype == torch.float64 != value_of(down.v).dtype:
        raise Refused("weights computed in float64")
    s = _up(softmax.args[0], _Scores(column=down.drops_column))
    if s.column:
        raise Refused("a column of weights is dropped that no sink gave")
    q, kt, v = s.q, s.kt, down.v
    if not all(isinstance(x, fx.Node) for x in (q, kt)):
        raise Refused("queries or keys are no tensor")
    dtype = value_of(v).dtype
    q, kt = _strip(q, dtype), _strip(kt, dtype)
    k = _untransposed(kt)
    k = k if k is None else _strip(k, dtype)
    keys = kt if k is None else k
    types = {value_of(x).dtype for x in (q, keys, v)}
    autocast = torch.is_autocast_enabled(value_of(v).device.type) or value_of(down.product).dtype != dtype
    if not dtype.is_floating_point or (len(types) > 1 and not autocast):
        raise Refused(f"operands of different dtypes, {', '.join(sorted(map(str, types)))}")
    if len({value_of(x).device for x in (q, keys, v)}) > 1:
        raise Refused("operands on different devices")
    _check_shapes(q, keys, k is not None, v, s.heads)
    graph, product = down.product.graph, down.product
    result = value_of(product)
    with graph.inserting_before(product):
        add = Maker(graph, product)
        k = add("transpose", kt, -1, -2) if k is None else k
        rank = len(shape_of(q))
        if rank == 3:
            heads = s.heads
            opened = [add("unflatten", x, 0, (-1, heads)) if heads else add("unsqueeze", x, 0) for x in (q, k, v)]
        else:
            opened = [q, *whole_groups(k, v)]
        mask = _mask(add, s)
        scale = s.times * (s.softcap or 1.0)
        sink = None if s.sink is None else add("reshape", s.sink, (-1,))
        pair = add(attention, *opened, mask, False, scale, sink, 0, None, s.softcap)
        out = add(operator.getitem, pair, 0)
        if rank == 3:
            out = add("flatten", out, 0, 1) if s.heads else add("squeeze", out, 0)
        if not autocast and result.dtype != dtype:
            out = add("to", out, result.dtype)
        out = add("contiguous", out)  # as a product is: a later view may rely on it
    out.meta = dict(product.meta)
    product.replace_all_uses_with(out)
    _erase(product)
    return out


_CHAIN = frozenset(
    {"matmul", "baddbmm", "add", "sub", "mul", "div", "masked_fill", "where", "tanh", "softmax", "dropout", "cat"}
    | {"getitem", "max", "amax", "expand", "transpose", "permute"}
    | _VIEWS
    | _SAME
)


def _erase(node: fx.Node) -> None:
    """Take a node and what only it needed out of the graph, as far as it is arithmetic on intermediate values."""
    stack = [node]
    while stack:
        at = stack.pop()
        if _readers(at) or op_name(at) not in _CHAIN:
            continue
        for assertion in list(at.users):
            assertion.graph.erase_node(assertion)
        above = at.all_input_nodes
        if any(n.op == "placeholder" for n in above[:1]) and at is not node:
            continue  # an in-place form would change an input
        at.graph.erase_node(at)
        stack += [n for n in above if n not in stack]


def whole_groups(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values with the heads they had before they were repeated for groups, if both were, alike."""
    (kk, n), (vv, m) = shared_heads(k), shared_heads(v)
    return (kk, vv) if n == m and n > 1 else (k, v)


def _check_shapes(q: fx.Node, keys: fx.Node, plain: bool, v: fx.Node, heads: int | None) -> None:
    a, b, c = shape_of(q), shape_of(keys), shape_of(v)
    b = b if plain else (*b[:-2], b[-1], b[-2])
    if not len(a) == len(b) == len(c) or len(a) not in (3, 4):
        raise Refused(f"queries {list(a)}, keys {list(b)} and values {list(c)}")
    same = [(a[0], b[0]), (a[0], c[0]), *zip(b[1:-1], c[1:-1], strict=True), (a[-1], b[-1])]
    if len(a) == 4:
        ok = same_size(a[1], b[1]) or (isinstance(a[1], int) and isinstance(b[1], int) and b[1] and a[1] % b[1] == 0)
        if not ok or (not same_size(a[1], b[1]) and b[1] != 1):  # matmul broadcasts one head, it repeats none
            raise Refused(f"queries {list(a)} and keys {list(b)} broadcast")
    if not all(same_size(*pair) for pair in same):
        raise Refused(f"queries {list(a)}, keys {list(b)} and values {list(c)} broadcast")


def _looks_like_attention(softmax: fx.Node) -> bool:
    """Whether a softmax has a product of two computed tensors above it, near, worth a word if it is left alone."""
    stack: list[tuple[Any, int]] = [(softmax.args[0] if softmax.args else None, 8)]
    while stack:
        node, left = stack.pop()
        if op_name(node) in ("matmul", "baddbmm"):
            return True
        if isinstance(node, fx.Node) and left and op_name(node) not in ("linear", "addmm"):
            stack += [(a, left - 1) for a in node.args if isinstance(a, fx.Node)]
    return False


def join_attention(gm: fx.GraphModule) -> tuple[int, list[str]]:
    """Rewrite ``gm`` in place: how many attentions were found, and why others were left alone."""
    count, notes = 0, []
    for node in list(gm.graph.nodes):
        if op_name(node) != "softmax" or not node.args:
            continue
        try:
            rewrite(node)
            count += 1
        except Refused as problem:
            if _looks_like_attention(node):
                notes.append(f"attention written out at {node.name} stays as it is: {problem}")
    if count:
        gm.graph.lint()
        gm.recompile()
    return count, notes


__all__ = [
    "Maker",
    "Refused",
    "argument",
    "join_attention",
    "op_name",
    "rewrite",
    "same_size",
    "shared_heads",
    "value_of",
    "whole_groups",
]
