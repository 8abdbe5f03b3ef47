"""Every operator's dims string is proved, every inferred type compared with what the reference gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from op_samples import EXEMPT, real, samples
from prove_dims import ProofError, Sample, interpret, map_tensors, prove, run, same, type_of

from tessel.errors import TesselError
from tessel.ir.node import Builder, Node, Value, make_input
from tessel.ir.types import TensorType, dim_equal, symbol
from tessel.ops import OPS, dims_of, factor_sizes
from tessel.ops.common import table
from tessel.ops.dims import parse

SAMPLES = list(samples())
COMPOSITE = [s for s in SAMPLES if s.op.kind == "composite"]
S0 = symbol("s0")


@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
def test_dims_are_true(sample: Sample) -> None:
    prove(sample)


def test_every_operator_has_a_sample() -> None:
    sampled = {s.op.name for s in SAMPLES}
    assert not set(EXEMPT) & sampled
    assert sorted(set(OPS) - sampled - set(EXEMPT)) == []
    assert set(EXEMPT) <= set(OPS)


# The cases that the notation was made for: which factors must really have been split.
MUST_SPLIT = {
    "embedding([11,5], [3,7])": {"v", "d", "A", "B"},
    "mean([3,5,7], dims=(0,2), keepdim=True)": {"a", "b", "c"},
    "attention([2,6,5,4], [2,3,7,4], [2,3,7,3], causal=True)": {"b", "g", "r", "s", "t", "e"},
    "attention([2,6,5,4], [2,2,7,4], [2,2,7,3], [2,1,5,7])": {"b", "g", "r", "s", "t", "e"},
    "convolution([2,3,13,9], [5,3,3,2], [5], (3,2), (2,1), (2,1), False, (0,0), 1)": set("ncohi"),
    "convolution([2,6,7,5], [9,2,3,3], [9], (2,1), (1,1), (1,1), False, (0,0), 3)": set("ngcohi"),
    "scatter_add([7,5], 1, [7,9], [7,9])": {"a", "b"},
    "iota(shape=(7), start=3, step=2, dtype=torch.int64)": {"a"},
    "argmax([3,5,7], dims=(1), keepdim=True)": {"a", "b", "c"},
    "matmul([2,3,3,5], [2,3,5,7])": {"A", "B", "m", "k", "n"},
    "cumsum([3,7], 1)": {"a", "b"},
    "reshape([6,35], shape=(2,15,7))": {"a", "b", "c", "d"},
    "attention_backward([2,6,5,3], [2,6,5,4], [2,3,7,4], [2,3,7,3], [2,1,5,7], None, [2,6,5,3], [2,6,5])": set("bgrst"),
}


@pytest.mark.parametrize("name", MUST_SPLIT)
def test_what_was_split(name: str) -> None:
    (sample,) = (s for s in SAMPLES if repr(s) == name)
    assert prove(sample) == MUST_SPLIT[name]


Q_K_V = "attention([2,6,5,4], [2,6,7,4], [2,6,7,3])"
CONV = "convolution([3,4,11], [5,4,3], None, (1), (0), (1), False, (0), 1)"
CONV_BIAS = "convolution([3,4,11], [5,4,3], [5], (2), (1), (1), False, (0), 1)"

# op, sample arguments, a false string, and whether the side record is taken away.
WRONG: list[tuple[str, str, bool]] = [
    ("softmax([3,5,7], dim=1)", "a b c -> a b c", False),
    ("softmax([3,5,7], dim=1)", "a b+ c -> a b+ c", False),
    ("mean([3,5,7], dims=(1), keepdim=False)", "a b+sum c -> a c", False),
    ("amax([3,5,7], dims=(1), keepdim=False)", "a b+min c -> a c", False),
    ("matmul([3,5], [5,7])", "m k, k n -> m n", False),
    ("matmul([3,5], [5,7])", "m k+, k+ n+ -> m n+max, m", False),
    ("permute([2,3,5], dims=(2,0,1))", "a b c -> a b c", False),
    ("reshape([3,5,7], shape=(15,7))", "a b c -> (b a) c", False),
    ("embedding([11,5], [3,7])", "v+ d, A B -> A B d", True),
    ("attention([2,6,5,4], [2,6,7,4], [2,6,7,3], causal=True, scale=0.3)", "", True),
    (Q_K_V, "b h s d*, b h t+sum d*, b h t+sum e -> b h s e, b h s", False),
    (Q_K_V, "b h s d+, b h t* d+, b h t* e -> b h s e, b h s", False),
    ("iota(shape=(7), start=3, step=2, dtype=torch.int64)", "", True),
    ("scatter_add([7,5], 1, [7,9], [7,9])", "", True),
    (CONV, "n c+ h, o c+ k* -> n o h", False),
    (CONV_BIAS, "n c+ h^, o c+ k*, o -> n o h^", True),
    ("sort([3,5,7], 1, True)", "a b c -> a b c, a b c", False),
    ("flip([3,5,7], dims=(0,2))", "a b c -> a b c", False),
    ("layer_norm([3,5,7], [7], [7], ndim=1, eps=1e-05)", "a b c, c, c -> a b c, a b 1, a b 1", False),
    ("argmax([3,5,7], dims=(1), keepdim=True)", "a b+max c -> a 1 c", False),
    ("cumsum([3,7], 1)", "a b -> a b", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dims", "bare"), WRONG)
def test_a_false_string_is_refuted(name: str, dims: str, bare: bool) -> None:
    """The prover itself: a planted wrong string, or a record taken away, must fail."""
    (sample,) = (s for s in SAMPLES if repr(s) == name)
    op = dataclasses.replace(
        sample.op, **({"dims": dims} if dims else {}), **({"split": None} if bare else {})
    )
    with pytest.raises((ProofError, TesselError)):
        prove(dataclasses.replace(sample, op=op))


def test_a_false_type_is_refuted() -> None:
    op = dataclasses.replace(OPS["exp"], infer=lambda x: (x.with_(dtype=torch.float32),))
    with pytest.raises(ProofError, match="infer says"):
        prove(Sample(op, (real(3),)))


# ---------------------------------------------------------------- composites


def decomposed(
    sample: Sample, dtype: torch.dtype | None = None
) -> tuple[Node, list[Node], tuple[Value, ...], Any]:
    def as_dtype(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if dtype is not None and t.dtype == torch.float64 else t

    env: dict[Value, torch.Tensor] = {}

    def value(t: torch.Tensor) -> Value:
        v = make_input("x", type_of(as_dtype(t))).out
        env[v] = as_dtype(t)
        return v

    args = map_tensors(sample.args, value)
    node = Builder().node(sample.op, *args, **sample.attrs)
    builder = Builder()
    assert sample.op.decompose is not None
    outs = sample.op.decompose(builder, node)
    return node, builder.nodes, outs, env


@pytest.mark.parametrize("sample", COMPOSITE, ids=repr)
def test_decomposition_is_the_composite(sample: Sample) -> None:
    node, nodes, outs, env = decomposed(sample)
    assert all(n.op.kind != "composite" for n in nodes)
    got = interpret(nodes, env, outs)
    for g, want, t in zip(got, run(sample.op, sample.args, sample.attrs), node.types, strict=True):
        same(g, want)
        assert type_of(g) == t or not t.contiguous


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted({s.op.name for s in COMPOSITE}))
def test_decomposition_keeps_the_types(name: str, dtype: torch.dtype) -> None:
    for sample in (s for s in COMPOSITE if s.op.name == name):
        node, nodes, outs, env = decomposed(sample, dtype)
        said = [(t.shape, t.dtype) for t in node.types]
        assert [(v.shape, v.dtype) for v in outs] == said
        want = run(sample.op, map_tensors(node.args, lambda x: x) and _values(node.args, env), sample.attrs)
        assert [(tuple(w.shape), w.dtype) for w in want] == said, sample
        if dtype != torch.float32:  # halves are widened before anything is computed
            for n in nodes:
                floats = [v for v in n.operands if v.dtype == dtype]
                assert (
                    not floats or n.op.name == "cast" or n.op.kind in ("view", "index") or not n.operands
                ), n
    assert nodes is not None


def _values(arg: Any, env: dict[Value, torch.Tensor]) -> Any:
    if isinstance(arg, Value):
        return env[arg]
    return tuple(_values(a, env) for a in arg) if isinstance(arg, tuple) else arg


# ---------------------------------------------------------------- types


def ten(*shape: Any, dtype: torch.dtype = torch.float32, strides: Any = None) -> TensorType:
    return TensorType(shape, dtype, strides)


def infer(op: str, *args: Any, **attrs: Any) -> TensorType:
    fn = OPS[op].infer
    assert fn is not None
    return fn(*args, **attrs)[0]


def test_types_with_symbols() -> None:
    x = ten(S0, 6, 4)
    assert infer("add", x, ten(4)).shape == (S0, 6, 4)
    assert infer("add", x, ten(1, 1, 1)).shape == (S0, 6, 4)
    assert infer("reshape", x, shape=(S0, 24)).shape == (S0, 24)
    assert infer("reshape", x, shape=(2 * S0, 12)).shape == (2 * S0, 12)
    assert infer("matmul", ten(S0, 4), ten(4, S0 + 1)).shape == (S0, S0 + 1)
    assert infer("cat", (x, x), dim=0).shape == (2 * S0, 6, 4)
    assert infer("pad", x, low=(1, 0, 0), high=(S0, 0, 0)).shape == (2 * S0 + 1, 6, 4)
    assert infer("expand", ten(1, 4), shape=(S0, 4)).strides == (0, 1)
    assert infer("embedding", ten(9, 4), ten(S0, dtype=torch.int64)).shape == (S0, 4)


def test_views_have_the_strides_of_torch() -> None:
    x = real(4, 6, 5)
    t = type_of(x)
    for got, op, attrs in (
        (x.permute(2, 0, 1), "permute", {"dims": (2, 0, 1)}),
        (x[:, 1:6:2], "slice", {"dim": 1, "start": 1, "size": 3, "step": 2}),
        (x[:, None].expand(4, 3, 6, 5)[:, 0], "expand", {"shape": (4, 6, 5)}),
        (x.reshape(4, 2, 15), "reshape", {"shape": (4, 2, 15)}),
    ):
        assert infer(op, t, **attrs).strides == got.stride(), op
    y = x.permute(1, 0, 2)  # (6, 4, 5), strides (5, 30, 1)
    ty = TensorType((6, 4, 5), torch.float64, y.stride())
    for shape in ((2, 3, 4, 5), (6, 2, 2, 5), (6, 1, 4, 5), (3, 2, 4, 5, 1)):
        assert infer("reshape", ty, shape=shape).strides == y.view(shape).stride(), shape
    # A copy: torch gives row-major strides.
    assert infer("reshape", ty, shape=(24, 5)).strides == y.reshape(24, 5).stride()


@pytest.mark.parametrize(
    ("op", "args", "attrs", "words"),
    [
        ("add", (ten(3, 5), ten(4)), {}, ["f32[3,5]", "f32[4]", "broadcast"]),
        ("add", (ten(3), ten(3, dtype=torch.float64)), {}, ["f32[3]", "f64[3]", "cast"]),
        ("exp", (ten(3, dtype=torch.int64),), {}, ["i64[3]", "cast"]),
        ("add", (ten(3, dtype=torch.int64), 0.5), {}, ["0.5", "i64[3]"]),
        ("where", (ten(3), ten(3), ten(3)), {}, ["f32[3]", "b1"]),
        ("matmul", (ten(3, 5), ten(4, 7)), {}, ["f32[3,5]", "f32[4,7]", "inner"]),
        ("matmul", (ten(2, 3, 5), ten(5, 7)), {}, ["rank"]),
        ("reshape", (ten(3, 5),), {"shape": (4, 4)}, ["15", "16"]),
        ("permute", (ten(3, 5),), {"dims": (0, 0)}, ["(0, 0)"]),
        ("expand", (ten(3, 5),), {"shape": (4, 5)}, ["3", "4"]),
        ("slice", (ten(7),), {"dim": 0, "start": 5, "size": 3, "step": 1}, ["leave dim 0", "f32[7]"]),
        ("sum", (ten(3, 5),), {"dims": (2,)}, ["no dim 2"]),
        ("argmax", (ten(3, 5),), {"dims": (0, 1)}, ["exactly one"]),
        ("gather", (ten(3, 5), ten(3, 5)), {"dim": 0}, ["index", "i64"]),
        ("layer_norm", (ten(3, 5), ten(3)), {"ndim": 1, "eps": 1e-5}, ["f32[3]", "f32[3,5]"]),
        ("attention", (ten(2, 6, 5, 4), ten(2, 4, 7, 4), ten(2, 4, 7, 4)), {}, ["6", "4", "multiple"]),
        ("cat", ((ten(3, 5), ten(4, 5)),), {"dim": 1}, ["f32[3,5]", "f32[4,5]"]),
    ],
)
def test_mismatches_name_both(op: str, args: Any, attrs: Any, words: list[str]) -> None:
    with pytest.raises(TesselError) as e:
        infer(op, *args, **attrs)
    assert all(w in str(e.value) for w in (op, *words)), str(e.value)


# ---------------------------------------------------------------- the notation


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a b", "'->'"),
        ("a ? -> a", "'?'"),
        ("a+best -> .", "best"),
        ("a (b c -> a", "parenthesis"),
        ("a, , b -> a", "empty"),
        ("a a+ -> a", "same everywhere"),
        ("a -> b+", "no operand"),
        ("a^ -> .", "window"),
        ("a+scan -> .", "scanned"),
    ],
)
def test_notation_errors(text: str, word: str) -> None:
    with pytest.raises(TesselError, match="dims") as e:
        parse(text)
    assert word in str(e.value)


@pytest.mark.parametrize("sample", SAMPLES[::7], ids=repr)
def test_dims_print_and_parse(sample: Sample) -> None:
    results = run(sample.op, sample.args, sample.attrs)
    args = map_tensors(sample.args, lambda t: make_input("x", type_of(t)).out)
    dims = dims_of(Node(sample.op, args, sample.attrs, tuple(map(type_of, results))))
    assert parse(str(dims), sample.op.combine) == dims


def test_dims_with_symbols() -> None:
    x = make_input("x", ten(S0, 6, 4)).out
    b = Builder()
    joined = b.node(OPS["reshape"], x, shape=(6 * S0, 2, 2))
    assert str(dims_of(joined)) == "a b (c d) -> (a b) c d"
    assert dim_equal(factor_sizes(joined)["a"], S0)
    with pytest.raises(TesselError, match="rank"):
        dims_of(Node(dataclasses.replace(OPS["exp"], dims="a -> a"), (x,), {}, (ten(S0, 6, 4),)))


def test_table_refuses_duplicates() -> None:
    with pytest.raises(TesselError, match="exp"):
        table(OPS["exp"], OPS["exp"])


def test_assertions_raise_like_eager() -> None:
    with pytest.raises(RuntimeError, match="too long"):
        OPS["assert_scalar"].ref(False, message="too long")
    with pytest.raises(RuntimeError, match="values"):
        OPS["assert_true"].ref(torch.tensor([True, False]))
    assert OPS["item"].ref(torch.tensor(3), symbol="u0") == 3
