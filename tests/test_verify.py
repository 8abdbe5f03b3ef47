"""The verifier: right graphs pass, and each kind of wrong one is described."""

from __future__ import annotations

import pytest
import torch

from tessel.errors import TesselError
from tessel.ir.node import Graph, Node, Op, Value, make_input
from tessel.ir.types import Loc, SymType, TensorType, symbol, unbacked
from tessel.ir.verify import problems, verify

F32, F16, I64 = torch.float32, torch.float16, torch.int64
S0, U0 = symbol("s0"), unbacked("u0")

EXP = Op("exp", "pointwise", "", torch.exp, infer=lambda x: (x.with_(strides=None),))
ADD = Op("add", "pointwise", "", torch.add)
CALL = Op("call", "library", "", lambda *a: a)
RAND = Op("rand", "library", "", torch.rand_like, random=True)
ITEM = Op(
    "item", "effect", "", lambda x, symbol: x.item(), infer=lambda x, symbol: (SymType(unbacked(symbol)),)
)
CHECK = Op("check", "effect", "", lambda c: (), infer=lambda c: ())
KERNEL = Op("kernel", "kernel", "", lambda *a: a)
OPS = {op.name: op for op in (EXP, ADD, CALL, RAND, ITEM, CHECK, KERNEL)}

T = TensorType((S0, 4), F32)
X = make_input("x", T)


def graph(*nodes: Node, outputs: tuple = (), effects: tuple = (), inputs: tuple = (X,)) -> Graph:
    return Graph(inputs, nodes, outputs, effects)


def said(g: Graph) -> str:
    with pytest.raises(TesselError) as e:
        verify(g, OPS)
    return str(e.value)


def exp(of: Value, t: TensorType = T, **fields) -> Node:
    return Node(EXP, (of,), {}, (t,), **fields)


def test_right_graph():
    y = exp(X.out, TensorType((S0, 4), F32, (1, S0)))  # strides are free
    one = make_input("i", TensorType((), I64))
    item = Node(ITEM, (one.out,), {"symbol": "u0"}, (SymType(U0),))
    sized = Node(CALL, (U0 + S0,), {}, (TensorType((U0,), F32),))
    inner = make_input("a", T)
    region = Graph((inner,), (body := exp(inner.out),), (body.out,))
    kernel = Node(KERNEL, (y.out,), {}, (T,), (region,))
    g = graph(y, item, sized, kernel, outputs=(kernel.out, U0), effects=((X, y.out),), inputs=(X, one))
    verify(g, OPS)
    assert problems(g) == []


def test_every_problem_is_listed_with_its_place():
    a = exp(X.out, TensorType((S0, 5), F32), loc=Loc("model.py", 7, "mlp"))
    b = exp(X.out, TensorType((S0, 4), F16))
    text = said(graph(a, b, outputs=(a.out,)))
    assert text == (
        'graph "graph" is not well formed, 2 problems:\n'
        '  %1: f32[s0,5] = exp(%0)  @ "model.py":7 "mlp"\n'
        "    result 0 is f32[s0,5], but exp gives f32[s0,4] here\n"
        "  %2: f16[s0,4] = exp(%0)\n"
        "    result 0 is f16[s0,4], but exp gives f32[s0,4] here"
    )


def region_of(t: TensorType = T, **changes) -> Graph:
    inner = make_input("a", t)
    body = exp(inner.out, t)
    return Graph((inner,), (body,), (body.out,), name="k0").replace(**changes)


Y = exp(X.out)
RANDOM = Node(RAND, (X.out,), {}, (T,))
HALF = make_input("h", TensorType((S0, 4), F16))
COUNT = make_input("n", TensorType((), I64))
BIND = Node(ITEM, (COUNT.out,), {"symbol": "u0"}, (SymType(U0),))
SIZED = Node(CALL, (U0,), {}, (TensorType((U0,), F32),))
OTHER_EXP = Op("exp", "pointwise", "", torch.exp)

CASES = {
    "order": (graph(exp(Y.out), Y), "reads %2, which is defined below it"),
    "foreign": (graph(exp(Y.out)), "reads a value of exp that is not in this graph"),
    "result index": (
        graph(Node(CALL, (Value(Y, 3),), {}, (T,)), inputs=(X,)),
        "reads result 3 of exp, which has 1",
    ),
    "twice": (graph(Y, Y), "is listed twice"),
    "input among nodes": (graph(make_input("y", T)), "an input stands among the nodes"),
    "node among inputs": (graph(inputs=(X, Y)), "is listed as an input but is none"),
    "same name": (graph(inputs=(X, make_input("x", T))), 'another input is named "x"'),
    "same input": (graph(inputs=(X, X)), "is listed twice as an input"),
    "unknown op": (graph(Node(Op("odd", "library", "", abs), (), {}, (T,))), "has none of that name"),
    "another op": (graph(Node(OTHER_EXP, (X.out,), {}, (T,))), "has another one of that name"),
    "dtypes": (
        graph(Node(ADD, (X.out, HALF.out), {}, (T,)), inputs=(X, HALF)),
        "operands are f16, f32; cast them to one dtype",
    ),
    "number of results": (graph(Node(EXP, (X.out,), {}, (T, T))), "has 2 results, but exp gives 1"),
    "refused arguments": (graph(Node(EXP, (X.out, X.out), {}, (T,))), "exp refuses it: TypeError"),
    "unbound": (graph(SIZED, BIND, inputs=(X, COUNT)), "u0 used before anything gives a value"),
    "unbound type": (graph(Node(CALL, (), {}, (TensorType((U0,), F32),))), "u0 in the result's type"),
    "unbound backed": (graph(Node(CALL, (symbol("s9"),), {}, (T,))), "s9 used before anything gives a value"),
    "bound twice": (graph(BIND, BIND.replace(), inputs=(X, COUNT)), "symbol u0 has a value already"),
    "unbound output": (graph(outputs=(U0 + 1,)), "u0: nothing gives a value"),
    "foreign output": (graph(outputs=((Y.out,),)), "a value of exp is not computed in this graph"),
    "effect on a node": (graph(Y, effects=((Y, X.out),)), "overwrites something that is no input"),
    "effect value": (graph(effects=((X, Y.out),)), "effect %0 := %?\n    a value of exp is not computed"),
    "effect type": (
        graph(inputs=(X, HALF), effects=((X, HALF.out),)),
        "the input is f32[s0,4], the value f16[s0,4]",
    ),
    "effect twice": (graph(Y, effects=((X, Y.out), (X, Y.out))), "this input is overwritten twice"),
    "region inputs": (
        graph(Node(KERNEL, (X.out, X.out), {}, (T,), (region_of(),))),
        'region "k0": 1 inputs for 2 arguments',
    ),
    "region input type": (
        graph(Node(KERNEL, (X.out,), {}, (T,), (region_of(TensorType((4,), F32)),))),
        "input 0 is f32[4], the argument is f32[s0,4]",
    ),
    "region result": (
        graph(Node(KERNEL, (X.out,), {}, (T, T), (region_of(),))),
        "returns 1 values for 2 results",
    ),
    "region result type": (
        graph(Node(KERNEL, (X.out,), {}, (T.with_(dtype=F16),), (region_of(),))),
        "result 0 is f16[s0,4], the region returns f32[s0,4]",
    ),
    "region body": (
        graph(Node(KERNEL, (X.out,), {}, (T,), (region_of(outputs=(Y.out,)),))),
        "a value of exp is not computed in this graph",
    ),
    "region symbols": (
        graph(
            Node(KERNEL, (X.out,), {}, (T,), (region_of(TensorType((symbol("s5"), 4), F32)),)),
        ),
        "s5: no value is known outside the region",
    ),
    "region effect": (
        graph(
            Node(
                KERNEL,
                (X.out,),
                {},
                (T,),
                ((r := region_of()).replace(effects=((r.inputs[0], r.outputs[0]),)),),
            )
        ),
        "a region cannot have effects",
    ),
    "random in region": (
        graph(
            Node(KERNEL, (X.out,), {}, (T,), (Graph((X,), (RANDOM,), (RANDOM.out,)),)),
        ),
        "random draws and effects keep their order",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_graphs(name):
    g, message = CASES[name]
    if message is None:
        assert problems(g) == []
    else:
        assert message in said(g)


def test_attributes_without_a_text_form_are_refused():
    assert "%1 = call(...)\n    attribute box: a value of type set has no text form" in said(
        graph(Node(CALL, (), {"box": {1}}, (T,)))
    )
