"""Canonicalize on random graphs, and the tables that its rules rest on, value by value."""

from __future__ import annotations

import contextlib
import random
from collections import Counter

import golden_files as golden
import pytest
import torch

from tessel.errors import TesselError
from tessel.ir.interp import interpret
from tessel.ir.node import Builder, Graph, Value, make_input
from tessel.ir.rewrite import Rule, apply_rules, storage_root
from tessel.ir.text import parse_graph, print_graph
from tessel.ir.types import TensorType, symbol
from tessel.ir.verify import verify
from tessel.ops import OPS
from tessel.passes import canonicalize, decompose
from tessel.passes._fold import FOLDABLE, FOLDED, fold, rounded
from tessel.passes._value_rules import exact

S0 = symbol("s0")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
SHAPES = ((S0, 3, 4), (3, 4), (1, 4), (S0, 1, 4), (4,), (1,), (S0, 3, 1), (1, 3, 4))
NUMBERS = (0, 1, -1, 2, 3, 0.0, -0.0, 1.0, 0.5, -0.5, 2.0, True, float("inf"), float("nan"))
FLOAT_UNARY = ("neg", "abs", "exp", "relu", "sqrt", "floor", "copy")
BINARY = (
    "add",
    "sub",
    "mul",
    "maximum",
    "minimum",
    "lt",
    "eq",
    "ne",
    "logical_and",
    "div",
    "pow",
    "where",
    "bitwise_and",
)
NOT_ON_BOOL = ("neg", "sub", "abs", "relu", "pow", "maximum", "minimum")  # torch has none, or not all


def random_graph(seed: int, size: int = 25) -> Graph:
    """A graph of ops that the rules look at, on a handful of shapes and dtypes."""
    rng = random.Random(seed)
    inputs = []
    for i in range(4):
        shape, dtype = rng.choice(SHAPES), rng.choice(DTYPES)
        t = TensorType(shape, dtype)
        if len(shape) == 2 and rng.random() < 0.5:
            t = t.with_(shape=shape, strides=(1, shape[0]))
        inputs.append(make_input(f"x{i}", t))
    inputs.append(make_input("sized", TensorType((S0,), torch.float32)))
    b = Builder(inputs)
    values = [i.out for i in inputs]

    def add(op: str, *args: object, **attrs: object) -> None:
        if op in NOT_ON_BOOL and any(isinstance(a, Value) and a.dtype == torch.bool for a in args):
            return
        with contextlib.suppress(TesselError):  # these types do not go together; another node is tried
            values.append(b.add(OPS[op], *args, **attrs))

    while len(b.nodes) < size:
        x = rng.choice(values)
        rank, shape = x.type.rank, x.shape
        kind = rng.choice(("unary", "binary", "binary", "binary", "view", "view", "full", "cast", "other"))
        if kind == "unary":
            add(rng.choice((*FLOAT_UNARY, "logical_not", "bitwise_not", "isnan")), x)
        elif kind == "binary":
            op = rng.choice(BINARY)
            y = rng.choice((rng.choice(NUMBERS), rng.choice([v for v in values if v.dtype == x.dtype])))
            if op == "where":
                conditions = [v for v in values if v.dtype == torch.bool]
                if conditions and (x.dtype.is_floating_point or not isinstance(y, float)):
                    add("where", rng.choice(conditions), *rng.sample((x, y), 2))
            elif op != "pow" or (
                not isinstance(y, Value) and (x.dtype.is_floating_point or y in (0, 1, 2, 3))
            ):
                add(op, *((x, y) if rng.random() < 0.7 or op == "pow" else (y, x)))
        elif kind == "view":
            op = rng.choice(("reshape", "permute", "expand", "slice", "flip", "ones"))
            if op == "ones":
                add("reshape", x, shape=(1, *shape))
            elif op == "reshape":
                add("reshape", x, shape=rng.choice((x.shape, (x.type.numel,), *SHAPES)))
            elif op == "permute" and rank:
                add("permute", x, dims=tuple(rng.sample(range(rank), rank)))
            elif op == "expand":
                add("expand", x, shape=rng.choice(((2, *shape), *SHAPES)))
            elif op == "slice" and rank:
                dim = rng.randrange(rank)
                start, step = rng.choice(((0, 1), (0, 1), (1, 1), (0, 2)))
                n = shape[dim]
                if isinstance(n, int) and n > start:
                    add("slice", x, dim=dim, start=start, size=(n - start + step - 1) // step, step=step)
            elif op == "flip":
                add("flip", x, dims=tuple(d for d in range(rank) if rng.random() < 0.4))
        elif kind == "full":
            dtype = rng.choice(DTYPES)
            number = rng.choice(NUMBERS)
            if isinstance(number, float) and not dtype.is_floating_point:
                number = int(rng.random() < 0.5)
            add("full", shape=rng.choice(SHAPES), value=number, dtype=dtype)
        elif kind == "cast":
            to = rng.choice(DTYPES)
            if not x.dtype.is_floating_point or to.is_floating_point or to == torch.bool:
                add("cast", x, dtype=to)
        elif rank:
            dim = rng.randrange(rank)
            pieces = tuple(v for v in values if v.type.rank == rank and v.dtype == x.dtype)[:2]
            add("cat", rng.choice(((x,), pieces)), dim=dim)
            add("pad", x, low=(0,) * rank, high=tuple(rng.choice((0, 0, 1)) for _ in range(rank)), value=0)
    outputs = rng.sample(values, 6)
    return b.finish(outputs)


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed: int) -> None:
    before = random_graph(seed)
    verify(before, OPS)
    after = canonicalize.run(before)
    verify(after, OPS)
    text = print_graph(after)
    assert print_graph(parse_graph(text, OPS)) == text
    assert print_graph(canonicalize.run(after)) == text
    assert len(after.nodes) <= len(before.nodes) + len(before.outputs)
    for old, new in zip(before.outputs, after.outputs, strict=True):
        assert golden_layout(old) == golden_layout(new)
    inputs = golden.random_inputs(before, {}, (-2, 3), special=True, seed=seed)
    want, got = interpret(before, inputs), interpret(after, inputs)
    assert golden.same_bits(want, got), f"\n{print_graph(before)}\n{text}"
    check_storage(before, after)


def golden_layout(v: Value) -> tuple:
    """What an output's layout is to its reader: strides of sizes above 1."""
    t = v.type
    return t.dtype, t.shape, tuple(s for n, s in zip(t.shape, t.strides, strict=True) if n != 1)


def check_storage(before: Graph, after: Graph) -> None:
    """Outputs alias inputs and one another only where they did."""
    old, new = ([storage_root(v) for v in g.outputs] for g in (before, after))
    for i, (a, x) in enumerate(zip(old, new, strict=True)):
        assert x.op.kind != "input" or x == a
        for b, y in zip(old[:i], new[:i], strict=True):
            assert x != y or a == b


@pytest.mark.parametrize("to", sorted(FOLDED, key=str))
@pytest.mark.parametrize("of", sorted(FOLDED, key=str))
def test_rounding_of_constants_is_torchs(of: torch.dtype, to: torch.dtype) -> None:
    rng = random.Random(0)
    numbers = [*NUMBERS, 65504.0, 65520.0, 3.4e38, 1e-40, 2**31 - 1, -(2**31), 2**62 + 1]
    numbers += [rng.gauss(0, 1) * 10 ** rng.randint(-9, 9) for _ in range(40)]
    for n in numbers:
        held = rounded(n, of)
        if held is None or (got := rounded(held, to)) is None:
            continue
        want = torch.tensor([held], dtype=of).to(to)
        assert golden.same_bits([torch.tensor([got], dtype=to)], [want]), (held, got, want)


@pytest.mark.parametrize("dtype", sorted(FOLDED, key=str))
def test_folded_arithmetic_is_torchs(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    numbers = [
        *NUMBERS,
        65504.0,
        3.4e38,
        1e-40,
        *(rng.gauss(0, 1) * 10 ** rng.randint(-9, 9) for _ in range(20)),
    ]
    held = [n for n in (rounded(n, dtype) for n in numbers) if n is not None]
    checked = 0
    for op in FOLDABLE:
        count = 1 if op in ("neg", "abs", "logical_not", "isnan", "isinf") else 2
        types = [TensorType((1,), dtype)] * count
        try:
            (result,) = OPS[op].infer(*types) if op != "cast" else ()
        except (TesselError, ValueError):
            continue
        for _ in range(100):
            args = tuple(rng.choice(held) for _ in range(count))
            got = fold(op, args, dtype, result.dtype)
            if got is not None:
                want = OPS[op].ref(*(torch.tensor([a], dtype=dtype) for a in args))
                assert golden.same_bits([torch.tensor([got], dtype=result.dtype)], [want]), (
                    op,
                    args,
                    got,
                    want,
                )
                checked += 1
    assert checked > 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_of_every_half(dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    node_in = make_input("x", TensorType((1 << 16,), dtype))
    for exponent in (1, 2, 3, 0.5, -0.5, -1):
        b = Builder((node_in,))
        g = b.finish((b.add(OPS["pow"], node_in.out, exponent),))
        assert golden.same_bits(interpret(g, [x]), interpret(canonicalize.run(g), [x]))
        assert golden.same_bits(interpret(g, [x]), [torch.pow(x, exponent)])  # and both are eager's


def test_powers_of_floats() -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.int32).view(torch.float32)
    node_in = make_input("x", TensorType((100_000,), torch.float32))
    for exponent in (1, 2, 3.0, 0.5, -0.5, -1):
        b = Builder((node_in,))
        g = b.finish((b.add(OPS["pow"], node_in.out, exponent),))
        after = canonicalize.run(g)
        assert all(n.op.name != "pow" for n in after.nodes)
        assert golden.same_bits([torch.pow(x, exponent)], interpret(after, [x]))


HALVES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("a", (*HALVES, torch.int8, torch.uint8, torch.bool))
def test_exact_casts_come_back(a: torch.dtype) -> None:
    bits = torch.arange(1 << (8 * a.itemsize), dtype=torch.int32)
    x = (
        bits.to(torch.bool)
        if a == torch.bool
        else bits.to({1: torch.uint8, 2: torch.int16}[a.itemsize]).view(a)
    )
    for b in (*DTYPES, torch.uint8, torch.int8, torch.int16):
        back = x.to(b).to(a)
        same = (back.double() == x.double()) | x.double().isnan()
        if exact(a, b):
            assert bool(same.all()), (a, b)


def test_statistics_count_rules() -> None:
    text = 'graph "g"\n %x: f32[4] = input "x"\n %a = neg(%x)\n %b = neg(%a)\n %c = exp(%b)'
    text += "\n %d = exp(%x)\n return %c, %d"
    stats: Counter[str] = Counter()
    canonicalize.run(parse_graph(text, OPS), stats)
    assert stats == {"double inverse": 1, "shared": 1}


def test_rules_that_do_not_settle_are_named() -> None:
    g = parse_graph('graph "g"\n %x: f32[4] = input "x"\n %a = neg(%x)\n return %a', OPS)
    back_and_forth = Rule("restless", ("neg",), lambda b, n: b.add(OPS["neg"], *n.args))
    with pytest.raises(TesselError, match="do not settle after 1000 rewrites, the last 'restless'"):
        apply_rules(g, (back_and_forth,))
    with pytest.raises(TesselError, match="rule 'wrong' gave"):
        apply_rules(g, (Rule("wrong", ("neg",), lambda b, n: n.out),))


def test_five_thousand_nodes() -> None:
    x = make_input("x", TensorType((S0, 8), torch.float32))
    b = Builder((x,))
    v = x.out
    for i in range(1250):
        v = b.add(OPS["permute"], v, dims=(1, 0))
        v = b.node(OPS["mul"], v, 1.0, types=(v.type,)).out  # eager keeps the strides
        v = b.add(OPS["permute"], v, dims=(1, 0))
        v = b.add(OPS["silu" if i % 5 == 0 else "exp"], v)
    g = canonicalize.run(decompose.run(canonicalize.run(b.finish((v,)))))
    assert len(g.nodes) == 1500


def test_decompose_keeps_what_it_is_told() -> None:
    text = 'graph "g"\n %x: f32[4] = input "x"\n %a = silu(%x)\n %b = gelu(%a)\n return %b'
    names = [n.op.name for n in decompose.run(parse_graph(text, OPS), keep=("gelu",)).nodes]
    assert names == ["sigmoid", "mul", "gelu"]
