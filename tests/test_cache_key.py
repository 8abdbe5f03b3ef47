"""The key of a tuned tile: names and order do not count, what is computed does."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    Program,
    attention_kernel,
    fused_kernel,
    gather_kernel,
    norm_kernel,
    product_kernel,
)

from tessel.autotune import key as key_module
from tessel.autotune.canonical import bucket, canonical, divisor
from tessel.autotune.key import distance, key_of
from tessel.ir.types import DTYPE_NAMES, TensorType, symbol
from tessel.targets import get_target
from tessel.tiles.index import Atom, Cond, Index, substitute, value, var
from tessel.tiles.kernel import Axis, Check, Compute, IndexOf, Kernel, Load, Reduce, Ref, Stmt, Store, refs
from tessel.tiles.kernel import Test as Asked

H100, H200 = get_target("h100"), get_target("h200")


# ---------------------------------------------------------------- the same kernel, written differently


def rewritten(kernel: Kernel, rng: random.Random) -> Kernel:
    """The kernel with other names, numbers, order of statements and order of parameters."""
    ins = [i for i, p in enumerate(kernel.params) if not p.out]
    outs = [i for i, p in enumerate(kernel.params) if p.out]
    rng.shuffle(ins)
    rng.shuffle(outs)
    at = {old: new for new, old in enumerate(ins + outs)}
    params = []
    for new, old in enumerate(ins + outs):
        slot = new - (len(ins) if kernel.params[old].out else 0)
        params.append(dataclasses.replace(kernel.params[old], name=f"p{rng.random()}", slot=slot))
    keep = kernel.family in ("matmul", "attention")
    axis = {a.name: a.name if keep else f"{a.kind}_{rng.randrange(10**6)}_{i}" for i, a in enumerate(kernel.axes)}
    lists = {"body": list(kernel.body), **{n: list(s) for n, s in kernel.parts.items()}}
    lists = {n: shuffled(s, rng) for n, s in lists.items()}
    numbers = [s.out for stmts in lists.values() for s in stmts if hasattr(s, "out")]
    fresh = rng.sample(range(10_000), len(numbers))
    number = {**dict(zip(numbers, fresh)), -1: -1, -2: -2}

    def index(i: Index) -> Index:
        def atom(a: Atom) -> Index | None:
            return var(axis[a.name], a.n) if a.kind == "var" else value(number[int(a.name)], a.n)

        return substitute(i, atom)

    def conds(cs: tuple[Cond, ...]) -> tuple[Cond, ...]:
        return tuple(Cond(index(c.index), c.low, c.high) for c in cs)

    def operand(x: Any) -> Any:
        return Ref(number[x.number]) if isinstance(x, Ref) else x

    def stmt(s: Stmt) -> Stmt:
        changes: dict[str, Any] = {}
        if isinstance(s, Load | Store):
            a = s.access
            coords = tuple(index(c) for c in a.coords)
            changes["access"] = dataclasses.replace(a, param=at[a.param], coords=coords, mask=conds(a.mask))
        if isinstance(s, IndexOf):
            changes["index"] = index(s.index)
        if isinstance(s, Asked):
            changes["conds"] = conds(s.conds)
        if isinstance(s, Check):
            changes |= {"mask": conds(s.mask), "message": "other words"}
        if isinstance(s, Compute):
            changes["args"] = tuple(operand(a) for a in s.args)
        if isinstance(s, Store | Reduce | Check):
            changes["arg"] = operand(s.arg)
        if hasattr(s, "out"):
            changes["out"] = number[s.out]
        return dataclasses.replace(s, **changes)

    done = {n: tuple(stmt(s) for s in stmts) for n, stmts in lists.items()}
    body = done.pop("body")
    return dataclasses.replace(
        kernel,
        name=f"renamed_{rng.randrange(10**6)}",
        params=tuple(params),
        axes=tuple(Axis(axis[a.name], a.extent, a.kind) for a in kernel.axes),
        body=body,
        parts=dict(sorted(done.items(), key=lambda _: rng.random())),
        provides={n: operand(x) for n, x in kernel.provides.items()},
        notes=("other.py:3",),
    )


def shuffled(stmts: list[Stmt], rng: random.Random) -> list[Stmt]:
    """Another order in which every value is made before it is read."""
    made = {s.out for s in stmts if hasattr(s, "out")}
    left, out, known = list(stmts), [], set[int]()
    while left:
        ready = [s for s in left if all(n in known or n not in made for n in refs(s))]
        s = rng.choice(ready)
        left.remove(s)
        out.append(s)
        if hasattr(s, "out"):
            known.add(s.out)
    return out


BINARY = ("add", "mul", "sub", "div", "maximum", "minimum")
UNARY = ("exp", "neg", "abs", "relu", "sigmoid")


@st.composite
def programs(draw: st.DrawFn) -> Kernel:
    """A random pointwise or reduction kernel: several inputs and outputs, equal types and layouts often."""
    rows, cols = draw(st.sampled_from([(64, 128), (17, 96), (128, 128)]))
    folds = draw(st.booleans())
    p = Program("reduction", x0=rows, r0=cols) if folds else Program("pointwise", x0=rows, x1=cols)
    names = list(p.axes)
    ins = []
    for _ in range(draw(st.integers(1, 4))):
        across = draw(st.booleans())
        strides = (1, rows) if across else (cols, 1)
        ins.append(p.param((rows, cols), draw(st.sampled_from([torch.float32, torch.bfloat16])), strides))
    count = draw(st.integers(1, 2))
    out = [p.param((rows,) if folds else (rows, cols), torch.float32, out=True) for _ in range(count)]
    values = []
    for i in ins:
        v = p.load(i, *names)
        values.append(v if p.dtype(v) == torch.float32 else p.cast(v, torch.float32))
    for _ in range(draw(st.integers(0, 8))):
        a = draw(st.sampled_from(values))
        if draw(st.booleans()):
            b = draw(st.one_of(st.sampled_from(values), st.sampled_from([2.0, 0.5, float(cols), 1e-6])))
            values.append(p.op(draw(st.sampled_from(BINARY)), a, b))
        else:
            values.append(p.op(draw(st.sampled_from(UNARY)), a))
    for o in out:
        v = draw(st.sampled_from(values))
        p.store(o, ("x0",) if folds else names, p.fold(draw(st.sampled_from(["sum", "amax"])), v) if folds else v)
    return p.kernel()


@settings(deadline=None, max_examples=150)
@given(programs(), st.integers(0, 2**32))
def test_renaming_and_reordering_do_not_miss(kernel: Kernel, seed: int) -> None:
    assert key_of(rewritten(kernel, random.Random(seed)), H100) == key_of(kernel, H100)


@settings(deadline=None, max_examples=150)
@given(programs(), st.integers(0, 2**32))
def test_another_computation_misses(kernel: Kernel, seed: int) -> None:
    rng = random.Random(seed)
    body = list(kernel.body)
    i = rng.choice([i for i, s in enumerate(body) if isinstance(s, Compute | Reduce | Store)])
    s = body[i]
    if isinstance(s, Compute) and s.op != "cast":
        op = rng.choice([o for o in (UNARY if len(s.args) == 1 else BINARY) if o != s.op])
        literal = next((n for n, a in enumerate(s.args) if not isinstance(a, Ref)), None)
        if literal is not None and rng.random() < 0.5:
            args = tuple(a if n != literal else a + 3.25 for n, a in enumerate(s.args))
            body[i] = dataclasses.replace(s, args=args)
        else:
            body[i] = dataclasses.replace(s, op=op)
    elif isinstance(s, Reduce):
        body[i] = dataclasses.replace(s, op="prod")
    elif isinstance(s, Compute):
        body[i] = dataclasses.replace(s, dtype=torch.float64)
    else:
        assert isinstance(s, Store)
        body[i] = dataclasses.replace(
            s, access=dataclasses.replace(s.access, coords=s.access.coords[::-1] + (Index(),))
        )
    other = rewritten(dataclasses.replace(kernel, body=tuple(body)), rng)
    assert (
        key_of(other, H100).computation != key_of(kernel, H100).computation
        or key_of(other, H100).dtypes != key_of(kernel, H100).dtypes
    )


@settings(deadline=None, max_examples=100)
@given(programs(), st.integers(0, 2**32), st.sampled_from(["dtype", "layout", "gap", "device"]))
def test_another_type_or_layout_misses(kernel: Kernel, seed: int, what: str) -> None:
    rng = random.Random(seed)
    i = rng.randrange(sum(not p.out for p in kernel.params))
    t = kernel.params[i].type
    (rows, cols), (a, b) = t.shape, t.strides
    new: TensorType = {
        "dtype": t.with_(dtype=torch.float16),
        "layout": t.with_(strides=(1, rows) if b == 1 else (cols, 1)),
        "gap": t.with_(strides=(a if a == 1 else 2 * a, b if b == 1 else 2 * b)),
        "device": t.with_(device="cpu"),
    }[what]
    params = tuple(dataclasses.replace(p, type=new) if j == i else p for j, p in enumerate(kernel.params))
    other = key_of(rewritten(dataclasses.replace(kernel, params=params), rng), H100)
    mine = key_of(kernel, H100)
    assert other != mine
    if what == "gap":
        assert mine.first_difference(other) == "strides"


def both(make: Callable[..., Kernel], *xs: torch.Tensor, **attrs: Any) -> None:
    kernel = make(*xs, **attrs)
    for seed in range(20):
        assert key_of(rewritten(kernel, random.Random(seed)), H100) == key_of(kernel, H100)


def test_every_family() -> None:
    x, w = torch.empty(64, 512, dtype=torch.bfloat16), torch.empty(512, dtype=torch.bfloat16)
    both(norm_kernel, x, w)
    both(fused_kernel, x, w, x)
    both(gather_kernel, 100, 64)  # type: ignore[arg-type]
    a, b = torch.empty(4, 64, 128), torch.empty(4, 128, 96)
    both(product_kernel, a, b, torch.empty(96), relu=True)
    q, k = torch.empty(2, 8, 64, 32), torch.empty(2, 4, 96, 32)
    both(attention_kernel, q, k, k, torch.empty(64, 96), causal=True)


# ---------------------------------------------------------------- fields


def gemm(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Kernel:
    return product_kernel(torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype), **more)


def test_sizes_of_one_bucket_share_a_key() -> None:
    base = key_of(gemm(4096, 4096, 4096), H100)
    assert key_of(gemm(3968, 4096, 4096), H100) == base  # 31 · 128
    for m in (4095, 4032, 2048, 8192):  # another power of two divides it, or another bucket
        assert base.first_difference(key_of(gemm(m, 4096, 4096), H100)) == "shape"
    assert base.shape == "m=4096/128 n=4096/128 k=4096/128"
    assert key_of(gemm(1000, 2000, 3000), H100).computation == base.computation


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (gemm(4096, 4096, 4096, torch.float16), "dtypes"),
        (gemm(4096, 4096, 4096, relu=True), "computation"),
        (gemm(4096, 4096, 4096, bias=torch.empty(4096, dtype=torch.bfloat16)), "computation"),
        (product_kernel(torch.empty(4096, 4096).bfloat16().t(), torch.empty(4096, 4096).bfloat16()), "strides"),
        (product_kernel(torch.empty(4096, 4104).bfloat16()[:, :4096], torch.empty(4096, 4096).bfloat16()), "strides"),
        (product_kernel(torch.empty(8, 4096, 4096).bfloat16(), torch.empty(8, 4096, 4096).bfloat16()), "computation"),
        (gemm(4096, 4096, 32), "shape"),
    ],
)
def test_a_difference_is_named(other: Kernel, field: str) -> None:
    assert key_of(gemm(4096, 4096, 4096), H100).first_difference(key_of(other, H100)) == field


def test_device_template_and_versions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = gemm(64, 64, 64)
    base = key_of(kernel, H100)
    assert base.first_difference(key_of(kernel, H200)) == "device"
    assert base.first_difference(key_of(kernel, dataclasses.replace(H100, units=114))) == "units"
    monkeypatch.setattr(key_module, "template_digest", lambda family: "0" * 16)
    assert base.first_difference(key_of(kernel, H100)) == "template"
    monkeypatch.undo()
    known = key_module.version_of
    for package in ("tessel", "triton"):
        other = {package: "9.8.7"}
        monkeypatch.setattr(key_module, "version_of", lambda p, other=other: other.get(p) or known(p))
        assert base.first_difference(key_of(kernel, H100)) == package
    patch = base.triton + ".99"  # another patch version of Triton is no miss
    monkeypatch.setattr(key_module, "version_of", lambda p: patch if p == "triton" else known(p))
    assert key_of(kernel, H100) == base


def test_a_mean_of_other_length_is_the_same_computation() -> None:
    forms = [canonical(norm_kernel(torch.empty(64, n), torch.empty(n))) for n in (512, 4096, 5000)]
    assert len({f.computation for f in forms}) == 1 and len({f.shape for f in forms}) == 3


def test_attention_options() -> None:
    q = torch.empty(2, 8, 64, 32)
    base = canonical(attention_kernel(q, q, q))
    assert canonical(attention_kernel(q, q, q, causal=True)).computation != base.computation
    assert canonical(attention_kernel(q, q, q, scale=0.5)).computation != base.computation
    wide = torch.empty(2, 8, 64, 128)  # another scale, the usual one for its width
    assert canonical(attention_kernel(wide, wide, wide)).computation == base.computation


def test_symbolic_sizes() -> None:
    def program(n: Any) -> Kernel:
        p = Program("pointwise", x0=n, x1=64)
        a, o = p.param((n, 64), torch.float32), p.param((n, 64), torch.float32, out=True)
        p.store(o, ("x0", "x1"), p.op("exp", p.load(a, "x0", "x1")))
        return p.kernel()

    s, t = symbol("s0"), symbol("s77")
    assert key_of(program(s), H100) == key_of(program(t), H100)
    assert key_of(program(s), H100) != key_of(program(s * 64), H100)
    assert canonical(program(s * 64)).shape == "x0=dyn/64 x1=64/64"
    assert canonical(program(s)).computation == canonical(program(4096)).computation


@given(st.integers(1, 2**40))
def test_buckets_are_tight_and_keep_what_divides(n: int) -> None:
    text = bucket(n)
    if n <= 16:
        assert text == str(n)
        return
    top, by = map(int, text.split("/"))
    assert n <= top < 1.5 * n and n % by == 0 and by == divisor(n)
    assert bucket(top).startswith(f"{top}/")  # the bound is in its own bucket


def test_a_kernel_of_hundreds_of_tensors_has_a_short_key() -> None:
    p = Program("pointwise", x0=64)
    ins = [p.param((64,), torch.float32, (2 + i,)) for i in range(400)]
    o = p.param((64,), torch.float32, out=True)
    total = p.load(ins[0], "x0")
    for i in ins[1:]:
        total = p.op("add", total, p.load(i, "x0"))
    p.store(o, ("x0",), total)
    key = key_of(p.kernel(), H100)
    assert len(key.strides) < 100 and key == key_of(rewritten(p.kernel(), random.Random(1)), H100)


def test_distance() -> None:
    keys = [key_of(gemm(m, 4096, 4096), H100) for m in (4096, 2048, 8192, 4095)]
    apart = [distance(keys[0], k) for k in keys]
    assert apart[0] == 0 and apart[1] == apart[2] == 1 and apart[3] == 7 / 4
    assert distance(keys[0], key_of(gemm(4096, 4096, 4096), H200)) is None
    assert distance(keys[0], key_of(gemm(4096, 4096, 4096, torch.float16), H100)) is None
    assert all(name in DTYPE_NAMES.values() for name in keys[0].dtypes.split(","))
