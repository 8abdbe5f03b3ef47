"""The interpreter: symbols are bound, results checked, inputs left alone, floats widened on request."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tessel.errors import TesselError
from tessel.ir.interp import bind_symbols, interpret
from tessel.ir.node import Graph, Node, Op, make_input
from tessel.ir.types import Loc, SymType, TensorType, symbol, unbacked

F32, F16, F64, I64 = torch.float32, torch.float16, torch.float64, torch.int64
S0, S1, U0 = symbol("s0"), symbol("s1"), unbacked("u0")

ADD = Op("add", "pointwise", "", torch.add)
CAST = Op("cast", "pointwise", "", lambda x, dtype: x.to(dtype))
FULL = Op("full", "generate", "", lambda shape, value, dtype: torch.full(shape, value, dtype=dtype))
ITEM = Op("item", "effect", "", lambda x, symbol: x.item())
NONZERO = Op("nonzero", "library", "", lambda x, symbol: x.nonzero())
SPLIT = Op("split", "library", "", lambda x: (x + 1, x - 1))
KERNEL = Op("kernel", "kernel", "", lambda *a: a)


def t(*shape, dtype=F32, strides=None) -> TensorType:
    return TensorType(shape, dtype, strides)


def test_values_literals_and_results():
    x = make_input("x", t(S0, 3))
    two = Node(SPLIT, (x.out,), {}, (x.type, x.type))
    y = Node(ADD, (two.outs[0], S0 * 2), {}, (x.type,))
    g = Graph((x,), (two, y), (y.out, (two.outs[1], None), S0 + 1, 7))
    data = torch.randn(5, 3)
    got = interpret(g, [data])
    assert torch.equal(got[0], data + 1 + 10)
    assert torch.equal(got[1][0], data - 1) and got[1][1] is None
    assert got[2:] == [6, 7]


def test_effects_are_returned_and_inputs_left_alone():
    x = make_input("x", t(2))
    y = Node(ADD, (x.out, 1), {}, (x.type,))
    data = torch.zeros(2)
    got = interpret(Graph((x,), (y,), (x.out,), ((x, y.out),)), [data])
    assert torch.equal(got[0], torch.zeros(2)) and torch.equal(got[1], torch.ones(2))
    assert torch.equal(data, torch.zeros(2))


@pytest.mark.parametrize(
    ("types", "inputs", "want"),
    [
        ([t(S0, 2 * S1 + 1)], [torch.empty(3, 9)], {"s0": 3, "s1": 4}),
        ([t(S0 * S1), t(S1)], [torch.empty(12), torch.empty(4)], {"s0": 3, "s1": 4}),
        ([t((S0 + 1) // 2), SymType(S0)], [torch.empty(3), 5], {"s0": 5}),
        ([SymType(S0 - 1)], [7], {"s0": 8}),
        ([t(4, 2, strides=(S0, 1))], [torch.empty(4, 9)[:, :2]], {"s0": 9}),
        ([t(S0, strides=(S0,))], [torch.empty(4)], {"s0": 4}),
        ([t(S0**2)], [torch.empty(9)], {}),
    ],
)
def test_symbols(types, inputs, want):
    nodes = tuple(make_input(f"x{i}", ty) for i, ty in enumerate(types))
    assert bind_symbols(Graph(nodes, (), ()), inputs) == want


@pytest.mark.parametrize(
    ("types", "inputs", "message"),
    [
        ([t(2)], [torch.empty(3)], 'input "x0", dim 0: expected size 2, got 3'),
        ([t(S0, S0)], [torch.empty(3, 4)], 'input "x0", dim 1: expected size s0 = 3, got 4'),
        ([t(2 * S0)], [torch.empty(3)], "no whole number makes 2\\*s0 equal to 3"),
        ([t(2)], [torch.empty(2, 1)], 'input "x0" is f32\\[2\\], got f32\\[2, 1\\]'),
        ([t(2)], [torch.empty(2, dtype=I64)], "got i64"),
        ([t(2)], [3], "is a tensor, got int"),
        ([SymType(S0)], [torch.ones(())], "is a host integer, got Tensor"),
        ([t(2)], [], "takes 1 inputs, got 0"),
    ],
)
def test_inputs_that_do_not_fit(types, inputs, message):
    nodes = tuple(make_input(f"x{i}", ty) for i, ty in enumerate(types))
    with pytest.raises(TesselError, match=message):
        interpret(Graph(nodes, (), ()), inputs)


def test_symbol_values_can_be_given():
    full = Node(FULL, (), {"shape": (S0,), "value": 1.0, "dtype": F32}, (t(S0),))
    g = Graph((), (full,), (full.out,))
    assert interpret(g, [], symbols={"s0": 3})[0].shape == (3,)
    with pytest.raises(TesselError, match="full\\(.*no value is known for s0"):
        interpret(g, [])


def test_unbacked_symbols():
    n, x = make_input("n", t(dtype=I64)), make_input("x", t(S0))
    item = Node(ITEM, (n.out,), {"symbol": "u0"}, (SymType(U0),))
    full = Node(FULL, (), {"shape": (U0 + 1,), "value": 2.0, "dtype": F32}, (t(U0 + 1),))
    places = Node(NONZERO, (x.out,), {"symbol": "u1"}, (t(unbacked("u1"), 1, dtype=I64),))
    g = Graph((n, x), (item, full, places), (full.out, places.out, U0, unbacked("u1"), item.out))
    got = interpret(g, [torch.tensor(3), torch.tensor([0.0, 1, 0, 1])])
    assert got[0].shape == (4,) and got[2:] == [3, 2, 3]


def test_kernels_run_their_region():
    x = make_input("x", t(S0))
    a, b = make_input("a", t(S0)), make_input("b", SymType(S0 + 1))
    body = Node(ADD, (a.out, S0), {}, (t(S0),))
    kernel = Node(KERNEL, (x.out, S0 + 1), {}, (t(S0),), (Graph((a, b), (body,), (body.out,)),))
    assert torch.equal(
        interpret(Graph((x,), (kernel,), (kernel.out,)), [torch.ones(3)])[0], torch.full((3,), 4.0)
    )


def test_precise_is_float64_throughout():
    x = make_input("x", t(2, dtype=F16))
    down = Node(CAST, (x.out,), {"dtype": torch.bfloat16}, (t(2, dtype=torch.bfloat16),))
    one = Node(
        FULL, (), {"shape": (2,), "value": 1e-9, "dtype": torch.bfloat16}, (t(2, dtype=torch.bfloat16),)
    )
    add = Node(ADD, (down.out, one.out), {}, (t(2, dtype=torch.bfloat16),))
    whole = Node(CAST, (add.out,), {"dtype": I64}, (t(2, dtype=I64),))
    g = Graph((x,), (down, one, add, whole), (add.out, whole.out))
    data = torch.tensor([1.001, 2.5])
    got = interpret(g, [data], precise=True)
    assert got[0].dtype == F64 and got[1].dtype == I64
    assert torch.equal(got[0], data.double() + 1e-9)
    assert interpret(g, [data.half()])[0].dtype == torch.bfloat16


def test_errors_name_node_and_place():
    x = make_input("x", t(2))
    broken = Op("broken", "library", "", lambda x: 1 / 0)
    where = Loc("model.py", 3, "head")
    node = Node(broken, (x.out,), {}, (x.type,), (), where)
    with pytest.raises(
        TesselError, match=r'broken\(%0\)  @ "model.py":3 "head": the reference raised ZeroDiv'
    ) as e:
        interpret(Graph((x,), (node,), ()), [torch.ones(2)])
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    wrong = Node(ADD, (x.out, 1), {}, (t(3),))
    with pytest.raises(TesselError, match=r"gave f32\[2\], the type says f32\[3\]"):
        interpret(Graph((x,), (wrong,), ()), [torch.ones(2)])
    with pytest.raises(TesselError, match="reads a value of add before it is computed"):
        interpret(Graph((x,), (Node(ADD, (wrong.out, 1), {}, (x.type,)), wrong), ()), [torch.ones(2)])


def test_dead_values_are_freed():
    alive: list[weakref.ref] = []

    def ref(x: torch.Tensor) -> torch.Tensor:
        gc.collect()
        assert sum(r() is not None for r in alive) <= 1
        got = x + 1
        alive.append(weakref.ref(got))
        return got

    op = Op("watched", "pointwise", "", ref)
    x = make_input("x", t(2))
    nodes = [Node(op, (x.out,), {}, (x.type,))]
    for _ in range(5):
        nodes.append(Node(op, (nodes[-1].out,), {}, (x.type,)))
    assert torch.equal(
        interpret(Graph((x,), tuple(nodes), (nodes[-1].out,)), [torch.zeros(2)])[0], torch.full((2,), 6.0)
    )
