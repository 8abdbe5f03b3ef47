"""fx targets that are not plain operators: reads of numbers, assertions, writes, tokens, regions.

Each handler takes the importer and the fx node and returns what the node stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import check
from ..ir.nested import leaves
from ..ir.node import Graph, Node, Value, make_input
from ..ir.types import symbols_of
from ..ops.loop import check_loop
from .compat import unbacked_bindings
from .lower import VIEWS, nest, target_name
from .opaque import Fallback, Foreign, opaque_call

if TYPE_CHECKING:
    from .importer import Importer


def _drop(importer: Importer, node: fx.Node) -> Any:
    return None


def _item(importer: Importer, node: fx.Node) -> Any:
    """A number read from a tensor: an effect that binds an unbacked symbol."""
    value = importer.scalar(node.meta.get("val"))
    names = list(getattr(value, "free_symbols", ()))
    bound = list(unbacked_bindings(node))
    if not bound and not names:
        return value  # known while tracing
    name = str(bound[0]) if bound else names[0].name
    x = importer.c.reshape(importer.argument(node.args[0]), ())
    importer.builder.node(importer.c.find("item"), x, symbol=name)
    return value


def _assert_scalar(importer: Importer, node: fx.Node) -> Any:
    cond = importer.argument(node.args[0])
    if cond is True:
        return None
    message = str(node.args[1]) if len(node.args) > 1 else "a runtime assertion failed"
    importer.builder.node(importer.c.find("assert_scalar"), cond, message=message)
    return None


def _assert_tensor(importer: Importer, node: fx.Node) -> Any:
    x = importer.argument(node.args[0])
    given = len(node.args) > 1 and isinstance(node.args[1], str)
    message = str(node.args[1]) if given else "Expected Tensor with single nonzero value"
    if x.dtype != torch.bool:
        x = importer.c("ne", x, 0)
    importer.builder.node(importer.c.find("assert_true"), x, message=message)
    if "functional" in target_name(node.target):
        return importer.argument(node.args[2])
    return None


def _copy_into(importer: Importer, node: fx.Node) -> Any:
    """``copy_`` into a graph input, which AOTAutograd puts at the end of the graph."""
    owner: Any = node.args[0]
    target, value = importer.argument(owner), importer.argument(node.args[1])
    importer.c.types, importer.c.node = (target.type,), node
    value = importer.c.expand(importer.c.cast(value, target.dtype), target.shape)
    if target.node.op.kind == "input":
        if value != target:
            importer.effects[target.node] = value
        return value
    # A tensor that the graph made: from here on it is the new value, unless a view would see it change.
    views = [owner, *owner.users] if owner.op == "call_function" else []
    check(
        not any(n is not node and importer.c.is_view(n) for n in views),
        lambda: f"{importer.where(node)}: copy_ into a view; functionalize the graph first",
    )
    importer.env[owner] = value
    return value


def _with_effects(importer: Importer, node: fx.Node) -> Any:
    """An operator with side effects: a call that keeps its place, which is what the token was for."""
    token, target, *args = (importer.env.get(a, a) if isinstance(a, fx.Node) else a for a in node.args)
    given = tuple(map(importer.argument, args))
    kwargs = importer.argument(dict(node.kwargs))
    _, *val = node.meta["val"]
    types = tuple(map(importer.tensor_type, leaves(val, torch.Tensor)))
    reason = "an operator with side effects"
    importer.fallbacks.append(Fallback(node.name, target_name(target), reason, importer.builder.loc))
    outs = opaque_call(importer.c, node, target, given, kwargs, types, ordered=True)
    return (token, *nest(val, iter(outs)))


def _inline(importer: Importer, node: fx.Node) -> Any:
    """A region that only marks its operators: they are imported in its place."""
    gm = next(a.held for a in map(importer.argument, node.args) if isinstance(a, Foreign))
    # What precedes the operands is the region's name or setting, and the module itself.
    operands = [importer.argument(a) for a in node.args[2:]]
    inner = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for n, a in zip(inner, operands, strict=True):
        want = n.meta.get("val")
        if isinstance(a, Value) and a.shape != importer.tensor_type(want).shape:
            # traced with sizes of its own
            types = tuple(map(importer.tensor_type, leaves(node.meta["val"], torch.Tensor)))
            given = tuple(map(importer.argument, node.args))
            return importer.opaque(node, given, {}, node.meta["val"], types, "a higher-order operator")
    importer.env.update(zip(inner, operands, strict=True))
    importer.escaping |= escaping(gm)
    return importer.block(gm)


def _scan(importer: Importer, node: fx.Node) -> Any:
    """A loop over time: its step becomes a region."""
    gm, init, xs, extras = map(importer.argument, node.args)
    val = node.meta["val"]
    types = tuple(map(importer.tensor_type, leaves(val, torch.Tensor)))
    step = type(importer)(gm.held, "step", {}).run()
    region = step.graph
    ordered = any(n.op.random or n.op.kind == "effect" for n in region.nodes)
    if step.constants or region.effects or ordered or not all(isinstance(v, Value) for v in (*init, *xs)):
        why = "a loop whose step holds constants, draws random numbers or has effects"
        return importer.opaque(node, (gm, tuple(init), tuple(xs), tuple(extras)), {}, val, types, why)
    region, extras = _sizes_by_tensors(importer, region, (*init, *xs), extras)
    importer.fallbacks += step.fallbacks
    given = (tuple(init), tuple(xs), extras)
    made = Node(importer.c.find("loop"), given, {}, types, (region,), importer.builder.loc)
    check_loop(made)
    return nest(val, iter(importer.builder.append(made).outs))


def _sizes_by_tensors(
    importer: Importer, region: Graph, others: tuple[Value, ...], extras: Sequence[Any]
) -> tuple[Graph, tuple[Value, ...]]:
    """A step and its extras without those that are sizes: tensors handed in tell them, or else an empty one does."""
    first = len(others)
    told = {d for n in region.inputs for d in getattr(n.out.type, "shape", ())}
    used = {name for n in region.nodes for name in n.symbols()} | symbols_of(region.outputs)
    inputs, kept = list(region.inputs[:first]), []
    for node, extra in zip(region.inputs[first:], extras, strict=True):
        if isinstance(extra, Value):
            inputs.append(node)
            kept.append(extra)
        elif symbols_of([extra]) & used and extra not in told:
            size = importer.c.full((extra, 0), 0, torch.float32)
            inputs.append(make_input(node.attrs["name"], size.type, "input", node.loc))
            kept.append(size)
    return region.replace(inputs=tuple(inputs)), tuple(kept)


def _token(importer: Importer, node: fx.Node) -> Any:
    importer.c.types, importer.c.node = (), node
    return importer.c.full((0,), 0, torch.float32)


SPECIAL: dict[str, Callable[[Importer, fx.Node], Any]] = {
    "aten._local_scalar_dense.default": _item,
    "aten.item.default": _item,
    "aten._assert_scalar.default": _assert_scalar,
    "aten._assert_async.default": _assert_tensor,
    "aten._assert_async.msg": _assert_tensor,
    "aten._functional_assert_async.msg": _assert_tensor,
    "aten._assert_tensor_metadata.default": _drop,
    "aten.sym_constrain_range.default": _drop,
    "aten.sym_constrain_range_for_size.default": _drop,
    "aten.copy_.default": _copy_into,
    "higher_order.with_effects": _with_effects,
    "higher_order.invoke_subgraph": _inline,
    "higher_order.scan": _scan,
    "higher_order.wrap_with_set_grad_enabled": _inline,
    "prims._make_token.default": _token,
    "prims._sink_tokens.default": _drop,
    "aten._make_dep_token.default": _token,
}


def escaping(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose own storage can be seen outside: they leave the graph, perhaps through views.

    A copy among them must stay a copy: its reader may write to it, or relies on its layout.
    """
    seen: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            seen.update(node.all_input_nodes)
        elif node.op == "call_function":
            name = target_name(node.target)
            viewed = node in seen and name in VIEWS
            if viewed or name in _LAYOUT_MATTERS:
                seen.update(node.all_input_nodes)
    return seen


_LAYOUT_MATTERS = frozenset({"aten.as_strided.default", "aten.view.dtype", "aten.copy_.default"})
