"""The axes of nodes and groups, and which groups may become one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tessel.ir.node import Builder, Node, Value, make_input
from tessel.ir.types import TensorType, symbol
from tessel.ops import OPS
from tessel.tiles.axes import Axes, axes_of, join

S = symbol("s")


class Make:
    """A builder whose operators are methods: ``m.add(x, y)`` is a value."""

    def __init__(self) -> None:
        self.b = Builder()

    def input(self, *shape: Any) -> Value:
        return make_input(f"x{len(self.b.inputs)}", TensorType(shape, torch.float32)).out

    def __getattr__(self, op: str) -> Any:
        return lambda *args, **attrs: self.b.add(OPS[op], *args, **attrs)


def group(*values: Value) -> Axes | str:
    """The nodes of some values joined one after another, each with what it reads of the earlier ones."""
    got: Axes | str = axes_of(values[0].node)
    made = set(values[0].node.outs)
    for v in values[1:]:
        if isinstance(got, str):
            return got
        here = axes_of(v.node)
        through = [u for u in dict.fromkeys(v.node.operands) if u in made]
        shared = [u for u in here.reads if u in got.reads and u not in through]
        got = join(got, here, through, shared=shared)
        made |= set(v.node.outs)
    return got


def view(v: Value, *views: Node) -> Axes:
    """The axes of a node with the views that it reads taken in."""
    axes = axes_of(v.node)
    for node in views:
        got = join(axes_of(node), axes, (node.out,))
        assert isinstance(got, Axes), got
        axes = got
    return axes


def extents(axes: Axes, which: frozenset[int]) -> list[Any]:
    return sorted((axes.extent[a] for a in which), key=str)


def test_axes_of_nodes() -> None:
    m = Make()
    x, w, row = m.input(4, S), m.input(S, 6), m.input(1, S)
    a = axes_of(m.add(x, row).node)
    assert extents(a, a.parallel) == [4, S] and not a.reduced
    assert a.reads[row] == (((), a.layouts[x][1]),), "a broadcast dim has no axis"
    r = axes_of(m.sum(x, dims=(1,), keepdim=True).node)
    assert extents(r, r.parallel) == [4] and extents(r, r.reduced) == [S]
    p = axes_of(m.matmul(x, w).node)
    assert extents(p, p.parallel) == [4, 6] and extents(p, p.reduced) == [S]
    s = axes_of(m.slice(x, dim=0, start=1, size=2, step=1).node)
    assert s.computed == () and x in s.moved and s.layouts[x][1] == s.layouts[m.b.nodes[-1].out][1]
    e = axes_of(m.embedding(w, make_input("i", TensorType((3,), torch.int64)).out).node)
    assert w in e.moved and extents(e, e.parallel) == [3, 6]


def test_a_chain_is_one_space() -> None:
    m = Make()
    x = m.input(4, S)
    a = m.exp(x)
    b = m.neg(a)
    c = m.add(b, x)
    got = group(a, b, c)
    assert isinstance(got, Axes) and len(got.domain) == 2
    assert got.layouts[a] == got.layouts[c] == got.layouts[x]


def test_softmax_and_layer_norm_are_one_space() -> None:
    m = Make()
    x, w = m.input(4, S), m.input(S)
    top = m.amax(x, dims=(1,), keepdim=True)
    d = m.sub(x, top)
    e = m.exp(d)
    total = m.sum(e, dims=(1,), keepdim=True)
    y = m.div(e, total)
    z = m.mul(y, w)
    got = group(top, d, e, total, y, z)
    assert isinstance(got, Axes), got
    assert extents(got, got.parallel) == [4] and extents(got, got.reduced) == [S]
    assert got.layouts[z] == got.layouts[x], "what follows a reduction runs over the axis it folded"
    assert len(got.reads[x]) == 1, "x is read at one place"


def test_a_broadcast_after_a_reduction_of_another_tensor() -> None:
    m = Make()
    x, y = m.input(4, 6), m.input(4, 6)
    mean = m.sum(y, dims=(1,), keepdim=True)
    got = group(mean, m.sub(x, mean))
    assert isinstance(got, Axes) and len(got.domain) == 2
    z = m.input(4, 8)
    assert "left over" in str(group(mean, m.sub(z, mean)))


def test_a_split_axis_closes_as_a_whole() -> None:
    m = Make()
    x, y = m.input(3, 4, 6), m.input(3, 24)
    got = group(total := m.sum(x, dims=(1, 2), keepdim=False), m.reshape(total, shape=(3, 1)))
    assert isinstance(got, Axes)
    total = m.sum(x, dims=(1, 2), keepdim=False)
    column = m.reshape(total, shape=(3, 1))
    z = m.sub(y, column)
    got = join(axes_of(total.node), view(z, column.node), (total,))
    assert isinstance(got, Axes), got
    assert [got.extent[a] for a in got.layouts[z][1]] == [4, 6]


def test_transposed_self_add_is_refused() -> None:
    m = Make()
    x = m.input(4, 4)
    a = m.exp(x)
    t = m.permute(a, dims=(1, 0))
    both = view(m.add(a, t), t.node)
    assert len(both.reads[a]) == 2
    assert "one" in str(join(axes_of(a.node), both, (a,)))
    alone = view(m.neg(t), t.node)
    got = join(axes_of(a.node), alone, (a,))
    assert isinstance(got, Axes), "one transposed read is just other loop names"
    assert got.layouts[a] == got.layouts[t][::-1]


@pytest.mark.parametrize("how", ["slice", "flip", "cat", "pad", "gather"])
def test_what_moves_is_no_plain_read(how: str) -> None:
    m = Make()
    x = m.input(4, 6)
    a = m.exp(x)
    moved = {
        "slice": lambda: m.slice(a, dim=1, start=1, size=3, step=2),
        "flip": lambda: m.flip(a, dims=(1,)),
        "cat": lambda: m.cat((a, a), dim=1),
        "pad": lambda: m.pad(a, low=(0, 1), high=(0, 0), value=0.0),
        "gather": lambda: m.gather(a, make_input("i", TensorType((4, 6), torch.int64)).out, dim=1),
    }[how]()
    axes = axes_of(moved.node)
    assert a in axes.moved
    if axes.computed == ():
        axes = view(m.neg(moved), moved.node)
        assert a in axes.moved, "and so it is through a view"
    got = join(axes_of(a.node), axes, (a,))
    assert "other places" in str(got)
    inline = join(axes_of(a.node), axes, (a,), inline=True)
    assert isinstance(inline, Axes) and a not in inline.computed and x in inline.moved


def test_reductions_over_different_axes_are_refused() -> None:
    m = Make()
    x = m.input(4, 6)
    rows, columns = m.sum(x, dims=(1,), keepdim=True), m.sum(x, dims=(0,), keepdim=True)
    why = join(axes_of(rows.node), axes_of(columns.node), (), shared=(x,))
    assert "folds other axes" in str(why)
    again = m.sum(rows, dims=(0,), keepdim=False)
    assert isinstance(group(rows, again), str), "a reduction of a reduction"
    both = m.sum(x, dims=(0, 1), keepdim=False)
    assert isinstance(join(axes_of(rows.node), axes_of(both.node), (), shared=(x,)), str)


def test_what_would_be_recomputed_is_refused() -> None:
    m = Make()
    x, row = m.input(4, 6), m.input(6)
    a = m.exp(row)
    assert "again and again" in str(group(a, m.add(x, a)))
    column = m.exp(m.input(4, 1))
    assert "again and again" in str(group(column, m.add(x, column)))


def test_outer_sum_of_one_vector() -> None:
    m = Make()
    v = m.exp(m.input(4))
    column = m.reshape(v, shape=(4, 1))
    got = join(axes_of(v.node), view(m.add(v, column), column.node), (v,))
    assert isinstance(got, str)


def test_reshapes_refine_axes() -> None:
    m = Make()
    a = m.exp(m.input(8 * S, 6))
    r = m.reshape(a, shape=(2, 4 * S, 6))
    b = m.neg(r)
    got = join(axes_of(a.node), view(b, r.node), (a,))
    assert isinstance(got, Axes)
    assert [got.extent[x] for x in got.layouts[a][0]] == [2, 4 * S]
    flat = m.reshape(b, shape=(48 * S,))
    c = m.exp(flat)
    got = join(got, view(c, flat.node), (b,))
    assert isinstance(got, Axes)
    assert [got.extent[x] for x in got.layouts[c][0]] == [2, 4 * S, 6]
    odd = m.reshape(m.exp(m.input(4, 6)), shape=(3, 8))
    assert odd.node.operands[0] in axes_of(odd.node).moved, "4 x 6 and 3 x 8 have no common axes"


def test_a_shared_read_joins_siblings() -> None:
    m = Make()
    x = m.input(4, 6)
    a, b = m.exp(x), m.neg(x)
    got = join(axes_of(a.node), axes_of(b.node), (), shared=(x,))
    assert isinstance(got, Axes) and len(got.domain) == 2 and len(got.reads[x]) == 1
    t = m.permute(x, dims=(1, 0))
    c = m.neg(t)
    got = join(axes_of(a.node), view(c, t.node), (), shared=(x,))
    assert isinstance(got, Axes) and got.layouts[c] == got.layouts[a][::-1]


def test_matmul_and_its_epilogue() -> None:
    m = Make()
    p = m.matmul(m.input(4, 8), m.input(8, 6))
    y = m.add(p, m.input(6))
    got = group(p, y)
    assert isinstance(got, Axes) and extents(got, got.parallel) == [4, 6] and extents(got, got.reduced) == [8]
