"""The C++ attention kernel against float64: lengths, widths, masks, groups of heads, few queries, whole models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernels import Program, poisoned, rand

import tessel
from tessel.codegen.cpp import CppSource, render, translation_unit
from tessel.codegen.cpp.attention import refusal
from tessel.ir.types import Dim, symbol
from tessel.models import load_model
from tessel.ops.attention import attention_ref, visible
from tessel.runtime.native import NativeKernel, build
from tessel.targets import get_target
from tessel.tiles.index import Index, floordiv
from tessel.tiles.kernel import ACC, LSE, Kernel, Ref

F = torch.nn.functional
SIZES = (1, 2, 17, 31, 33, 64, 65, 129, 257)
WIDTHS = ((1, 1), (8, 8), (40, 17), (64, 64), (80, 80), (96, 128), (128, 40))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.usefixtures("own_cache", "same_start"),
    pytest.mark.skipif(
        refusal(torch.float32, get_target("cpu").features) is not None, reason="no attention kernel for this CPU"
    ),
]


def program(
    name: str,
    q: Sequence[Dim],
    n: Dim,
    heads: int,
    e: int,
    dtype: torch.dtype = torch.float32,
    mask: Sequence[Dim] | None = None,
    mask_dtype: torch.dtype = torch.bool,
    window: int | None = None,
    cap: float | None = None,
    doubled: bool = False,
    hidden: bool = False,
    lse: bool = True,
    sink: bool = False,
    **attrs: Any,
) -> Kernel:
    """Attention of q [b, h, m, d] and ``heads`` key heads, all three laid out [b, length, heads, width].

    Args:
        mask: its shape, broadcast to [b, h, m, n]; ``hidden`` says that true means hidden.
        window: keys further to the left than this are hidden, by comparing indices.
        cap: scores become ``cap * tanh(score / cap)``.
        doubled: the operands are computed: twice what lies in memory.
        sink: one more score a head.
        attrs: ``causal``, ``offset``, ``scale``, and ``near``, the attribute ``window``.
    """
    b, h, m, d = q
    p = Program("attention", x0=b, x1=h, m=m, n=n, d=d, e=e)

    def tensor(length: Dim, count: int, width: int, out: bool = False) -> int:
        strides = (length * count * width, width, count * width, 1)
        return p.param((b, count, length, width), dtype, strides, out)

    ins = [tensor(m, int(h), int(d)), tensor(n, heads, int(d)), tensor(n, heads, e)]
    bias = p.param(mask, mask_dtype) if mask is not None else None
    sinks = p.param((h,), torch.float32) if sink else None
    out = tensor(m, int(h), e, out=True)
    row = p.param((b, h, m), torch.float32, out=True) if lse else None
    group = floordiv(p.axes["x1"], int(h) // heads)
    places: dict[str, tuple[Any, ...]] = {"q": ("x1", "m", "d"), "k": (group, "n", "d"), "v": (group, "n", "e")}
    for param, (part, place) in zip(ins, places.items(), strict=True):
        p.part(part)
        got = p.load(param, "x0", *place)
        p.provides[part] = p.op("add", got, got) if doubled else got
    if sinks is not None:
        p.part("sink")
        p.provides["sink"] = p.load(sinks, "x1")
    p.part("score")
    p.dtypes[ACC] = torch.float32
    score = Ref(ACC)
    if cap is not None:
        score = p.op("mul", p.op("tanh", p.op("div", score, cap)), cap)
    if bias is not None and mask is not None:
        zero = Index()
        got = p.load(bias, *(zero if s == 1 else w for w, s in zip(("x0", "x1", "m", "n"), mask, strict=True)))
        if mask_dtype != torch.bool:
            score = p.op("add", score, p.cast(got, torch.float32))
        else:
            score = p.op("where", got, -math.inf, score) if hidden else p.op("where", got, score, -math.inf)
    if window is not None:
        near = p.op("lt", p.op("sub", p.iota("m", torch.int64), p.iota("n", torch.int64)), window)
        score = p.op("where", near, score, -math.inf)
    p.provides["score"] = score
    p.part("body")
    p.dtypes[ACC], p.dtypes[LSE] = dtype, torch.float32
    p.store(out, ("x0", "x1", "m", "e"), Ref(ACC))
    if row is not None:
        p.store(row, ("x0", "x1", "m"), Ref(LSE))
    if "near" in attrs:
        attrs["window"] = attrs.pop("near")
    return p.kernel(name, **{"scale": int(d) ** -0.5, **attrs})


def compiled(kernels: Sequence[Kernel]) -> list[NativeKernel]:
    sources = [render(k) for k in kernels]
    library, path = build(translation_unit(sources))
    return [NativeKernel(s, library, path) for s in sources]


def operands(b: int, h: int, heads: int, m: int, n: int, d: int, e: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as transposed views, as models make them."""
    shapes = ((b, m, h, d), (b, n, heads, d), (b, n, heads, e))
    return [rand(*s, dtype=dtype).transpose(1, 2) for s in shapes]


def attend(kernel: NativeKernel, ins: Sequence[torch.Tensor], *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, _, v = ins[:3]
    b, h, m, _ = q.shape
    out = poisoned((b, m, h, v.shape[-1]), q.dtype).transpose(1, 2)
    lse = poisoned((b, h, m), torch.float32)
    kernel((), *ins, out, *([lse] if kernel.tensors == len(ins) + 2 else []), *sizes)
    return out, lse


def agree(
    got: tuple[torch.Tensor, torch.Tensor],
    ins: Sequence[torch.Tensor],
    seen: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
) -> None:
    """Each element within the rounding of the weights to the operands' dtype, and of float32 scores."""
    q, k, v = (t.double() for t in ins[:3])
    eps = torch.finfo(ins[0].dtype).eps
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q @ k.transpose(-1, -2) * scale
    loose = (q.abs() @ k.abs().transpose(-1, -2) * abs(scale)).amax(-1, keepdim=True)  # what rounding a score may cost
    s = s if cap is None else cap * (s / cap).tanh()
    s = s if bias is None else s + bias.double()
    s = s if seen is None else s.masked_fill(~seen, -math.inf)
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).tril(offset) == 0, -math.inf)
    lse = s.logsumexp(-1)
    lse = lse if sink is None else torch.logaddexp(lse, sink.double()[:, None])
    p = (s - torch.where(lse == -math.inf, 0.0, lse)[..., None]).exp()
    want, size = p @ v, p @ v.abs()
    unit = eps + 1e-6 * (1 + 0.2 * loose)
    out, row = got
    assert out.isfinite().all()
    assert bool(((out.double() - want).abs() <= 2 * unit * size + eps * want.abs() + 1e-12).all())
    if not row.isnan().all():
        assert torch.equal(row == -math.inf, lse == -math.inf)
        near = lse != -math.inf
        assert bool(((row.double() - lse).abs()[near] <= (2e-6 * (1 + loose[..., 0] + lse.abs()))[near]).all())


# ---------------------------------------------------------------- lengths and widths


def test_all_lengths_and_widths() -> None:
    """Lengths known at run time: one kernel of each width and dtype meets all of them, causal or not."""
    m, n = symbol("s0"), symbol("s1")
    cases = [(d, e, t, c) for (d, e), t, c in itertools.product(WIDTHS, DTYPES, (False, True)) if c or (d, e) != (8, 8)]
    cases = [c for i, c in enumerate(cases) if c[2] == torch.float32 or i % 2 == 0]
    kernels = compiled(
        [program(f"attend_{i}", (1, 2, m, d), n, 2, e, dtype=t, causal=c) for i, (d, e, t, c) in enumerate(cases)]
    )
    for i, ((d, e, dtype, causal), kernel) in enumerate(zip(cases, kernels, strict=True)):
        for j, (rows, keys) in enumerate(itertools.product(SIZES, SIZES)):
            if (i + j) % 3 == 0:
                ins = operands(1, 2, 2, rows, keys, d, e, dtype)
                agree(attend(kernel, ins, rows, keys), ins, causal=causal)


def test_long_sequences() -> None:
    """Several blocks of keys and pieces of rows; scores grow along the keys: the maximum moves in every block."""
    m, n = symbol("s0"), symbol("s1")
    plain, causal, half = compiled(
        [
            program("plain", (1, 1, m, 32), n, 1, 32),
            program("causal", (1, 1, m, 32), n, 1, 32, causal=True),
            program("half", (1, 1, m, 32), n, 1, 32, causal=True, dtype=torch.bfloat16),
        ]
    )
    for rows, keys in ((700, 1100), (1100, 700), (5, 2000)):
        ins = operands(1, 1, 1, rows, keys, 32, 32, torch.float32)
        ins[1] *= torch.linspace(0, 4, keys)[:, None]
        agree(attend(plain, ins, rows, keys), ins)
        agree(attend(causal, ins, rows, keys), ins, causal=True)
        ins = [t.bfloat16() for t in ins]
        agree(attend(half, ins, rows, keys), ins, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_keys_and_no_queries(dtype: torch.dtype) -> None:
    m, n = symbol("s0"), symbol("s1")
    (kernel,) = compiled([program("none", (1, 2, m, 8), n, 2, 8, dtype=dtype)])
    out, lse = attend(kernel, operands(1, 2, 2, 3, 0, 8, 8, dtype), 3, 0)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    out, _ = attend(kernel, operands(1, 2, 2, 0, 3, 8, 8, dtype), 0, 3)
    assert out.numel() == 0


# ---------------------------------------------------------------- causal, groups, few queries


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_causal_with_offsets(dtype: torch.dtype) -> None:
    cases = [(65, 129, o) for o in (0, 3, 64, -5, -70, 200)] + [
        (300, 300, 0),
        (300, 300, -100),
        (2, 70, 68),
        (1, 70, 4),
    ]
    kernels = compiled(
        [
            program(f"causal_{i}", (1, 2, m, 24), n, 1, 24, dtype=dtype, causal=True, offset=o)
            for i, (m, n, o) in enumerate(cases)
        ]
    )
    for (m, n, offset), kernel in zip(cases, kernels, strict=True):
        ins = operands(1, 2, 1, m, n, 24, 24, dtype)
        agree(attend(kernel, ins), ins, causal=True, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_and_few_queries(dtype: torch.dtype) -> None:
    """Query heads that share keys; from 1 query, which reads keys where they lie, to several blocks."""
    shapes = itertools.product((1, 2, 3, 33), (1, 2, 4), ((64, 64), (40, 17), (128, 128)))
    cases = [(m, g, d, e) for m, g, (d, e) in shapes if d == 64 or (m, g) in ((1, 1), (1, 4), (3, 2))]
    kernels = compiled(
        [
            program(f"group_{i}", (2, 4, m, d), symbol("s0"), 4 // g, e, dtype=dtype, causal=m % 2 == 0, offset=40)
            for i, (m, g, d, e) in enumerate(cases)
        ]
    )
    for (m, g, d, e), kernel in zip(cases, kernels, strict=True):
        for n in (1, 16, 129, 700):
            ins = operands(2, 4, 4 // g, m, n, d, e, dtype)
            agree(attend(kernel, ins, n), ins, causal=m % 2 == 0, offset=40)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_one_query_against_a_cache(dtype: torch.dtype) -> None:
    """A cache of 512 places of which some are filled, the mask says which."""
    kernels = compiled(
        [
            program("cache", (2, 12, 1, 64), 512, 12, 64, dtype, mask=(2, 1, 1, 512)),
            program("shared", (2, 12, 1, 64), 512, 3, 64, dtype, mask=(1, 1, 1, 512)),
        ]
    )
    for kernel, heads, batch in zip(kernels, (12, 3), (2, 1), strict=True):
        for filled in (0, 1, 100, 300, 512):
            seen = torch.arange(512)[None, None, None].expand(batch, 1, 1, 512) < filled
            ins = operands(2, 12, heads, 1, 512, 64, 64, dtype)
            agree(attend(kernel, [*ins, seen.contiguous()]), ins, seen)


# ---------------------------------------------------------------- masks and edits


def test_masks_of_every_shape() -> None:
    """Boolean and additive, broadcast in every way, some rows without any key; few and many rows."""
    b, h, n = 2, 2, 300
    cases = []
    for m, dims, kind in itertools.product((3, 70), range(16), (torch.bool, torch.float32, torch.bfloat16)):
        shape = tuple(s if dims >> i & 1 else 1 for i, s in enumerate((b, h, m, n)))
        if kind == torch.bool or dims in ((0, 8, 10, 12, 15) if kind == torch.float32 else (15,)):
            cases.append((m, shape, kind))
    kernels = compiled(
        [
            program(f"mask_{i}", (b, h, m, 16), n, h, 16, mask=shape, mask_dtype=kind)
            for i, (m, shape, kind) in enumerate(cases)
        ]
    )
    for (m, shape, kind), kernel in zip(cases, kernels, strict=True):
        ins = operands(b, h, h, m, n, 16, 16, torch.float32)
        mask = torch.rand(shape) > 0.5 if kind == torch.bool else torch.randn(shape).to(kind)
        if shape[2] > 1:
            mask[:, :, 2] = False if kind == torch.bool else -math.inf
        got = attend(kernel, [*ins, mask])
        agree(got, ins, seen=mask if kind == torch.bool else None, bias=None if kind == torch.bool else mask)
        if shape[2] > 1:
            assert bool((got[0][:, :, 2] == 0).all())


def test_hidden_blocks_and_other_conditions() -> None:
    """Whole blocks hidden by a mask, a mask that says what is hidden, a window, a mask within a causal window."""
    m = n = 900
    kernels = compiled(
        [
            program("blocks", (1, 2, m, 32), n, 2, 32, mask=(1, 1, m, n)),
            program("hides", (1, 2, m, 32), n, 2, 32, mask=(1, 1, m, n), hidden=True),
            program("window", (1, 2, m, 32), n, 2, 32, window=100, causal=True),
            program("both", (1, 2, m, 32), n, 2, 32, window=300, causal=True, mask=(1, 2, m, n)),
            program("wide", (1, 2, m, 32), n, 2, 32, window=50, dtype=torch.bfloat16, causal=True, offset=20),
        ]
    )
    ins = operands(1, 2, 2, m, n, 32, 32, torch.float32)
    i, j = torch.arange(m)[:, None], torch.arange(n)
    blocks = (i // 128 == j // 128)[None, None]
    agree(attend(kernels[0], [*ins, blocks]), ins, blocks)
    agree(attend(kernels[1], [*ins, ~blocks]), ins, blocks)
    agree(attend(kernels[2], ins), ins, i - j < 100, causal=True)
    mask = torch.rand(1, 2, m, n) > 0.3
    agree(attend(kernels[3], [*ins, mask]), ins, mask & (i - j < 300), causal=True)
    ins = [t.bfloat16() for t in ins]
    agree(attend(kernels[4], ins), ins, i - j < 50, causal=True, offset=20)


def test_blocks_that_an_added_mask_hides_are_not_read() -> None:
    """A floating mask says by -inf which keys are hidden: what lies in blocks that nobody sees cannot matter."""
    m = n = 600
    kernels = compiled(
        [
            program("added", (1, 2, m, 16), n, 2, 16, mask=(1, 1, m, n), mask_dtype=torch.float32),
            program("own", (1, 2, m, 16), n, 2, 16, mask=(1, 2, m, n), mask_dtype=torch.bfloat16, causal=True),
            program("few", (1, 2, 3, 16), n, 2, 16, mask=(1, 1, 3, n), mask_dtype=torch.float32, cap=5.0),
        ]
    )
    for kernel, (rows, shape, dtype) in zip(
        kernels, ((m, (1, 1), torch.float32), (m, (1, 2), torch.bfloat16), (3, (1, 1), torch.float32)), strict=True
    ):
        ins = operands(1, 2, 2, rows, n, 16, 16, torch.float32)
        seen = (torch.arange(n) < 256).expand(rows, n)
        mask = torch.randn(*shape, rows, n).to(dtype).masked_fill(~seen, -math.inf)
        causal, cap = kernel is kernels[1], 5.0 if rows == 3 else None
        for x in ins[1:]:
            x[:, :, 256:] = math.nan
        got = attend(kernel, [*ins, mask])
        agree(got, [torch.nan_to_num(x) for x in ins], bias=mask, causal=causal, cap=cap)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_windows_and_sinks(dtype: torch.dtype) -> None:
    """Windows to one side and to both, which skip what lies before them; sinks, also of rows that see nothing."""
    m, n = symbol("s0"), symbol("s1")
    attrs: list[dict[str, Any]] = [
        {"causal": True, "near": 40, "offset": 30, "sink": True},
        {"near": 300, "offset": -50},
        {"sink": True, "mask": (1, 2, 1, 1)},
        {"causal": True, "near": 33, "cap": 3.0, "sink": True},
    ]
    kernels = compiled(
        [program(f"many_{i}", (1, 2, m, 24), n, 1, 24, dtype, **a) for i, a in enumerate(attrs)]
        + [program(f"few_{i}", (1, 2, 2, 64), n, 1, 64, dtype, **a) for i, a in enumerate(attrs)]
    )
    for i, kernel in enumerate(kernels):
        a, few = attrs[i % len(attrs)], i >= len(attrs)
        for rows, keys in ((2, 900), (2, 40)) if few else ((300, 300), (70, 900), (333, 20)):
            ins = operands(1, 2, 1, rows, keys, 64 if few else 24, 64 if few else 24, dtype)
            more = [torch.rand(a["mask"]) > 0.5] if "mask" in a else []
            sink = torch.randn(2) if "sink" in a else None
            seen = visible(rows, keys, a.get("causal", False), a.get("offset", 0), a.get("near"))
            seen = more[0] if more else seen
            got = attend(kernel, [*ins, *more, *([] if sink is None else [sink])], *([keys] if few else [rows, keys]))
            agree(got, ins, seen, cap=a.get("cap"), sink=sink)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_wide_heads(dtype: torch.dtype) -> None:
    """As latent attention has them: many query heads on one key head, keys in parts that are put together."""
    cases = [(192, 128, 12, 40, 300), (256, 256, 1, 3, 90), (576, 512, 16, 1, 1300), (32, 32, 20, 1, 2100)]
    kernels = compiled(
        [
            program(f"wide_{i}", (1, h, m, d), n, 1, e, dtype, causal=True, offset=n - m, sink=h > 1)
            for i, (d, e, h, m, n) in enumerate(cases)
        ]
    )
    for (d, e, h, m, n), kernel in zip(cases, kernels, strict=True):
        ins = operands(1, h, 1, m, n, d, e, dtype)
        sink = torch.randn(h) if h > 1 else None
        got = attend(kernel, [*ins, *([] if sink is None else [sink])])
        agree(got, ins, causal=True, offset=n - m, sink=sink)


def test_edited_scores_and_computed_operands() -> None:
    """A soft cap (it changes -inf), negative and zero scales, operands that are computed when packed."""
    q, n = (2, 4, 70, 40), 300
    few = (2, 4, 2, 40)
    cases: list[dict[str, Any]] = [
        {"cap": 2.0},
        {"cap": 2.0, "causal": True},
        {"cap": 1.0, "mask": (1, 1, 1, n), "causal": True},
        {"scale": -0.3},
        {"scale": 0.0},
        {"doubled": True},
        {"lse": False, "causal": True},
    ]
    kernels = compiled(
        [
            program(f"edit_{i}_{j}", shape, n, 2, 24, dtype, **case)
            for i, case in enumerate(cases)
            for j, (shape, dtype) in enumerate(((q, torch.float32), (q, torch.bfloat16), (few, torch.float32)))
        ]
    )
    for i, kernel in enumerate(kernels):
        case, j = cases[i // 3], i % 3
        ins = operands(2, 4, 2, 70 if j < 2 else 2, n, 40, 24, torch.bfloat16 if j == 1 else torch.float32)
        seen = torch.rand(1, 1, 1, n) > 0.3 if "mask" in case else None
        got = attend(kernel, ins if seen is None else [*ins, seen])
        given = [t * 2 for t in ins] if case.get("doubled") else ins
        more = {k: case[k] for k in ("cap", "causal", "scale") if k in case}
        agree(got, given, seen, **more)


def test_not_a_number_and_infinities() -> None:
    """As torch: a row is NaN if it sees one, and what is hidden does not show."""
    kernels = compiled(
        [
            program("many", (1, 1, 40, 16), 100, 1, 16, causal=True),
            program("one", (1, 1, 1, 16), 100, 1, 16, mask=(1, 1, 1, 100)),
        ]
    )
    q, k, v = operands(1, 1, 1, 40, 100, 16, 16, torch.float32)
    k[0, 0, 20, 3] = math.nan
    out, lse = attend(kernels[0], [q, k, v])
    assert out[0, 0, 20:].isnan().all() and out[0, 0, :20].isfinite().all()
    assert lse[0, 0, 20:].isnan().all() and lse[0, 0, :20].isfinite().all()
    seen = (torch.arange(100) != 20)[None, None, None]
    q, k, v = q[:, :, :1].contiguous(), k, v
    agree(attend(kernels[1], [q, k, v, seen]), [q, torch.where(k.isnan(), 0, k), v], seen)
    assert attend(kernels[1], [q, k, v, torch.ones_like(seen)])[0].isnan().all()
    k[0, 0, 20, 3] = math.inf
    q[..., 3] = 1
    assert attend(kernels[1], [q, k, v, torch.ones_like(seen)])[0].isnan().all()
    q[..., 3] = -1  # a score of -inf weighs nothing
    agree(attend(kernels[1], [q, k, v, torch.ones_like(seen)]), [q, torch.where(k.isinf(), 0, k), v], seen)


@pytest.mark.parametrize("m", (1, 20, 600))
def test_bits_do_not_depend_on_the_threads(m: int) -> None:
    (kernel,) = compiled([program("threads", (1, 4, m, 64), 1500, 2, 64, mask=(1, 1, m, 1500))])
    ins = [*operands(1, 4, 2, m, 1500, 64, 64, torch.float32), torch.rand(1, 1, m, 1500) > 0.2]
    got = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        got.append(attend(kernel, ins))
    assert all(torch.equal(a, b) for one in got[1:] for a, b in zip(one, got[0], strict=True))


# ---------------------------------------------------------------- graphs


def families(fast: Any) -> list[str]:
    return [k.family for k in tessel.explain(fast).kernels]


@pytest.mark.parametrize("kind", ("plain", "causal", "mask", "bias", "groups", "views"))
def test_scaled_dot_product_attention(kind: str) -> None:
    torch._dynamo.reset()
    heads = 2 if kind == "groups" else 4
    q, k, v = operands(2, 4, heads, 33, 65, 24, 24, torch.float32)
    more: dict[str, Any] = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.rand(2, 1, 33, 65) > 0.3},
        "bias": {"attn_mask": torch.randn(4, 33, 65)},
        "groups": {"enable_gqa": True},
    }.get(kind, {})

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if kind == "views":
            q, k = q * 2, k[:, :, 3:].transpose(-1, -2).contiguous().transpose(-1, -2)
            v = v[:, :, 3:]
        return F.scaled_dot_product_attention(q, k, v, **more).transpose(1, 2).flatten(2)

    fast = tessel.compile(f, target="cpu")
    torch.testing.assert_close(fast(q, k, v), f(q, k, v), rtol=1e-5, atol=1e-5)
    assert "attention" in families(fast)


def test_who_computes_attention() -> None:
    """The choice is by dtype and CPU; pinned it stays, and the report says why."""
    assert refusal(torch.float32, ("avx512f",)) is None and refusal(torch.bfloat16, ("avx2", "fma")) is None
    assert "float64" in str(refusal(torch.float64, ("avx512f",)))
    assert "AVX" in str(refusal(torch.float32, ("avx2",)))
    for dtype, options, own in (
        (torch.float32, {}, True),
        (torch.float64, {}, False),
        (torch.float32, {"attention": "library"}, False),
        (torch.float32, {"attention": "template"}, True),
    ):
        torch._dynamo.reset()
        q, k, v = operands(1, 2, 2, 9, 9, 8, 8, dtype)
        fast = tessel.compile(F.scaled_dot_product_attention, target="cpu", options=options)
        torch.testing.assert_close(fast(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)
        report = tessel.explain(fast)
        assert ("attention" in [k.family for k in report.kernels]) == own
        if not own:
            (call,) = [c for c in report.compilations[0].calls if c.operator == "attention"]
            assert ("float64" if dtype == torch.float64 else "'library'") in call.reason


def test_growing_lengths() -> None:
    """One program for all lengths; keys and values from one tensor, else nobody knows that their lengths agree."""
    torch._dynamo.reset()

    def f(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, kv[0], kv[1])

    fast = tessel.compile(f, target="cpu")
    for m, n in ((5, 7), (64, 129), (33, 500)):
        q, kv = rand(2, 2, m, 16), rand(2, 2, 2, n, 16)
        torch._dynamo.mark_dynamic(q, 2)
        torch._dynamo.mark_dynamic(kv, 3)
        torch.testing.assert_close(fast(q, kv), f(q, kv), rtol=1e-5, atol=1e-5)
    assert len(tessel.explain(fast).compilations) == 1 and "attention" in families(fast)


def test_gradients_through_own_forward() -> None:
    """The gradients' kernel reads the log-sum-exp that the forward's wrote."""
    torch._dynamo.reset()
    ins = [t.requires_grad_() for t in operands(2, 4, 4, 33, 33, 16, 16, torch.float32)]

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    fast = tessel.compile(f, target="cpu")
    g = torch.randn(2, 4, 33, 16)
    want = torch.autograd.grad(f(*[t.double() for t in ins]), ins, g.double())
    got = torch.autograd.grad(fast(*ins), ins, g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert "attention" in families(fast)


@pytest.mark.parametrize("name", ("llama", "bert", "gpt2", "vit"))
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_models(name: str, dtype: str) -> None:
    torch._dynamo.reset()
    module, args, kwargs = load_model(f"hf:{name}", batch=2, seq=37, dtype=dtype)
    fast = tessel.compile(module, target="cpu")
    with torch.no_grad():
        got = fast(*args, **kwargs)[0].double()
        eager = module(*args, **kwargs)[0].double()
        wide = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
        want = module.double()(*args, **wide)[0]
    error, own = ((x - want).norm() / want.norm() for x in (got, eager))
    assert error <= (max(3 * own, 2e-6) if dtype == "f32" else 2 * own)
    assert "attention" in families(fast)


def test_the_reference_is_the_same_definition() -> None:
    """``agree`` and the IR's own definition say the same of rows without a key."""
    q, k, v = operands(1, 2, 2, 5, 9, 8, 8, torch.float64)
    seen = torch.rand(1, 1, 5, 9) > 0.5
    seen[0, 0, 3] = False
    out, lse = attention_ref(q, k, v, seen)
    agree((out, lse), [q, k, v], seen)


def test_source_is_readable() -> None:
    source: CppSource = render(program("shown", (1, 2, 64, 64), 64, 2, 64, window=8, causal=True))
    assert "seen" in source.text and "test.py:1" in source.text and "malloc" not in source.text
