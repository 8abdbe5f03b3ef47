"""Tiles chosen together: the answer is that of trying everything, and what cannot be is named."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tessel.errors import TesselError
from tessel.solve import Problem
from tessel.solve.joint import Infeasible, Part, Rule, part_of, solve_joint
from tessel.solve.solver import Table
from tessel.targets import get_target

H100 = get_target("h100")
LIMIT = 232448  # bytes of shared memory a block has


def brute_force(parts: Sequence[Part], rules: Sequence[Rule], own: bool = True) -> tuple[int, tuple[int, ...]] | None:
    """The least cost and the first rows that have it, by trying everything; rules are plain Python over the rows."""
    best: tuple[int, tuple[int, ...]] | None = None
    allowed = [[i for i in range(len(p)) if not own or not any(m[i] for m in p.broken.values())] for p in parts]
    codes = [compile(r.formula, r.name, "eval") for r in rules]
    rows = [[_Row({c: int(v[i]) for c, v in p.rows.items()}) for i in range(len(p))] for p in parts]
    for at in itertools.product(*allowed):
        found = sum(int(p.cost[i]) for p, i in zip(parts, at)), at
        if best is not None and found >= best:
            continue
        names = {p.name: r[i] for p, r, i in zip(parts, rows, at)}
        if all(eval(code, {}, names) for code in codes):
            best = found
    return best


class _Row:
    def __init__(self, values: Mapping[str, int]) -> None:
        self.__dict__.update(values)


def random_part(name: str, rng: random.Random, count: int) -> Part:
    """Tiles of a split product: some broken by a rule of their own, some as dear as others."""
    columns: dict[str, list[int]] = {n: [] for n in ("BM", "BN", "BK", "SPLIT", "GROUP", "warps", "stages", "shared")}
    for _ in range(count):
        bm, bn, bk = (rng.choice((16, 32, 64, 128)) for _ in range(3))
        split, group = rng.choice((1, 2, 3, 4)), rng.choice((1, 4, 8))
        warps, stages = rng.choice((4, 8)), rng.choice((2, 3, 4))
        values = (bm, bn, bk, split, group, warps, stages, stages * (bm + bn) * bk * 2)
        for n, v in zip(columns, values):
            columns[n].append(v)
    cost = np.array([rng.choice((rng.randrange(1, 12), rng.randrange(1, 100_000))) for _ in range(count)])
    broken = {w: np.array([rng.random() < 0.15 for _ in range(count)]) for w in ("registers", "threads")}
    return Part(name, {n: np.array(v) for n, v in columns.items()}, cost, broken)


def random_rules(names: Sequence[str], rng: random.Random) -> list[Rule]:
    """A few of: a shared stage, a common tile, a chain, split-K over a length, groups, shards, products."""
    a, b = rng.sample(list(names), 2)
    k, ways, rows = rng.choice((384, 1024, 1536)), rng.choice((1, 2, 4)), rng.choice((256, 512, 640))
    total = " + ".join(f"{n}.shared" for n in names)
    kinds = [
        f"{total} <= {rng.randrange(20_000, 300_000)}",
        f"{a}.BM == {b}.BM",
        f"{a}.BN == {b}.BK",
        f"{k} % ({a}.BK * {a}.SPLIT) == 0",
        f"{a}.SPLIT * {b}.SPLIT <= {rng.choice((2, 4, 6))}",
        f"({rows} // {ways}) % {b}.BM == 0",
        f"{a}.GROUP <= {b}.GROUP",
        f"{a}.warps == {b}.warps",
        f"{a}.stages + {b}.stages < {rng.choice((5, 6, 7))}",
        f"2 * {a}.stages - {b}.stages >= {rng.choice((1, 2, 3))}",
        f"{a}.SPLIT != {b}.SPLIT",
        f"{a}.SPLIT > {b}.SPLIT or not {a}.GROUP == 1",
        f"1 < {a}.SPLIT <= 3 and {b}.GROUP > 1",
    ]
    return [Rule(f"r{i}", f) for i, f in enumerate(rng.sample(kinds, rng.randrange(1, 5)))]


def problem(seed: int) -> tuple[list[Part], list[Rule]]:
    rng = random.Random(seed)
    count = rng.choice((2, 2, 3, 3, 4))
    most = {2: 20, 3: 10, 4: 6}[count]
    parts = [random_part(f"p{i}", rng, rng.randrange(3, most + 1)) for i in range(count)]
    return parts, random_rules([p.name for p in parts], rng)


def test_as_brute_force_on_200_random_problems() -> None:
    solved = 0
    for seed in range(200):
        parts, rules = problem(seed)
        want = brute_force(parts, rules)
        if want is None:
            with pytest.raises(Infeasible) as e:
                solve_joint(parts, rules)
            assert_core(parts, rules, e.value.core)
            continue
        got = solve_joint(parts, rules)
        assert (got.cost, tuple(got.picks[p.name] for p in parts)) == want, f"seed {seed}: {rules}"
        solved += 1
    assert 40 < solved < 190  # both kinds were there


def assert_core(parts: Sequence[Part], rules: Sequence[Rule], core: Sequence[str]) -> None:
    """The core clashes by itself, and without any one of its members it does not."""

    def feasible(names: Sequence[str]) -> bool:
        kept = [
            Part(p.name, p.rows, p.cost, {w: m for w, m in p.broken.items() if f"{p.name}: {w}" in names})
            for p in parts
        ]
        return brute_force(kept, [r for r in rules if r.name in names]) is not None

    assert not feasible(core)
    assert all(feasible([n for n in core if n != left]) for left in core)


def test_sums_of_many_rows_and_negative_numbers() -> None:
    """Rules that are too large to be tabulated go to z3 as sums; every sign, compared with trying everything."""
    rng = random.Random(5)

    def wide(name: str) -> Part:
        return Part(name, {"v": np.array(rng.sample(range(-5000, 5000), 70))}, np.array(rng.choices(range(500), k=70)))

    parts = [wide("a"), wide("b")]
    for sign in ("<=", "<", ">=", ">", "=="):
        for formula in (f"a.v - 2 * b.v {sign} 37", f"a.v + b.v {sign} -200", f"7 {sign} b.v - a.v"):
            rules = [Rule("r", formula), Rule("s", "a.v + b.v >= -9000")]
            want = brute_force(parts, rules)
            if want is None:
                with pytest.raises(Infeasible):
                    solve_joint(parts, rules)
            else:
                got = solve_joint(parts, rules)
                assert (got.cost, (got.picks["a"], got.picks["b"])) == want, formula


# ---------------------------------------------------------------- real tables


SPLITS = {"SPLIT": (1, 2, 3, 4, 8)}


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    return {
        "up": Table(Problem.product(4096, 4096, 128), H100),
        "down": Table(Problem.product(4096, 128, 4096), H100),
        "split": Table(Problem.product(128, 128, 12288), H100, more=SPLITS),
    }


def test_split_k_pays_where_programs_are_few(tables: dict[str, Table]) -> None:
    fastest = tables["split"].candidate(0)
    assert fastest.knobs["SPLIT"] > 1 and fastest.time.combine > 0
    part = part_of("split", tables["split"])
    even = solve_joint([part], [Rule("even", "12288 % (split.BK * split.SPLIT) == 0"), Rule("few", "split.SPLIT <= 4")])
    assert even.rows["split"]["SPLIT"] in (2, 3, 4)
    none = solve_joint([part], [Rule("whole", "split.SPLIT == 1")])
    assert none.cost > even.cost


def test_a_chain_in_one_block(tables: dict[str, Table]) -> None:
    parts = [part_of(n, tables[n]) for n in ("up", "down")]
    free = sum(int(p.cost[tables[p.name].rows].min()) for p in parts)
    rules = [
        Rule("common tile", "up.BM == down.BM"),
        Rule("chain", "up.BN == down.BK"),
        Rule("one block", f"up.shared + down.shared <= {LIMIT}"),
    ]
    got = solve_joint(parts, rules)
    up, down = got.rows["up"], got.rows["down"]
    assert up["BM"] == down["BM"] and up["BN"] == down["BK"] and up["shared"] + down["shared"] <= LIMIT
    assert free <= got.cost == solve_joint(parts, rules).cost
    assert solve_joint(parts, rules[:1]).cost <= got.cost


def forced(name: str, **given: int) -> tuple[str, dict[str, int]]:
    return name, given


PLANTED: list[tuple[list[tuple[str, dict[str, int]]], list[str], set[str], str]] = [
    # kernels with forced knobs, rules by formula, the core, words that must be there
    ([forced("up", BM=256, BN=256)], [], {"up: given BM", "up: given BN", "up: accumulators"},
     "256×256 with 8 warps needs 256 accumulators a thread; at most 255 registers exist"),
    ([forced("up", BM=512, BN=128)], [], {"up: given BM", "up: given BN", "up: accumulators"}, "512×128 with 8 warps"),
    ([forced("down", BM=128, BN=128, num_warps=2)], [],
     {"down: given BM", "down: given BN", "down: given num_warps", "down: accumulators"}, "2 warps needs 256"),
    ([forced("down", BM=256, BK=256, num_stages=3)], [],
     {"down: given BM", "down: given BK", "down: given num_stages", "down: shared memory"},
     "needs 417,792 bytes of shared memory; a block has at most 232,448"),
    ([forced("up", BK=256)], [], {"up: given BK", "up: overhang k"}, "a tile of 256 along k for 128: 128 suffice"),
    ([forced("down", BN=256)], [], {"down: given BN", "down: overhang n"}, "256 along n for 128"),
    ([forced("down", BK=512)], [], {"down: given BK", "down: depth"}, "512 along k is 1,024 bytes"),
    ([forced("up", BM=16, BN=16, num_warps=4)], [],
     {"up: given BM", "up: given BN", "up: given num_warps", "up: warps"}, "4 warps for 16×16: there is work for 1"),
    ([forced("down", BM=64, BN=128), forced("up", BM=128)], ["up.BM == down.BM"],
     {"down: given BM", "up: given BM", "r0"}, "down.BM 64, up.BM 128"),
    ([forced("up"), forced("down")], ["up.shared + down.shared <= 1000"], {"r0"}, "up.shared"),
    ([forced("up", num_warps=4), forced("down", num_warps=8)], ["up.num_warps == down.num_warps"],
     {"up: given num_warps", "down: given num_warps", "r0"}, "num_warps=4 was asked for"),
    ([forced("up", BN=64), forced("down", BK=32)], ["up.BN == down.BK"], {"up: given BN", "down: given BK", "r0"},
     "BK=32 was asked for"),
    ([forced("split", SPLIT=8)], ["split.SPLIT <= 4"], {"split: given SPLIT", "r0"}, "SPLIT=8 was asked for"),
    ([forced("split", SPLIT=3)], ["4096 % (split.BK * split.SPLIT) == 0"], {"split: given SPLIT", "r0"}, "SPLIT=3"),
    ([forced("split")], ["100 % (split.BK * split.SPLIT) == 0"], {"r0"}, "100 % (split.BK * split.SPLIT) == 0"),
    ([forced("up", BM=128)], ["(4096 // 64) % up.BM == 0"], {"up: given BM", "r0"}, "up.BM 128"),  # shards of 64 rows
    ([forced("up")], ["(4096 // 512) % up.BM == 0"], {"r0"}, "(4096 // 512) % up.BM == 0"),  # of 8
    ([forced("up", BN=128), forced("down", BK=256, num_stages=4)], ["up.BN == down.BN"],
     {"up: given BN", "down: given BK", "down: given num_stages", "down: shared memory", "r0"},
     "16×128×256 with 4 stages"),
    ([forced("up"), forced("down")], ["up.BM < down.BM", "down.BM < up.BM"], {"r0", "r1"}, "up.BM < down.BM"),
    ([forced("up"), forced("down"), forced("split")],
     ["up.BM == down.BM", "down.BM == split.BM", "up.BM > split.BM"], {"r0", "r1", "r2"}, "up.BM > split.BM"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(PLANTED)))
def test_planted_clashes_are_named(case: int, tables: dict[str, Table]) -> None:
    kernels, formulas, core, words = PLANTED[case]
    parts = [part_of(name, tables[name], given) for name, given in kernels]
    rules = [Rule(f"r{i}", f) for i, f in enumerate(formulas)]
    with pytest.raises(Infeasible) as e:
        solve_joint(parts, rules)
    assert set(e.value.core) == core
    assert words in str(e.value)


def test_twenty_are_planted() -> None:
    assert len(PLANTED) == 20


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("up.BM ==", "invalid syntax"),
        ("up.BQ == 1", "up has no column 'BQ'"),
        ("upp.BM == 1", "no part 'upp'"),
        ("__import__('os').system('x') == 0", "is not allowed"),
        ("up.BM.real == 1", "is not allowed|no comparison"),
        ("1 == 1", "no comparison"),
        ("up.BM", "no comparison"),
        ("up.BM + 1 and up.BN == 2", "no comparison"),
    ],
)
def test_rules_that_say_nothing(formula: str, words: str, tables: dict[str, Table]) -> None:
    with pytest.raises(TesselError, match=words):
        solve_joint([part_of("up", tables["up"])], [Rule("r", formula)])


def test_names_must_be_unique(tables: dict[str, Table]) -> None:
    part = part_of("up", tables["up"])
    with pytest.raises(TesselError, match="two parts"):
        solve_joint([part, part], [])
    with pytest.raises(TesselError, match="two rules"):
        solve_joint([part], [Rule("r", "up.BM == 16"), Rule("r", "up.BN == 16")])
    with pytest.raises(TesselError, match="no identifier"):
        part_of("not a name", tables["up"])
    with pytest.raises(TesselError, match="no knob 'BQ'"):
        part_of("up", tables["up"], {"BQ": 1})


def test_no_rules_give_each_its_cheapest(tables: dict[str, Table]) -> None:
    parts: list[Any] = [part_of(n, tables[n]) for n in ("up", "down")]
    got = solve_joint(parts, [])
    for p in parts:
        own = p.cost[tables[p.name].rows]
        assert int(p.cost[got.picks[p.name]]) == own.min()
