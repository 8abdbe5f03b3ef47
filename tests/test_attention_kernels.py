"""Triton's attention kernels, forward and backward, in the interpreter against float64, and compiled offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import interpret
from offline_record import Recorded

from tessel.codegen.triton import render
from tessel.config import Options
from tessel.errors import TesselError
from tessel.ir.interp import interpret as evaluate
from tessel.ir.node import Builder, make_input
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.passes import decode, fuse, gradients
from tessel.targets import get_target
from tessel.tiles.kernel import Kernel
from tessel.tiles.lower import lower

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TEMPLATE = Options(attention="template")


def rand(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def kernel_of(name: str, args: Sequence[torch.Tensor | None], attrs: dict[str, Any]) -> tuple[Kernel, list[int]]:
    """The kernel that the fuse pass makes of one operator, and which argument each of its inputs is."""
    inputs = [None if a is None else make_input(f"a{i}", type_of(a)) for i, a in enumerate(args)]
    builder = Builder([n for n in inputs if n is not None])
    node = builder.node(OPS[name], *(None if n is None else n.out for n in inputs), **attrs)
    graph = fuse.run(builder.finish(tuple(node.outs)), TEMPLATE)
    (made,) = (n for n in graph.nodes if n.op.name == "kernel")
    return lower(made), [int(v.node.attrs["name"][1:]) for v in made.args]


def type_of(x: torch.Tensor) -> TensorType:
    return TensorType(tuple(x.shape), x.dtype, x.stride())


def run(
    name: str, args: Sequence[torch.Tensor | None], attrs: dict[str, Any], knobs: dict[str, int] | None = None
) -> list[torch.Tensor]:
    kernel, order = kernel_of(name, args, attrs)
    given_ = [args[i] for i in order]
    outs = [torch.full(p.type.shape, float("nan"), dtype=p.type.dtype) for p in kernel.params if p.out]
    interpret(kernel, [*given_, *outs], knobs=knobs)
    return outs


def doubled(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.dtype == torch.bool else x.double()


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest element of what it should be."""
    unit = {F64: 1e-13, F32: 2e-6, BF16: 2e-2}[dtype]
    assert float((got.double() - want).abs().max()) <= unit * max(1.0, float(want.abs().max()))


KNOBS: tuple[dict[str, int] | None, ...] = (None, {"BM": 16, "BN": 32})

# heads of queries and keys, queries, keys, widths, attributes, mask, whether there is a sink, dtype
CASES: dict[str, tuple[Any, ...]] = {
    "plain": (2, 2, 17, 33, 8, 8, {}, None, False, F32),
    "grouped": (4, 2, 37, 29, 24, 17, {"causal": True}, None, True, F32),
    "window": (4, 2, 37, 29, 24, 17, {"causal": True, "window": 7, "offset": 3}, None, False, F64),
    "both_sides": (4, 1, 40, 50, 40, 80, {"window": 9, "offset": -4, "softcap": 1.5}, None, True, F32),
    "bias": (4, 2, 40, 50, 16, 16, {"softcap": 1.5, "scale": 0.7}, "float", False, F32),
    "hidden": (2, 2, 20, 20, 16, 16, {"causal": True}, "bool", False, F32),
    "half": (2, 2, 50, 20, 16, 16, {"causal": True, "window": 30}, "bool", True, BF16),
    "nothing_seen": (2, 1, 9, 20, 16, 16, {"causal": True, "offset": -4}, None, False, F32),
    "one_query": (4, 2, 1, 65, 16, 16, {"causal": True, "offset": 64, "window": 40}, None, True, F32),
    "wide": (2, 2, 5, 9, 192, 96, {}, None, False, F32),
    "latent": (2, 1, 7, 9, 576, 512, {"causal": True, "offset": 2}, None, False, BF16),
    "documents": (4, 2, 70, 150, 40, 24, {"causal": True, "offset": 80}, "documents", True, F32),
    "added": (2, 2, 70, 150, 16, 16, {"softcap": 3.0}, "added", False, BF16),
}


def operands(name: str) -> tuple[list[torch.Tensor | None], dict[str, Any], torch.dtype]:
    h, hk, m, n, d, e, attrs, mask, with_sink, dtype = CASES[name]
    q, k, v = rand(2, h, m, d), rand(2, hk, n, d, seed=1), rand(2, hk, n, e, seed=2)
    seen = torch.arange(m)[:, None] // 24 == torch.arange(n) // 52
    seen[3:4] = False
    held = {
        None: None,
        "float": rand(1, h, m, n),
        "bool": rand(2, 1, m, n) > -0.3,
        "documents": seen,
        "added": rand(m, n).masked_fill(~seen, -torch.inf),
    }[mask]
    sink = rand(h) if with_sink else None
    return [*(x.to(dtype) for x in (q, k, v)), held, sink], attrs, dtype


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    args, attrs, dtype = operands(name)
    want = OPS["attention"].ref(*map(doubled, args), **attrs)
    for knobs in KNOBS:
        out, lse = run("attention", args, attrs, knobs)
        near(out, want[0], dtype)
        assert torch.equal(lse == -torch.inf, want[1] == -torch.inf)
        near(lse.masked_fill(lse == -torch.inf, 0), want[1].masked_fill(want[1] == -torch.inf, 0), dtype)


@pytest.mark.parametrize("name", CASES)
def test_backward(name: str) -> None:
    """Both passes, from the results of the forward; a run repeats the bits of the one before."""
    args, attrs, dtype = operands(name)
    mask = args[3]
    precise = list(map(doubled, args))
    out, lse = OPS["attention"].ref(*precise, **attrs)
    grad = rand(*out.shape, seed=5).to(dtype)
    of_mask = mask is not None and mask.dtype != torch.bool and name != "added"
    want = OPS["attention_backward"].ref(grad.double(), *precise, out, lse, **attrs, mask_grad=of_mask)
    wide = F64 if dtype == F64 else F32
    given_ = [grad, *args[:4], (grad.double() * out).sum(-1).to(wide), lse.to(wide)]
    more = {"mask_grad": True} if of_mask else {}
    for knobs in KNOBS:
        dk, dv = run("attention_backward_keys", given_, attrs, knobs)
        dq, *scores = run("attention_backward_queries", given_, {**attrs, **more}, knobs)
        for got, expected in zip((dq, dk, dv), want, strict=False):
            near(got, expected, dtype)
        if of_mask:
            near(scores[0].sum(0, keepdim=True), want[3], dtype)
    again = run("attention_backward_keys", given_, attrs, KNOBS[-1])
    assert torch.equal(again[0], dk) and torch.equal(again[1], dv)


@pytest.mark.parametrize("kind", ("flags", "added"))
def test_tiles_that_a_mask_hides_are_not_read(kind: str) -> None:
    """NaN in values and keys of tiles that no query of a tile sees reaches nothing, forward and backward."""
    m, n, knobs = 64, 256, {"BM": 32, "BN": 32}
    layout = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    seen = layout.repeat_interleave(32, 0).repeat_interleave(32, 1)
    held = rand(m, n).masked_fill(~seen, -torch.inf) if kind == "added" else seen
    q, k, v = rand(1, 2, m, 16), rand(1, 2, n, 16, seed=1), rand(1, 2, n, 16, seed=2)
    want, lse = OPS["attention"].ref(*(x.double() for x in (q, k, v)), doubled(held))
    grad = rand(*want.shape, seed=5)
    args = [None if x is None else x.double() for x in (grad, q, k, v)]
    grads = OPS["attention_backward"].ref(*args, doubled(held), None, want, lse)
    unseen = ~seen.any(0)
    k[:, :, unseen] = v[:, :, unseen] = torch.nan
    near(run("attention", [q, k, v, held], {}, knobs)[0], want, F32)
    given_ = [grad, q, k, v, held, (grad.double() * want).sum(-1).float(), lse.float()]
    near(run("attention_backward_queries", given_, {}, knobs)[0], grads[0], F32)
    # Of the pass over keys a query that sees no key of a tile is not read.
    q[:, :, 32:] = torch.nan
    for got, expected in zip(run("attention_backward_keys", given_, {}, {"BM": 16, "BN": 32}), grads[1:], strict=True):
        near(got[:, :, :32], expected[:, :, :32], F32)
    assert torch.equal(run("attention", [rand(1, 2, m, 16), k, v, held], {}, knobs)[1] == -torch.inf, lse == -torch.inf)


def test_what_is_asked_of_a_mask() -> None:
    """A mask's own heads of floats are biases: they hide nothing as a rule and are not gone through twice."""
    q, k = rand(1, 4, 64, 16), rand(1, 4, 256, 16)
    interpreter = get_target("triton-interpret")
    for held, asked in (
        (rand(1, 1, 64, 256), True),
        (rand(1, 4, 64, 256), False),
        (rand(1, 4, 64, 256) > 0, True),
        (rand(1, 1, 64, 1), False),
        (None, False),
    ):
        kernel = kernel_of("attention", (q, k, k, held), {})[0]
        assert ("some" in render(kernel, interpreter, {"BM": 32, "BN": 32}).text) is asked
        assert "some" not in render(kernel, interpreter, {"BM": 32, "BN": 128}).text  # two tiles in all


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(-5, 9),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from((1, 2)),
)
@settings(max_examples=8, deadline=None)
def test_windows(m: int, n: int, offset: int, window: int, causal: bool, heads: int) -> None:
    """Tiles that are skipped change nothing."""
    q, k, v = rand(1, 2, m, 8), rand(1, heads, n, 8, seed=1), rand(1, heads, n, 8, seed=2)
    attrs = {"causal": causal, "offset": offset, "window": window}
    out, lse = OPS["attention"].ref(*(x.double() for x in (q, k, v)), **attrs)
    near(run("attention", [q, k, v], attrs, KNOBS[1])[0], out, F32)
    grad = rand(*out.shape, seed=5)
    want = OPS["attention_backward"].ref(*(x.double() for x in (grad, q, k, v)), None, None, out, lse, **attrs)
    given_ = [grad, q, k, v, None, (grad.double() * out).sum(-1).float(), lse.float()]
    near(run("attention_backward_queries", given_, attrs, KNOBS[1])[0], want[0], F32)
    for got, expected in zip(run("attention_backward_keys", given_, attrs, KNOBS[1]), want[1:], strict=True):
        near(got, expected, F32)


def test_the_whole_backward_is_two_passes() -> None:
    """The pass that opens it keeps its results; a template of the whole operator for a GPU there is not."""
    args, attrs, _ = operands("bias")
    sink = rand(4)
    precise = [*map(doubled, args[:4]), sink.double()]
    out, lse = OPS["attention"].ref(*precise, **attrs)
    given_ = [rand(*out.shape, dtype=F64), *precise, out, lse]
    inputs = [make_input(f"a{i}", type_of(x)) for i, x in enumerate(given_)]  # type: ignore[arg-type]
    builder = Builder(inputs)
    node = builder.node(OPS["attention_backward"], *(n.out for n in inputs), **attrs, mask_grad=True)
    graph = builder.finish(tuple(node.outs))
    opened = gradients.run(graph, TEMPLATE)
    assert {n.op.name for n in opened.nodes} >= {"attention_backward_keys", "attention_backward_queries"}
    assert gradients.run(graph, Options(attention="library")) is graph
    for got, want in zip(evaluate(opened, given_), evaluate(graph, given_), strict=True):
        torch.testing.assert_close(got, want)
    kernel, _ = kernel_of("attention_backward", given_, {**attrs, "mask_grad": True})
    with pytest.raises(TesselError, match="two passes"):
        render(kernel, get_target("triton-interpret"))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, "row", "heads", "nothing"])
def test_one_query(parts: int, shared: int, mask: str | None) -> None:
    """Heads as rows and parts of the keys side by side, merged, against the definition."""
    q, k, v = rand(2, 4, 1, 8, dtype=F64), rand(2, shared, 24, 8, dtype=F64), rand(2, shared, 24, 5, dtype=F64)
    held = {
        None: None,
        "row": rand(2, 1, 1, 24) > 0,
        "heads": rand(4, 1, 24, dtype=F64),
        "nothing": torch.zeros(1, 24, dtype=torch.bool),
    }[mask]
    args = [q, k, v] if held is None else [q, k, v, held]
    inputs = [make_input(f"a{i}", type_of(x)) for i, x in enumerate(args)]
    builder = Builder(inputs)
    node = builder.node(OPS["attention"], *(n.out for n in inputs), causal=False, softcap=2.0)
    graph = builder.finish(decode.split_attention_keys(builder, node, parts)).live()
    for got, want in zip(evaluate(graph, args), OPS["attention"].ref(*args, softcap=2.0), strict=True):
        torch.testing.assert_close(got, want)


def test_when_keys_are_split() -> None:
    """Few heads and many keys are cut in parts, down to a least; hidden keys and several queries are left alone."""

    def heads(sq: int, n: int, **attrs: Any) -> list[Any]:
        inputs = [
            make_input(f"a{i}", TensorType((1, h, s, 64), F32)) for i, (h, s) in enumerate(((8, sq), (2, n), (2, n)))
        ]
        builder = Builder(inputs)
        node = builder.node(OPS["attention"], *(i.out for i in inputs), **{"causal": False, **attrs})
        graph = decode.run(builder.finish(tuple(node.outs)), TEMPLATE)
        return next(n for n in graph.nodes if n.op.name == "attention").args[0].shape

    assert heads(1, 4096) == (1, 2 * 16, 4, 64)
    assert heads(1, 4096, causal=True, offset=4095) == (1, 32, 4, 64)
    assert heads(1, 300) == (1, 2, 4, 64)  # not a multiple of anything large: heads as rows alone
    assert heads(1, 4096, causal=True, offset=7) == (1, 8, 1, 64)
    assert heads(2, 4096) == (1, 8, 2, 64)


def samples() -> list[Kernel]:
    """Half and full precision, widths that are no powers of two, masks, caps and windows."""
    kernels = []
    for d, e, dtype, attrs, mask in (
        (64, 64, BF16, {"causal": True}, None),
        (128, 128, BF16, {"causal": True, "window": 100, "softcap": 20.0}, None),
        (96, 80, BF16, {"causal": True}, rand(1, 1, 300, 300) > 0),
        (24, 24, F32, {}, None),
        (192, 128, BF16, {}, rand(1, 4, 300, 300)),
    ):
        q, k, v, grad = (rand(1, h, 300, w, dtype=dtype) for h, w in ((4, d), (2, d), (2, e), (4, e)))
        row, more = rand(1, 4, 300), {"mask_grad": True} if mask is not None and mask.dtype != torch.bool else {}
        given_ = (grad, q, k, v, mask, row, row)
        kernels.append(kernel_of("attention", (q, k, v, mask, rand(4)), attrs)[0])
        kernels.append(kernel_of("attention_backward_keys", given_, attrs)[0])
        kernels.append(kernel_of("attention_backward_queries", given_, {**attrs, **more})[0])
    return kernels


@pytest.mark.slow
@pytest.mark.parametrize("target", ("a100", "h100", "b200", "mi300x"))
def test_offline(target: str, offline: Recorded) -> None:
    record = get_target(target)
    sources = [render(k, record) for k in samples()]
    offline.fitting(sources, record, spills=None)
