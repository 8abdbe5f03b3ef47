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
from ..tiles.header import ATTENTION, load_header
from ..tiles.split import SPLIT_DEPTH
from .problem import Problem

__all__ = ["DESCRIPTORS", "Constraint", "Learned", "constraints_for"]

Values = Mapping[str, Any]

_BUSY_WARPS = 4  # of a unit, one a scheduler: from then on recurrences hide each other's steps
_NUMEL = 2**20  # elements of one tensor: Triton's TRITON_MAX_TENSOR_NUMEL
_POINTS = 2**16  # elements of a tile that Triton still compiles in seconds
DESCRIPTORS = ("sm_90", "sm_100")  # architectures with tensor descriptors (TMA) that Triton compiles for
_DEEPEST = 512  # bytes of a row in one step of a product
_HELD = 1024  # bytes of products a thread: as much as registers hold
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

    def excess(self, values: Values, count: int) -> np.ndarray:
        """By how much each of ``count`` rows breaks it; not positive where it does not."""
        number, limit = (np.asarray(f(values), dtype=float) for f in (self.number, self.limit))
        return np.broadcast_to(number - limit, (count,))

    def explain(self, values: Mapping[str, Any], at: int) -> str:
        """Why row ``at`` breaks it, with both numbers."""
        own = {n: (v[at] if isinstance(v, np.ndarray) and v.ndim else v) for n, v in values.items()}
        number = float(np.asarray(self.number(own)))
        limit = float(np.asarray(self.limit(own)))
        return self.words(own, number, limit)


@dataclass(frozen=True)
class Learned:
    """A tile that the compiler refused or aborted on (``hard``), or that spilled: ``knobs`` not to come together."""

    knobs: Mapping[str, int]
    why: str
    hard: bool = True

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.knobs.items())), self.why, self.hard))


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
    rules.append(
        Constraint(
            "occupancy",
            True,
            lambda v: (v["per_unit"] < 1) & (v["shared"] <= limits.shared_bytes_per_block) & 1,
            lambda v: 0,
            lambda v, n, m: f"not one program of {_tile(problem, v)} fits a unit's registers and warps",
        )
    )
    if problem.family in ("matmul", *ATTENTION):
        rules += _contraction(problem, target)
    else:
        rules += _points(problem, target)
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


def _count(n: float, what: str) -> str:
    return f"{n:.0f} {what}" if n == 1 else f"{n:.0f} {what}s"


def _tile(problem: Problem, v: Mapping[str, Any]) -> str:
    """A tile in a few words.

    >>> _tile(Problem("matmul"), {"BM": 256, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3})
    '256×256×64 with 3 stages and 8 warps'
    """
    warps = _count(v["num_warps"], "warp")
    names = ("BM", "BN", "BK") if problem.family == "matmul" else ("BM", "BN")
    if problem.family in ("matmul", *ATTENTION):
        shape = "×".join(str(v[n]) for n in names)
        return f"{shape} with {_count(v['num_stages'], 'stage')} and {warps}"
    shape = f"{v['XB']}×{v['RB']}" if problem.family in ("reduction", "scan") else str(v["XB"])
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
    limits = target.limits
    assert limits is not None
    limit = limits.registers_per_thread
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
                    f"{_count(v['num_warps'], 'warp')} needs {n:.0f} accumulators a thread; "
                    f"at most {m:.0f} registers exist"
                ),
            )
        )
    for axis in ("m", "n", "k") if problem.family == "matmul" else ("m", "n"):
        rules.append(_overhang(f"B{axis.upper()}", axis, getattr(problem, axis), _LEAST))
    if problem.family == "matmul":
        rules += [*_variants(problem, target), _group(problem, target), _depth(problem)]
    each = 1 if not problem.plain else problem.d if problem.family in ATTENTION else 16
    if problem.family in ATTENTION and not problem.matrix:
        each = max(each, 256 // limits.warp_size)  # the lanes multiply: a score each is work for a warp
    rules.append(
        Constraint(
            "warps",
            False,
            lambda v: v["num_warps"],
            lambda v: np.maximum(1, v["BM"] * v["BN"] * each // 256),
            lambda v, n, m: f"{n:.0f} warps for {v['BM']}×{v['BN']}: there is work for {m:.0f}",
        )
    )
    if problem.plain:
        rules.append(_plain(problem))
    elif not problem.matrix:
        rules += _by_lanes(problem)
    return rules


def _variants(problem: Problem, target: Target) -> list[Constraint]:
    """Rules for the ways to write a product: descriptors, a persistent grid, the epilogue in pieces, k in parts."""
    if "TMA" not in load_header("matmul").knobs:
        return []
    here = target.arch in DESCRIPTORS
    why = (
        f"{target.name} ({target.arch}) has no tensor descriptors; {' and '.join(DESCRIPTORS)} have"
        if not here
        else "neither operand can come by a descriptor: none lies in memory as it is, 16 bits wide, contiguous along "
        "one axis and all else at multiples of 16 bytes"
    )

    def programs(v: Values) -> Any:
        return problem.batch * v["SPLIT"] * -(-problem.m // v["BM"]) * -(-problem.n // v["BN"])

    return [
        Constraint(
            "descriptors",
            True,
            lambda v: v["TMA"],
            lambda v: int(here and problem.described > 0),
            lambda v, n, m: why,
        ),
        Constraint(
            "persistent grid",
            False,
            lambda v: v["PERSIST"],
            lambda v: np.minimum(v["per_unit"], programs(v) // (target.units + 1)) * here,
            lambda v, n, m: (
                f"{n:.0f} programs a unit that stay: {v['per_unit']:.0f} fit, and there are {programs(v)} tiles for "
                f"{target.units} units" + ("" if here else f"; tried on {' and '.join(DESCRIPTORS)} only")
            ),
        ),
        Constraint(
            "specialization",
            True,
            lambda v: v["SPECIALIZE"],
            lambda v: (v["TMA"] > 0) * (v["num_warps"] == 4) * here,
            lambda v, n, m: (
                f"warps of their own for loads need descriptors and 4 warps, not TMA={v['TMA']} and {v['num_warps']}: "
                "else the compiler leaves them out without a word"
            ),
        ),
        Constraint(
            "split",
            True,
            lambda v: (v["SPLIT"] > 1) * (1 - problem.splits * (problem.k % (v["SPLIT"] * SPLIT_DEPTH) == 0)),
            lambda v: 0,
            lambda v, n, m: (
                f"k of {problem.k} cannot be cut into {v['SPLIT']} parts"
                + (f", each a multiple of {SPLIT_DEPTH}" if problem.splits else ": it is no product that can be split")
            ),
        ),
        Constraint(
            "pieces",
            False,
            lambda v: v["PIECES"],
            lambda v: np.where(v["SPLIT"] == 1, np.maximum(1, v["BN"] // 32), 1) if problem.point_weight else 1,
            lambda v, n, m: (
                f"an epilogue in {n:.0f} pieces of {v['BN']} columns: {m:.0f} are the most that save registers"
            ),
        ),
    ]


def _group(problem: Problem, target: Target) -> Constraint:
    """Grouping only where it changes something: more than one wave, and no more rows than there are."""

    def most(v: Values) -> Any:
        rows, columns = -(-problem.m // v["BM"]), -(-problem.n // v["BN"])
        one_wave = problem.batch * v.get("SPLIT", 1) * rows * columns <= target.units * v["per_unit"]
        return np.where(one_wave, 1, rows)

    return Constraint(
        "group",
        False,
        lambda v: v["GROUP"],
        most,
        lambda v, n, m: f"a group of {n:.0f} rows of tiles where {m:.0f} is the most that changes the order",
    )


def _depth(problem: Problem) -> Constraint:
    """No steps far beyond those that were measured (256 bytes of a row): registers there are extrapolated."""
    return Constraint(
        "depth",
        False,
        lambda v: v["BK"] * problem.itemsize,
        lambda v: _DEEPEST,
        lambda v, n, m: f"{v['BK']} along k is {n:,.0f} bytes of a row a step; {m:.0f} are the most tried",
    )


def _plain(problem: Problem) -> Constraint:
    """Products summed without matrix instructions: all of a tile's products are held at once."""
    return Constraint(
        "plain sums",
        False,
        lambda v: v["BM"] * v["BN"] * v.get("BK", problem.d) * problem.itemsize / v["threads"],
        lambda v: _HELD,
        lambda v, n, m: f"{n:,.0f} bytes of products a thread, without matrix instructions; at most {m:,.0f} stay",
    )


def _by_lanes(problem: Problem) -> list[Constraint]:
    """Rules for products at full precision, whose operands pass through registers."""
    if problem.family in ATTENTION:
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


def _points(problem: Problem, target: Target) -> list[Constraint]:
    """Rules of pointwise kernels, reductions and scans."""
    rules = [_overhang("XB", "x", problem.x)]
    if problem.family == "scan":
        rules += _scan(problem, target)
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
    points = next_power(problem.x * problem.r * problem.steps)
    rules.append(
        Constraint(
            "idle threads",
            False,
            lambda v: np.minimum(v["threads"], points),
            lambda v: v["XB"] * v.get("RB", 1) * v.get("SIDE", 1),
            lambda v, n, m: f"{v['threads']} threads for {m:.0f} elements",
        )
    )
    return rules


def _scan(problem: Problem, target: Target) -> list[Constraint]:
    """Rules of scans: what the template can say, no more steps at once than there are, and eager's order of sums
    where that many recurrences keep the device busy."""
    row = next_power(problem.r)
    assert target.limits is not None
    enough = target.units * _BUSY_WARPS * target.limits.warp_size
    return [
        Constraint(
            "state",
            True,
            lambda v: (v["RB"] != row) * 1,
            lambda v: 0,
            lambda v, n, m: f"RB={v['RB']}: a state of {problem.r} places takes {row}",
        ),
        Constraint(
            "side by side",
            True,
            lambda v: ((v["SIDE"] > 1) & ((v["STEPS"] > 1) | (not problem.lines) | (problem.r > 1))) * 1,
            lambda v: 0,
            lambda v, n, m: f"SIDE={v['SIDE']} is for recurrences without a fold, and STEPS=1",
        ),
        Constraint(
            "in order",
            False,
            lambda v: ((v["SIDE"] > 1) & ((problem.ordered or problem.across) and problem.x >= enough)) * 1,
            lambda v: 0,
            lambda v, n, m: f"{problem.x} recurrences keep the device busy one step after the other; SIDE changes sums",
        ),
        _overhang("STEPS", "time", problem.steps),
        _overhang("SIDE", "time", problem.steps),
    ]


def _from_learned(item: Learned) -> Constraint:
    """A rule out of what the compiler said of one tile."""

    def same(v: Values) -> Any:
        hit = np.asarray(True)
        for name, value in item.knobs.items():
            hit = hit & (np.asarray(v[name]) == value)
        return hit * 1

    return Constraint("compiler", item.hard, same, lambda v: 0, lambda v, n, m: item.why)
