"""Graph text: it prints, parses back, and prints as the same text again."""

from __future__ import annotations

import math
import struct

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy import functions as tf  # the classes that captured sizes arrive in

from tessel.errors import TesselError
from tessel.ir.exprs import evaluate, evaluate_size, expr_text, normal
from tessel.ir.node import Graph, Node, Op, make_input
from tessel.ir.text import parse_graph, print_graph
from tessel.ir.types import DTYPES, NOWHERE, Loc, SymType, TensorType, symbol, unbacked

ANY = Op("any_op", "library", dims="", ref=lambda *a, **k: a, infer=None)
EXP = Op("exp", "pointwise", dims="", ref=torch.exp, infer=lambda x: (x,))
KERNEL = Op("kernel", "kernel", dims="", ref=lambda *a: a)
OPS = {op.name: op for op in (ANY, EXP, KERNEL)}
F32 = torch.float32

S0, S1, U0 = symbol("s0"), symbol("s1"), unbacked("u0")


def again(graph: Graph) -> Graph:
    """The graph parsed from its own text, which must print as the same text."""
    text = print_graph(graph)
    got = parse_graph(text, OPS)
    assert print_graph(got) == text
    return got


def one(*args: object, loc: Loc = NOWHERE, **attrs: object) -> Node:
    """A node with these arguments after a round trip."""
    x = make_input("x", TensorType((2,), F32))
    node = Node(ANY, args, attrs, (x.type,), (), loc)
    return again(Graph((x,), (node,), (node.out,))).nodes[0]


# ---------------------------------------------------------------- expressions


def binary(children: st.SearchStrategy) -> st.SearchStrategy:
    pairs = st.tuples(children, children)
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] - p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        pairs.map(lambda p: sympy.Max(*p)),
        pairs.map(lambda p: sympy.Min(*p)),
        pairs.map(lambda p: p[0] // (sympy.Abs(p[1]) + 1)),
        pairs.map(lambda p: p[0] / (sympy.Abs(p[1]) + 2)),
        pairs.map(lambda p: sympy.Mod(p[0], sympy.Abs(p[1]) + 2)),
        pairs.map(lambda p: tf.ModularIndexing(p[0], 2, 3) if p[0].is_integer else p[1]),
        st.tuples(children, st.integers(1, 9)).map(lambda p: sympy.sympify(p[0]) // p[1]),
        st.tuples(children, st.integers(1, 9)).map(lambda p: p[0] % p[1]),
        st.tuples(children, st.sampled_from((2, 3, -1))).map(lambda p: (sympy.Abs(p[0]) + 1) ** p[1]),
        children.map(sympy.ceiling),
    )


SYMBOLS = (S0, S1, U0, symbol("u7"), unbacked("n"))
leaf = st.one_of(st.integers(-9, 9).map(sympy.Integer), st.sampled_from(SYMBOLS))
expressions = st.recursive(leaf, binary, max_leaves=5)


@settings(max_examples=150, deadline=None)
@given(expressions)
def test_expressions_survive(e):
    got = one(e, shape=(e, 1)).args[0]
    assert expr_text(got) == expr_text(e)
    values = {"s0": 5, "s1": 3, "u0": -4, "u7": 2, "n": 11}
    try:
        want = evaluate(e, values)
    except TesselError:
        return  # a division by zero somewhere
    assert math.isclose(evaluate(got, values), want)


@pytest.mark.parametrize(
    ("e", "text"),
    [
        ((S0 + 1) // 2, "(s0+1)//2"),
        (S0 * S1 - 3, "s0*s1-3"),
        (-S0 // 2, "(-s0)//2"),
        (-(S0 // 2), "-(s0//2)"),
        ((S0 // 2) % 4 + 1, "(s0//2)%4+1"),
        (sympy.Max(1, S0 - 7), "Max(1,s0-7)"),
        (sympy.sqrt(S0) / 2, "s0**(1/2)/2"),
        (1 / sympy.sqrt(S0), "s0**(-1/2)"),
        (0.125 * S0, "0.125*s0"),
        (sympy.Ge(U0, 2), "u0>=2"),
        (sympy.Eq(S0 % 8, 0), "Eq(s0%8,0)"),
        (tf.FloorDiv(S0, S1), "s0//s1"),
        (tf.ModularIndexing(S0, 4, S1), "(s0//4)%s1"),
        (tf.ToFloat(S0), "1.0*s0"),
        (tf.CeilDiv(S0, 8), None),
        (tf.PythonMod(S0, S1), "s0%s1"),
        (symbol("u0"), "!u0"),
        (unbacked("n"), "?n"),
        (symbol("f32"), "!f32"),
    ],
)
def test_expression_text(e, text):
    got = one(e).args[0]
    if text is not None:
        assert expr_text(e) == text
    assert got == normal(e)
    kinds = [{(s.name, s.is_positive) for s in x.free_symbols} for x in (got, e)]
    assert kinds[0] == kinds[1]


def test_values_of_expressions():
    assert evaluate_size((S0 + 1) // 2, {"s0": 6}) == 3
    assert evaluate(1 / sympy.sqrt(S0), {"s0": 64}) == 0.125
    assert evaluate(sympy.Eq(S0 % 8, 0), {"s0": 16}) is True
    assert evaluate(tf.CeilDiv(S0, 8), {"s0": 17}) == 3
    with pytest.raises(TesselError, match="no value is known for s0"):
        evaluate(S0 + 1, {})
    with pytest.raises(TesselError, match="not a whole number"):
        evaluate_size(S0 / 2, {"s0": 3})


# ---------------------------------------------------------------- literals

literals = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([*DTYPES.values(), torch.uint4, torch.strided, torch.channels_last]),
        st.just(torch.device("cuda:1")),
        st.sampled_from([S0 * 2, U0, S0 // S1]),
        st.complex_numbers(allow_nan=False),
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


def same(a, b) -> bool:
    """Equal, bit for bit."""
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, float):
        return isinstance(b, float) and struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and a == b


@settings(max_examples=150, deadline=None)
@given(st.lists(literals, max_size=3), st.dictionaries(st.from_regex(r"\A[a-z_][a-z0-9_]{0,5}\Z"), literals))
def test_literals_survive(args, attrs):
    got = one(*args, **{k: v for k, v in attrs.items() if k != "loc"})
    assert same(got.args, tuple(args))
    assert all(same(v, attrs[k]) for k, v in got.attrs.items())


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(), st.text(), st.integers(0, 9999), st.text())
def test_names_and_locs_survive(name, title, file, line, module):
    loc = Loc(file, line, module)
    x = make_input(name, TensorType((), F32), "param", loc)
    got = again(Graph((x,), (), (x.out,), (), title))
    assert got.name == title
    assert got.inputs[0].attrs["name"] == name
    assert got.inputs[0].loc == loc


@pytest.mark.parametrize(
    "t",
    [
        TensorType((), F32),
        TensorType((2, 3), F32, (1, 2)),
        TensorType((S0, S1 + 1), torch.bool),
        TensorType((S0, S1 + 1), torch.int8, (1, S0), "cuda:0"),
        TensorType((S0, 4), torch.bfloat16, (4 * S1, 1), "a device"),
        TensorType((U0, 0, 5), torch.float8_e4m3fn, (0, 0, 0), "meta"),
        TensorType(((S0 + 1) // S1, S0), torch.uint4),
        SymType(S0 * 2),
        SymType(3),
    ],
)
def test_types_survive(t):
    x = make_input("x", t)
    assert again(Graph((x,), (), (x.out,))).inputs[0].types == (t,)


# ---------------------------------------------------------------- graphs


def test_whole_graph():
    x = make_input("x", TensorType((S0, 64), F32))
    w = make_input('layers.0."weight"\n', TensorType((64,), F32), "param")
    inner_x = make_input("a", x.type)
    inner = Node(EXP, (inner_x.out,), {}, (x.type,))
    region = Graph((inner_x,), (inner,), (inner.out,), (), "k0")
    loc = Loc("model.py", 12, "layers.0")
    two = Node(ANY, ((x.out, w.out), None), {"eps": 1e-5}, (x.type, w.type), (), loc)
    none = Node(ANY, (two.outs[1],), {"message": "no result"}, ())
    k = Node(KERNEL, (two.out,), {"family": "pointwise"}, (x.type,), (region, region))
    g = Graph((x, w), (two, none, k), (k.out, 3, S0, None, two.outs[1]), ((w, two.outs[1]),), "forward")
    assert print_graph(g) == (
        'graph "forward"\n'
        '  %0: f32[s0,64] = input "x"\n'
        '  %1: f32[64] = param "layers.0.\\"weight\\"\\n"\n'
        '  %2: f32[s0,64], %3: f32[64] = any_op((%0, %1), None, eps=1e-05)  @ "model.py":12 "layers.0"\n'
        '  any_op(%3, message="no result")\n'
        '  %4: f32[s0,64] = kernel(%2, family="pointwise")\n'
        + (
            '    graph "k0"\n'
            '      %0: f32[s0,64] = input "a"\n'
            "      %1: f32[s0,64] = exp(%0)\n"
            "      return %1\n"
        )
        * 2
        + "  effect %1 := %3\n"
        "  return %4, 3, s0, None, %3\n"
    )
    got = again(g)
    assert got.effects[0][0] is got.inputs[1]
    assert len(got.nodes[2].regions) == 2
    assert got.nodes[1].types == ()


def test_types_left_out_are_inferred():
    text = 'graph "g"\n # a comment\n\n %x: f32[4] = input "x"\n %y = exp(%x) # here too\n return %y'
    g = parse_graph(text, OPS)
    assert g.nodes[0].type == TensorType((4,), F32)


def test_long_and_deep_graphs():
    x = make_input("x", TensorType((2,), F32))
    nodes = [Node(EXP, (x.out,), {}, (x.type,))]
    for _ in range(5000):
        nodes.append(Node(EXP, (nodes[-1].out,), {}, (x.type,)))
    assert len(again(Graph((x,), tuple(nodes), (nodes[-1].out,))).nodes) == 5001


HEAD = 'graph "g"\n  %0: f32[4] = input "x"\n'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  %1: f32[4] = exq(%0)\n return", "line 3, column 16: unknown operator 'exq'; did you mean 'exp'"),
        ("  %1: f32[4] = exp(%7)\n return", "line 3, column 20: %7 is not defined"),
        ("  %0: f32[4] = exp(%0)\n return", "%0 is defined twice"),
        ("  %1: g32[4] = exp(%0)\n return", "unknown dtype 'g32'; did you mean"),
        ("  %1: f32[4] = exp(%0\n return", "expected '\\)', found 'the end of the line'"),
        ("  %1: f32[4] = exp(%0) huh\n return", "unexpected 'huh'"),
        ("  %1: f32[4] = exp(%0 + 1)\n return", "needs numbers or symbols"),
        ("  %1: f32[4] = exp(1//0)\n return", "line 3, column 21"),
        ("  %1: f32[s0%0] = exp(1)\n return", "line 3, column 13"),
        ('  %1: f32[4] = exp("abc)\n return', "a string without its end"),
        ('  %1: f32[4] = exp("\\q")\n return', "unknown escape"),
        ("  %1: f32[4] = exp($)\n return", "unexpected '\\$'"),
        ("  %1: f32[4] = exp(__import__)(1)\n return", "unexpected '\\('"),
        ("  %1: f32[4] = exp(" + "(" * 5000 + "\n return", "nested more than"),
        ("  %1: f32[4] = exp(" + "-" * 5000 + "1)\n return", "nested more than"),
        ("  %1: f32[4] = exp(9**99999)\n return", "too large"),
        ("  %1: f32[4] = exp(torch.load)\n return", "torch.load is no dtype"),
        ("  %1 = any_op(%0)\n return", "cannot infer"),
        ("  %1, %2 = exp(%0)\n return", "exp has 1 results, 2 are named"),
        ("  effect %9 := %0\n return", "%9 is not defined"),
        ("  %1: f32[4] = exp(%0)\n  effect %1 := %0\n return", "overwrites an input"),
        ("  return %0\n  %1: f32[4] = exp(%0)", "after the end"),
        ("", "no 'return' line"),
    ],
)
def test_errors_name_line_and_column(body, message):
    with pytest.raises(TesselError, match=message) as e:
        parse_graph(HEAD + body, OPS)
    assert "\n    " in str(e.value)  # the line's text


def test_unprintable_values_are_refused():
    with pytest.raises(TesselError, match="no text form"):
        one(object())
    with pytest.raises(TesselError, match="not an identifier"):
        one(symbol("a b"))
