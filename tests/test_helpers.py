"""The math helpers of generated kernels: against float64 in Triton's interpreter, and compiled offline."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

import tessel
from tessel.ops.rounding import floor_pow2

TEXT = (Path(tessel.__file__).parent / "codegen/templates/helpers.triton.j2").read_text()
NAMES = re.findall(r"^# --- (\w+)$", TEXT, re.MULTILINE)
DTYPES = (torch.float32, torch.float64)
INF, NAN = math.inf, math.nan

# Triton's interpreter warns of what numpy finds in special values.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Greatest error in units of the last place: f32, f64.
UNARY: dict[str, tuple[float, float]] = {
    "neg": (0, 0),
    "floor_pow2": (0, 0),
    "reciprocal": (0.51, 1),
    "sqrt": (0.51, 1),
    "trunc": (0, 0),
    "round": (0, 0),
    "sign": (0, 0),
    "sigmoid": (3, 3),
    "log10": (3, 3),
    "expm1": (4, 4),
    "log1p": (4, 4),
    "tanh": (4, 4),
    "sinh": (4, 4),
    "cosh": (4, 4),
    "asinh": (4, 4),
    "acosh": (4, 4),
    "atanh": (4, 4),
    "atan": (3, 3),
    "asin": (3, 3),
    "acos": (3, 3),
    "tan": (3, 4),
    "erfc": (5, 5),
}
BINARY: dict[str, tuple[float, float]] = {
    "div": (0.51, 0),
    "trunc_div": (0, 0),
    "floor_div": (0, 0),
    "fmod": (0, 0),
    "remainder": (0, 0),
    "atan2": (3, 3),
    "hypot": (3, 3),
    "copysign": (0, 0),
    "maximum": (0, 0),
    "minimum": (0, 0),
    "pow": (0.51, 1200),  # in f64 the rounding of y * log2(x) shows
}
INTEGER = (
    "neg",
    "sign",
    "bitwise_not",
    "maximum",
    "minimum",
    "fmod",
    "remainder",
    "floor_div",
    "trunc_div",
    "pow",
)
SPECIAL = [
    0.0,
    -0.0,
    1,
    -1,
    0.5,
    -0.5,
    1.5,
    -1.5,
    2.5,
    3,
    -3,
    INF,
    -INF,
    NAN,
    1e-8,
    -1e-8,
    1e-30,
    3e38,
    -3e38,
]
SPECIAL += [
    88,
    -88,
    89,
    -89,
    89.3,
    0.4999999,
    0.66,
    1 - 6e-8,
    1 + 1e-7,
    9.5,
    1e5,
    2**24 + 2,
    1e10,
    0.7071,
    7,
    -7,
]


def reference(name: str) -> Callable[..., torch.Tensor]:
    """torch's function; of divisions the one that rounds as Python does."""
    modes = {"floor_div": "floor", "trunc_div": "trunc"}
    if name in modes:
        return lambda a, b: torch.div(a, b, rounding_mode=modes[name])
    return floor_pow2 if name == "floor_pow2" else getattr(torch, name)  # type: ignore[no-any-return]


@cache
def kernel(name: str, operands: int, folder: Path) -> Any:
    """A kernel that applies one helper, for the interpreter."""
    args = [f"a{i}" for i in range(operands)]
    loads = "".join(f"    {a} = tl.load({a}_ptr + i, mask=i < n)\n" for a in args)
    source = TEXT.replace("@triton.jit\n", "") + (
        f"\n\n@jit\ndef kernel({', '.join(a + '_ptr' for a in args)}, o_ptr, n, B: tl.constexpr):\n"
        f"    i = tl.program_id(0) * B + tl.arange(0, B)\n{loads}"
        f"    tl.store(o_ptr + i, tessel_{name}({', '.join(args)}), mask=i < n)\n"
    )
    path = folder / f"{name}.py"
    path.write_text(source)
    space: dict[str, Any] = {"tl": tl, "jit": InterpretedFunction}
    exec(compile(source, str(path), "exec"), space)
    return space["kernel"]


def apply(name: str, folder: Path, *xs: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.empty(xs[0].numel(), dtype=dtype or xs[0].dtype)
    kernel(name, len(xs), folder)[(triton.cdiv(out.numel(), 1024),)](*xs, out, out.numel(), B=1024)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("helpers")


def values(dtype: torch.dtype) -> torch.Tensor:
    """Special values, and random ones over all magnitudes."""
    gen = torch.Generator().manual_seed(0)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, generator=gen, dtype=torch.float64)

    reach = 125 if dtype == torch.float32 else 950
    sizes = (
        torch.exp2((torch.rand(900, generator=gen, dtype=torch.float64) * 2 - 1) * reach) * normal(900).sign()
    )
    unit = torch.rand(600, generator=gen, dtype=torch.float64) * 2 - 1
    return torch.cat(
        [torch.tensor(SPECIAL, dtype=torch.float64), normal(600), sizes, unit, normal(600) * 20]
    ).to(dtype)


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    special = torch.tensor(SPECIAL, dtype=dtype)
    a, b = zip(*itertools.product(special, special), strict=True)
    wide = values(dtype)
    near = torch.randn((2, 900), generator=gen, dtype=torch.float64) * torch.tensor([[10.0], [3.0]])
    order = torch.randperm(len(wide), generator=gen)
    return torch.cat([torch.stack(a), wide, near[0].to(dtype)]), torch.cat(
        [torch.stack(b), wide[order], near[1].to(dtype)]
    )


def assert_within(
    got: torch.Tensor, want: torch.Tensor, ulps: float, where: tuple[torch.Tensor, ...]
) -> None:
    """Every element within ``ulps`` of the true value; infinities, NaNs and zeros' signs the same.

    Results below the smallest normal number may be flushed to zero, as GPUs do.
    """
    rounded = want.to(got.dtype)
    info = torch.finfo(got.dtype)
    size = rounded.abs().clamp(info.smallest_normal, info.max)
    step = (torch.nextafter(size, torch.full_like(size, INF)) - size).double()
    tiny = rounded.abs() < info.smallest_normal
    off = (got.double() - want.double()).abs() > ulps * step.clamp(max=1e300) + tiny * info.smallest_normal
    finite = rounded.isfinite() & got.isfinite()
    bad = torch.where(finite, off, ~((got == rounded) | (got.isnan() & rounded.isnan())))
    bad |= (got == 0) & (rounded == 0) & (torch.signbit(got) != torch.signbit(rounded))
    shown = [(*(x[i].item() for x in where), got[i].item(), want[i].item()) for i in bad.nonzero()[:5, 0]]
    assert not bad.any(), f"{int(bad.sum())} elements, first (operands, got, want): {shown}"


def python_of(fn: Callable[[float, float], float], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A function of Python's floats, NaN where it raises."""

    def one(a: float, b: float) -> float:
        try:
            return fn(a, b)
        except (ValueError, ZeroDivisionError):
            return NAN

    return torch.tensor([one(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)], dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, dtype: torch.dtype, folder: Path) -> None:
    x = values(dtype)
    ulps = UNARY[name][DTYPES.index(dtype)]
    assert_within(apply(name, folder, x), reference(name)(x.double()), ulps, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, dtype: torch.dtype, folder: Path) -> None:
    x, y = pairs(dtype)
    if name == "fmod":  # torch's own is not exact for great quotients, the C library's is
        want = python_of(math.fmod, x, y)
    elif name in ("remainder", "floor_div"):
        near = (x / y).abs() < 2**20 if name == "remainder" else (x / y).abs() < INF
        keep = (near | x.isnan()) & (y.abs() < INF) | (y == 0)
        x, y = x[keep], y[keep]
        want = reference(name)(x, y)  # rounds once in its own dtype
    else:
        want = reference(name)(x, y) if name == "trunc_div" else reference(name)(x.double(), y.double())
    assert_within(apply(name, folder, x, y), want, BINARY[name][DTYPES.index(dtype)], (x, y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", INTEGER)
def test_integers(name: str, dtype: torch.dtype, folder: Path) -> None:
    if dtype == torch.uint8 and name == "neg":
        pytest.skip("negative numbers do not fit")
    low = 0 if dtype == torch.uint8 else -1
    gen = torch.Generator().manual_seed(2)
    x = torch.randint(low * 100, 100, (500,), generator=gen).to(dtype)
    y = torch.randint(low * 9, 9, (500,), generator=gen).to(dtype)
    y[y == 0] = 3
    if name == "pow":
        x, y = torch.randint(low * 5, 5, (500,), generator=gen).to(dtype), y.abs()
    xs = (x,) if name in ("neg", "sign", "bitwise_not") else (x, y)
    assert torch.equal(apply(name, folder, *xs), reference(name)(*xs))


def test_bools_and_infinities(folder: Path) -> None:
    a = torch.tensor([True, False, True, False])
    b = torch.tensor([True, True, False, False])
    assert torch.equal(apply("bitwise_not", folder, a), ~a)
    assert torch.equal(apply("maximum", folder, a, b), a | b)
    x = values(torch.float32)
    assert torch.equal(apply("isinf", folder, x, dtype=torch.bool), x.isinf())
    assert not apply("isinf", folder, torch.arange(9), dtype=torch.bool).any()


def test_every_helper_is_tested() -> None:
    tested = {f"tessel_{n}" for n in (*UNARY, *BINARY, *INTEGER, "isinf", "atan01")}
    assert set(NAMES) == tested  # atan01 through atan


def test_a_part_uses_only_parts_above_it() -> None:
    parts = re.split(r"^# --- (\w+)$", TEXT, flags=re.MULTILINE)[1:]
    known: set[str] = set()
    for name, body in (
        itertools.batched(parts, 2) if sys.version_info >= (3, 12) else zip(parts[::2], parts[1::2])
    ):
        used = set(re.findall(r"tessel_\w+", body)) - {name}
        assert used <= known, (name, used - known)
        known.add(name)


COMPILE = """
import triton
from kernels import kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for dtype in ("*fp32", "*fp64"):
    for target in (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)):
        signature = {"x_ptr": dtype, "y_ptr": dtype, "o_ptr": dtype, "n": "i32", "B": "constexpr"}
        triton.compile(ASTSource(kernel, signature, {"B": 128}), target=GPUTarget(*target))
        print("compiled", dtype, *target)
"""


def test_all_helpers_compile_for_every_target(tmp_path: Path) -> None:
    """One kernel that uses them all, with no GPU; in a process of its own, as a compiler may abort."""
    calls = "".join(f"    r += tessel_{n}(x).to(x.dtype)\n" for n in (*UNARY, "isinf"))
    calls += "".join(f"    r += tessel_{n}(x, y)\n" for n in BINARY)
    calls += "".join(
        f"    r += tessel_{n}(i, i + 1).to(x.dtype)\n" for n in ("pow", "fmod", "remainder", "floor_div")
    )
    calls += "    r += tessel_bitwise_not(i).to(x.dtype) + tessel_sign(i).to(x.dtype)\n"
    (tmp_path / "kernels.py").write_text(
        "import triton\nimport triton.language as tl\n\n"
        + TEXT
        + "\n\n@triton.jit\ndef kernel(x_ptr, y_ptr, o_ptr, n, B: tl.constexpr):\n"
        "    i = tl.program_id(0) * B + tl.arange(0, B)\n"
        "    x = tl.load(x_ptr + i, mask=i < n)\n    y = tl.load(y_ptr + i, mask=i < n)\n    r = x\n"
        + calls
        + "    tl.store(o_ptr + i, r, mask=i < n)\n"
    )
    (tmp_path / "compile.py").write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, "compile.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 8
