"""What a tile must satisfy, each rule with a name, a number, its limit, and the words for a tile that breaks it.

A *hard* rule is the machine's: such a tile cannot be compiled or launched, and one that a user forces is refused.
The others are judgement (it would spill, it is larger than the problem): they rule a candidate out of the search only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..targets import Target
from ..tiles.default import next_power
from .problem import Problem

__all__ = ["Constraint", "Learned", "constraints_for"]

Values = Mapping[str, Any]

_NUMEL = 2**20  # elements of one tensor: Triton's TRITON_MAX_TENSOR_NUMEL
_POINTS = 2**16  # elements of a tile that Triton still compiles in seconds
_LEAST = 16  # a side of a product's tile


@dataclass(frozen=True)
class Constraint:
    """One rule: broken where ``number(values) > limit(values)``.

    ``words`` says why for one tile, given its values, the number and the limit.
    """

    name: str
    hard: bool
    number: Callable[[Values], Any]
    limit: Callable[[Values], Any]
    words: Callable[[Mapping[str, int], float, float], str]

    def broken(self, values: Values) -> Any:
        """Where the rule is broken, as an array of truths (or one)."""
        return np.asarray(self.number(values)) > np.asarray(self.limit(values))

    def explain(self, values: Mapping[str, Any], at: int) -> str:
        """Why row ``at`` breaks it, with both numbers."""
        own = {n: (v[at] if isinstance(v, np.ndarray) and v.ndim else v) for n, v in values.items()}
        number = float(np.asarray(self.number(own)))
        limit = float(np.asarray(self.limit(own)))
        return self.words(own, number, limit)


@dataclass(frozen=True)
class Learned:
    """A tile that the compiler refused, spilled or aborted on: ``knobs`` that must not come together, and why."""

    knobs: Mapping[str, int]
    why: str


def constraints_for(problem: Problem, target: Target, learned: Sequence[Learned] = ()) -> tuple[Constraint, ...]:
    """The rules for a kernel on a target, the machine's first."""
    limits = target.limits
    assert limits is not None
    rules = [
        Constraint(
            "threads",
            True,
            lambda v: v["num_warps"] * limits.warp_size,
            lambda v: limits.threads_per_block,
            lambda v, n, m: f"{v['num_warps']} warps are {n:.0f} threads; a block holds at most {m:.0f}",
        ),
        Constraint(
            "shared memory",
            True,
            lambda v: v["shared"],
            lambda v: limits.shared_bytes_per_block,
            lambda v, n, m: f"{_tile(problem, v)} needs {n:,.0f} bytes of shared memory; a block has at most {m:,.0f}",
        ),
    ]
    if problem.family in ("matmul", "attention"):
        rules += _contraction(problem, target)
    else:
        rules += _points(problem)
    rules.append(
        Constraint(
            "registers",
            False,
            lambda v: v["spills"] * 1,
            lambda v: 0,
            lambda v, n, m: (
                f"{_tile(problem, v)} wants about {v['registers']:.0f} registers a thread; "
                f"at most {v['register_limit']:.0f} exist: it would spill"
            ),
        )
    )
    return (*rules, *(_from_learned(item) for item in learned))


def _tile(problem: Problem, v: Mapping[str, Any]) -> str:
    """A tile in a few words.

    >>> _tile(Problem("matmul"), {"BM": 256, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3})
    '256×256×64 with 3 stages and 8 warps'
    """
    warps = f"{v['num_warps']} warp{'s' if v['num_warps'] > 1 else ''}"
    names = ("BM", "BN", "BK") if problem.family == "matmul" else ("BM", "BN")
    if problem.family in ("matmul", "attention"):
        shape = "×".join(str(v[n]) for n in names)
        return f"{shape} with {v['num_stages']} stage{'s' if v['num_stages'] > 1 else ''} and {warps}"
    shape = f"{v['XB']}×{v['RB']}" if problem.family == "reduction" else str(v["XB"])
    return f"{shape} with {warps}"


def _overhang(knob: str, axis: str, size: int, least: int = 1) -> Constraint:
    """A tile no larger than the problem along one axis."""
    enough = max(least, next_power(size))
    return Constraint(
        f"overhang {axis}",
        False,
        lambda v: v[knob],
        lambda v: enough,
        lambda v, n, m: f"a tile of {n:.0f} along {axis} for {size}: {m:.0f} suffice",
    )


def _contraction(problem: Problem, target: Target) -> list[Constraint]:
    """Rules of products and attention."""
    assert target.limits is not None
    limit = target.limits.registers_per_thread
    tensor = target.arch == "sm_100" and problem.matrix and problem.family == "matmul"
    wide = problem.itemsize / 4 if problem.itemsize > 4 else 1.0  # an f64 accumulator takes two registers
    most = 256 if target.vendor == "amd" else limit  # half of AMD's file holds accumulators
    rules = []
    if tensor:
        rules.append(
            Constraint(
                "tensor memory",
                True,
                lambda v: v["columns"],
                lambda v: 512,
                lambda v, n, m: f"{v['BM']}×{v['BN']} needs {n:.0f} columns of tensor memory; an SM has {m:.0f}",
            )
        )
    else:
        rules.append(
            Constraint(
                "accumulators",
                True,
                lambda v: v["acc"] * wide,
                lambda v: most,
                lambda v, n, m: (
                    f"{v['BM']}×{v['BN'] if problem.family == 'matmul' else problem.e} with "
                    f"{v['num_warps']} warps needs {n:.0f} accumulators a thread; at most {m:.0f} registers exist"
                ),
            )
        )
    for axis in ("m", "n", "k") if problem.family == "matmul" else ("m", "n"):
        rules.append(_overhang(f"B{axis.upper()}", axis, getattr(problem, axis), _LEAST))
    if problem.family == "matmul":
        tiles = max(1, -(-problem.m // _LEAST))
        rules.append(
            Constraint(
                "group",
                False,
                lambda v: v["GROUP"],
                lambda v: tiles,
                lambda v, n, m: f"a group of {n:.0f} rows of tiles where there are at most {m:.0f}",
            )
        )
    rules.append(
        Constraint(
            "warps",
            False,
            lambda v: v["num_warps"],
            lambda v: np.maximum(1, v["BM"] * v["BN"] // 256),
            lambda v, n, m: f"{n:.0f} warps for {v['BM']}×{v['BN']}: {m:.0f} have work",
        )
    )
    if problem.plain:
        rules.append(
            Constraint(
                "plain sums",
                False,
                lambda v: v["BM"] * v["BN"] * (v["BK"] if problem.family == "matmul" else problem.d),
                lambda v: 16**3 if problem.family == "matmul" else 16 * 16 * problem.d,
                lambda v, n, m: (
                    f"{n:,.0f} products in one tile without matrix instructions; at most {m:,.0f} stay in registers"
                ),
            )
        )
    elif not problem.matrix:
        rules += _by_lanes(problem)
    return rules


def _by_lanes(problem: Problem) -> list[Constraint]:
    """Rules for products at full precision, whose operands pass through registers."""
    if problem.family == "attention":
        room = 1024 if max(problem.d, problem.e) <= 64 else 512
        return [
            Constraint(
                "full precision",
                False,
                lambda v: v["BM"] * v["BN"],
                lambda v: room,
                lambda v, n, m: f"{n:.0f} scores at full precision: {m:.0f} stay in registers",
            )
        ]
    depth = 128 // problem.itemsize
    return [
        Constraint(
            "full precision",
            False,
            lambda v: np.maximum(v["acc"] / 32.0 * (problem.itemsize / 4), v["BK"] / depth),
            lambda v: 1,
            lambda v, n, m: (
                f"{v['acc']:.0f} accumulators and {v['BK']} steps a thread at full precision: "
                f"{32 * 4 // problem.itemsize} and {depth} stay in registers"
            ),
        )
    ]


def _points(problem: Problem) -> list[Constraint]:
    """Rules of pointwise kernels and reductions."""
    rules = [_overhang("XB", "x", problem.x)]
    if problem.family == "reduction":
        rules.append(_overhang("RB", "r", problem.r if problem.r_known else 2**14))
    rules.append(
        Constraint(
            "tile size",
            True,
            lambda v: v["XB"] * v.get("RB", 1),
            lambda v: _NUMEL,
            lambda v, n, m: f"a tile of {n:,.0f} elements; Triton holds at most {m:,.0f}",
        )
    )
    rules.append(
        Constraint(
            "compile time",
            False,
            lambda v: v["XB"] * v.get("RB", 1),
            lambda v: _POINTS,
            lambda v, n, m: f"a tile of {n:,.0f} elements compiles for minutes; {m:,.0f} are the most tried",
        )
    )
    rules.append(
        Constraint(
            "idle threads",
            False,
            lambda v: v["num_warps"],
            lambda v: np.maximum(1, v["XB"] * v.get("RB", 1) // 32),
            lambda v, n, m: f"{n:.0f} warps for {v['XB'] * v.get('RB', 1)} elements: {m:.0f} have work",
        )
    )
    return rules


def _from_learned(item: Learned) -> Constraint:
    """A rule out of what the compiler said of one tile."""

    def same(v: Values) -> Any:
        hit = np.asarray(True)
        for name, value in item.knobs.items():
            hit = hit & (np.asarray(v[name]) == value)
        return hit * 1

    return Constraint("compiler", False, same, lambda v: 0, lambda v, n, m: item.why)
