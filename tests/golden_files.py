"""Golden files: a graph before a pass, a line ``---``, the graph after it. See ``test_golden.py``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tessel.ir.exprs import evaluate, evaluate_size
from tessel.ir.node import Graph
from tessel.ir.types import SymType
from tessel.ir.verify import type_symbols

ROOT = Path(__file__).parent / "golden"
RULER = "---\n"
SPECIAL = (math.inf, -math.inf, math.nan, -0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Case:
    """One file. Comment lines of the upper half may say ``# symbols: s0=4 s1=6`` and ``# ints: 0 7``
    (the range of integer inputs, both ends in it)."""

    path: Path

    @property
    def halves(self) -> tuple[str, str]:
        before, _, after = self.path.read_text(encoding="utf-8").partition(RULER)
        return before, after

    def bless(self, after: str) -> None:
        self.path.write_text(self.halves[0] + RULER + after, encoding="utf-8")

    def said(self, word: str) -> str:
        found = re.search(rf"^# {word}:(.*)$", self.halves[0], re.MULTILINE)
        return found.group(1) if found else ""

    @property
    def symbols(self) -> dict[str, int]:
        return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", self.said("symbols"))}

    @property
    def ints(self) -> tuple[int, int]:
        low, high = (self.said("ints") or "0 3").split()
        return int(low), int(high)


def cases() -> list[Case]:
    return [Case(p) for p in sorted(ROOT.glob("*/*.tir"))]


def random_inputs(
    graph: Graph, symbols: dict[str, int], ints: tuple[int, int], special: bool, seed: int = 0
) -> list[Any]:
    """Inputs of a graph's types and layouts; ``special`` puts infinities, NaN and -0.0 among floats."""
    gen = torch.Generator().manual_seed(seed)
    values = dict(symbols)
    for i, name in enumerate(sorted(type_symbols(t for n in graph.inputs for t in n.types) - set(values))):
        values[name] = (5, 3, 7, 4)[i % 4]
    got: list[Any] = []
    for node in graph.inputs:
        t = node.types[0]
        if isinstance(t, SymType):
            got.append(evaluate(t.expr, values))
            continue
        full, strides = ([evaluate_size(d, values) for d in ds] for ds in (t.shape, t.strides))
        # dims of stride 0 are one element repeated
        shape = [1 if s == 0 else n for n, s in zip(full, strides, strict=True)]
        x = torch.empty_strided(shape, strides, dtype=t.dtype)
        if t.dtype.is_floating_point or t.dtype.is_complex:
            data = torch.randn(shape, generator=gen, dtype=torch.float64)
            if special:
                at = torch.randint(0, 4 * len(SPECIAL), shape, generator=gen)
                for i, v in enumerate(SPECIAL):
                    data[at == i] = v
        elif t.dtype == torch.bool:
            data = torch.randint(0, 2, shape, generator=gen)
        else:
            data = torch.randint(ints[0], ints[1] + 1, shape, generator=gen)
        got.append(x.copy_(data).expand(full))
    return got


def flat(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple | list):
        for y in x:
            yield from flat(y)
    else:
        yield x


def same_bits(a: Any, b: Any) -> bool:
    """Equal outputs of two graphs: NaN equals NaN, -0.0 and 0.0 differ, layouts do not count."""
    a, b = list(flat(a)), list(flat(b))
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    equal = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
    return bool(equal.all())


def close(a: Any, b: Any, tolerance: float = 1e-10) -> bool:
    """Equal but for rounding in float64."""
    a, b = list(flat(a)), list(flat(b))
    return len(a) == len(b) and all(
        torch.allclose(x, y, tolerance, tolerance, equal_nan=True) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )
