"""The search for a sharding against exhaustive enumeration, and the recipes it must find by itself."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tessel.ir.node import Builder, Graph, Value, make_input
from tessel.ir.text import value_names
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.solve.comm import P, axes_of
from tessel.solve.memory import MODES, Kept, kept_of
from tessel.solve.shard_choice import Setting
from tessel.solve.shard_price import Pricer
from tessel.solve.shard_search import Answer, search
from tessel.solve.shard_tables import Form
from tessel.solve.units import Segment, Tensor, repeats, segments_of, units_of
from tessel.targets import get_target
from tessel.targets.mesh import Link, Mesh

MOST = 60_000  # assignments that one exhaustive search may look at
H100 = get_target("h100")


def random_graph(r: random.Random) -> Graph:
    """Products with parameters, pointwise work and sums of earlier values, at sizes that some axes divide."""
    sizes = [4, 8, 6, 64]
    m, width = r.choice([4, 8, 64]), r.choice(sizes)
    x = make_input("x", TensorType((m, width), torch.float32))
    builder = Builder([x])
    values: list[Value] = [x.out]
    for i in range(r.randint(1, 3)):
        a = r.choice(values[-2:])
        kind = r.choice(["matmul", "matmul", "relu", "add", "mul"]) if a is not x.out else "matmul"
        if kind == "matmul":
            w = make_input(f"w{i}", TensorType((a.shape[1], r.choice(sizes)), torch.float32), "param")
            builder.inputs.append(w)
            values.append(builder.add(OPS["matmul"], a, w.out))
        elif kind == "relu":
            values.append(builder.add(OPS["relu"], a))
        else:
            b = r.choice([v for v in values if v.shape == a.shape])
            values.append(builder.add(OPS[kind], a, b))
    return builder.finish((values[-1],))


def domains(segments: list[Segment], modes: tuple[str, ...], pricer: Pricer, choices: Any) -> tuple[Any, ...]:
    """Every unit's choices and every tensor's forms, as the documentation of the search states them."""
    nothing = Kept(frozenset(), frozenset(), frozenset())
    train = pricer.setting.train
    kept = [kept_of(s.units, s.before, m) if train else nothing for s, m in zip(segments, modes)]
    forms: dict[Tensor, list[Form]] = {}
    for segment, k in zip(segments, kept):
        for unit in segment.units:
            for i, t in enumerate(unit.results):
                layouts = pricer.layouts(t)
                if t.cut:
                    forms[t] = [Form(s) for s in layouts.states if P not in s]
                elif len(t.users) > 1 or (t in k.saved and t.users):
                    states = {c.outs[i] for c in choices[unit]}
                    states |= {c.needs[j] for u, j in t.users for c in choices[u]}
                    own = [s for s in states if P not in s]
                    forms[t] = [Form(s) for s in own] + [Form(s, True) for s in own if t in k.saved]
    return kept, forms


def cost(segments: Any, kept: Any, pricer: Pricer, pick: Any, form: Any) -> tuple[float, float]:
    """Seconds and bytes of one assignment, from the definitions."""
    k = pricer.setting.microbatches
    place = {u: i for i, s in enumerate(segments) for u in s.units}
    seconds = nbytes = 0.0
    for i, segment in enumerate(segments):
        if segment.before is not None and segment.before in kept[i].saved:
            nbytes += pricer.layouts(segment.before).local_bytes(form[segment.before].state)
        for unit in segment.units:
            c = pick[unit]
            seconds += c.seconds(k) + (k * c.forward if unit in kept[i].again else 0)
            nbytes += c.nbytes
            for t, out in zip(unit.results, c.outs):
                layouts = pricer.layouts(t)

                def change(a: Any, b: Any, layouts: Any = layouts) -> tuple[float, float]:
                    at = layouts.number[a], layouts.number[b]
                    return k * layouts.total[at], k * layouts.forward[at]

                if t not in form:
                    if t.users:
                        both, ahead = change(out, pick[t.users[0][0]].needs[t.users[0][1]])
                        seconds += both + (ahead if t in kept[i].redone else 0)
                    elif t in kept[i].saved:
                        nbytes += layouts.local_bytes(out)
                    continue
                both, ahead = change(out, form[t].state)
                seconds += both
                products = [u for u, _ in t.users if u.op == "matmul"]
                late = max(0.0, ahead - k * sum(pricer.least_work(u) for u in products))
                if not t.cut:
                    seconds += late if t in kept[i].redone else 0
                    if form[t].source:
                        if P in out or ahead == 0:
                            return math.inf, 0
                        seconds += late
                    if t in kept[i].saved:
                        nbytes += layouts.local_bytes(out if form[t].source else form[t].state)
                for user, j in t.users:
                    both, ahead = change(form[t].state, pick[user].needs[j])
                    own = kept[place[user]]
                    seconds += both + (ahead if t in own.saved or t in own.redone else 0)
    return seconds, nbytes


def exhaustive(segments: list[Segment], pricer: Pricer) -> list[tuple[float, float]] | None:
    """(seconds, bytes) of every plan; None if there are too many."""
    units = [u for s in segments for u in s.units]
    choices = {u: pricer.choices(u) for u in units}
    remat = pricer.setting.remat
    found = []
    allowed = (MODES if remat == "auto" else (remat,)) if pricer.setting.train else ("none",)
    for modes in product(allowed, repeat=len(segments)):
        kept, forms = domains(segments, modes, pricer, choices)
        if math.prod(map(len, [*choices.values(), *forms.values()])) > MOST / len(MODES) ** len(segments):
            return None
        for picks in product(*choices.values()):
            for own in product(*forms.values()):
                found.append(cost(segments, kept, pricer, dict(zip(units, picks)), dict(zip(forms, own))))
    return [f for f in found if f[0] < math.inf]


def solve(segments: list[Segment], pricer: Pricer, cap: float) -> Answer:
    return search(segments, range(len(segments)), pricer, cap)


def test_equals_exhaustive_search() -> None:
    """200 random graphs, meshes and caps: the same optimum, and a bound that is one."""
    r = random.Random(7)
    done, capped, kinds = 0, 0, Counter[str]()
    while done < 200:
        graph = random_graph(r).live()
        mesh = r.choice(
            [Mesh({"a": 2}), Mesh({"a": 4}), Mesh({"a": 2, "b": 2}), Mesh({"dp": 2, "tp": 2}), Mesh({"a": 3})]
        )
        links = {a: Link(r.choice([1e-9, 1e-6]), r.choice([1e9, 1e11, 1e13])) for a in mesh}
        axes = axes_of(Mesh(dict(mesh), links), H100)
        setting = Setting(r.random() < 0.8, r.choice(["adamw", "sgd"]), r.choice([1, 1, 2]), r.choice(["auto", *MODES]))
        segments = segments_of(units_of(graph, value_names(graph))[0])
        pricer = Pricer(H100, axes, setting)
        if not segments:  # no parameter was drawn
            continue
        plans = exhaustive(segments, pricer)
        if not plans:
            continue
        done += 1
        least, most = min(m for _, m in plans), min(plans)[1]
        cap = r.choice([least - 1, least, (least + most) / 2, most, r.uniform(least, max(least, most))])
        fits = [t for t, m in plans if m <= cap]
        answer = solve(segments, pricer, cap)
        assert answer.least == pytest.approx(least, rel=1e-9)
        if not fits:
            assert not answer.fits
            continue
        capped += min(fits) > min(plans)[0]
        kinds.update(u.op for s in segments for u in s.units)
        assert answer.seconds == pytest.approx(min(fits), rel=1e-9), (str(graph), str(mesh), setting, cap)
        assert answer.nbytes <= cap * (1 + 1e-12) and answer.bound <= min(fits) * (1 + 1e-9)
    assert capped >= 20 and len(kinds) >= 4, (capped, kinds)  # the cap must have mattered, and more than products


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(1.0, 3.0), min_size=2, max_size=4))
def test_more_memory_never_worsens_the_optimum(seed: int, caps: list[float]) -> None:
    graph = random_graph(random.Random(seed)).live()
    segments = segments_of(units_of(graph, value_names(graph))[0])
    assume(bool(segments))
    pricer = Pricer(H100, axes_of(Mesh({"dp": 2, "x": 2}), H100), Setting(train=True))
    least = solve(segments, pricer, 0.0).least
    times = [solve(segments, pricer, least * cap).seconds for cap in sorted(caps)]
    assert all(a >= b for a, b in pairwise(times)), times


def test_repeats() -> None:
    assert repeats("abab") == (0, 2, 2) and repeats("xaaay") == (1, 1, 3) and repeats("abc") == (0, 3, 1)
