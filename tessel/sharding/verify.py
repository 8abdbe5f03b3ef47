"""Proves that the programs of all ranks compute what one device computes, operation by operation.

The ranks' graphs are read side by side, in order, against the graph of whole tensors. Of every value of theirs it
is worked out of which whole tensor it is which share, or which term of a sum: for inputs that is said, for each
operation and each collective it is proved (``solve/lemma.py``) or the walk ends there, with the operation's line.
Nothing is taken over from what made the programs but the shardings of inputs and outputs.

    report = verify_program(program, seconds=60)
    report.faults      # ["add at model.py:12: reads %7 as {·,·|tp:sum}, ..."]
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, permutations, product
from math import prod
from typing import Any

import torch

from ..errors import TesselError
from ..frontend.joint import Step
from ..ir.node import INPUT, Builder, Graph, Node, Value, map_values
from ..ir.sharding import Sharding
from ..ir.text import value_names
from ..ir.types import Loc, TensorType
from ..ops.collective import COLLECTIVE
from ..ops.dims import Piece
from ..passes._exchange import EXCHANGING, exchange_of, write_exchange
from ..passes._factors import Rule, Split, compose, layout, project, rule_of
from ..passes.partition import Program
from ..solve.lemma import Operand, Verdict, holds, interpreted, moved
from ..targets.mesh import Mesh
from .annotate import Annotation, Annotations
from .plan_file import ShardingPlan
from .spmd import Spmd, lay_out

__all__ = ["Report", "lay_out_planned", "verify_program", "verify_ranks"]

_FREE = frozenset({"full", "iota"})
QUESTION = 2000  # milliseconds for one question to z3


@dataclass
class Report:
    """What was proved.

    Attributes:
        operations, collectives: how many hold, of the program of one rank.
        lemmas: how many different statements they came down to.
        opaque: operators that were uninterpreted functions of what their dims strings say, and how often.
        unproved: what z3 or the time did not suffice for; the walk took it for true.
        faults: what is wrong; the walk ends at the first.
    """

    operations: int = 0
    collectives: int = 0
    lemmas: int = 0
    opaque: Counter[str] = field(default_factory=Counter)
    unproved: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def proved(self) -> bool:
        """Nothing is wrong and nothing is left open."""
        return not self.faults and not self.unproved

    def text(self) -> str:
        """The report in a few lines."""
        lines = [f"fault: {f}" for f in self.faults]
        lines += [f"not proved: {u}" for u in self.unproved]
        exact = self.operations - self.opaque.total()
        lines.append(
            f"{self.operations} operations and {self.collectives} collectives of a rank hold, {self.lemmas} different "
            f"statements: {exact} operations by arithmetic, {self.opaque.total()} by what their dims strings say"
        )
        if self.opaque:
            lines.append("  " + ", ".join(f"{n} {name}" for name, n in self.opaque.most_common()))
        return "\n".join(lines)


class _Fault(Exception):
    """The walk ends here; the text is for the user."""


@dataclass(frozen=True)
class _Held:
    """A value of the ranks' graphs: the share of a whole value. ``number``: of all its elements, whatever its share."""

    value: Value
    sharding: Sharding
    number: float | None = None


def lay_out_planned(plan: ShardingPlan, model: torch.nn.Module, step: Step) -> tuple[Spmd, str]:
    """The programs that a plan gives for a captured step of a model, and what has to be said of them.

    A plan of part of a model's layers holds no program: parameters and inputs lie as it says then, the rest follows.

    Raises:
        TesselError: the plan is for another model.
    """
    if "program" in plan.data:
        from .planned import lay_out_plan  # the planner with it

        return lay_out_plan(plan, step), ""
    where = Loc(f"the plan of {plan.data['model']['name']}")
    said = Annotations()
    for name, p in model.named_parameters():
        kept = plan.sharding(name)
        entry = plan.data["tensors"][name]
        if list(p.shape) != list(entry["shape"]):
            raise TesselError(f"{name} is {list(p.shape)} in the model and {list(entry['shape'])} in the plan")
        used = Sharding.parse(entry.get("use", entry["sharding"]))
        gathered = tuple(a for a in kept.axes if a not in used.axes)
        said.entries.append(Annotation("tensor", name, kept, gathered, 0, where))
    split = [tuple(plan.data["settings"][k]) for k in ("batch_axes", "sequence_axes")]
    inputs = [n.out for i, n in enumerate(step.forward.graph.inputs) if i in step.positions]
    for i, v in enumerate(inputs):
        known = split[:1] if v.dtype.is_floating_point else split  # tokens have a sequence, features other dimensions
        dims = (known + [()] * v.type.rank)[: v.type.rank]
        said.entries.append(Annotation("tensor", f"inputs[{i}]", Sharding(tuple(dims)), (), 0, where))
    note = "the plan holds no program: of it, what parameters and inputs are split by is taken"
    return lay_out(step, Mesh(plan.mesh), said), note


def verify_program(program: Program, *, seconds: float = 120.0) -> Report:
    """Prove the programs of all ranks.

    Args:
        program: of ``partition``.
        seconds: what remains then is not proved.
    """
    graphs = [program.rank(r, flat=False) for r in range(program.mesh.devices)]
    return verify_ranks(program, graphs, seconds=seconds)


def verify_ranks(program: Program, ranks: Sequence[Graph], *, seconds: float = 120.0) -> Report:
    """Prove these graphs, one a rank; of ``program`` the whole graph and the shardings at both ends count."""
    walk = _Walk(program, ranks, time.monotonic() + seconds)
    try:
        walk.inputs()
        walk.nodes()
        walk.outputs()
    except _Fault as e:
        walk.report.faults.append(str(e))
    walk.report.lemmas = len(walk.known)
    return walk.report


class _Walk:
    def __init__(self, program: Program, ranks: Sequence[Graph], until: float) -> None:
        self.program, self.graph, self.mesh = program, program.graph, program.mesh
        self.ranks, self.until = ranks, until
        self.report = Report()
        self.names = value_names(self.graph)
        self.held: dict[Value, _Held] = {}  # of every rank's values
        self.free: list[list[Node]] = [[] for _ in ranks]  # constants since the last operation
        self.steps = [n for n in self.graph.nodes if n.op.name not in _FREE]
        self.before: list[list[Node]] = [[]]  # the whole graph's constants before each of them
        for n in self.graph.nodes:
            if n.op.name in _FREE:
                self.before[-1].append(n)
            else:
                self.before.append([])
        self.at = 0
        self.known: dict[Any, Verdict] = {}

    # ------------------------------------------------------------ both ends

    def inputs(self) -> None:
        for i, (node, sharding) in enumerate(zip(self.graph.inputs, self.program.inputs, strict=True)):
            for rank, graph in enumerate(self.ranks):
                got = graph.inputs[i].out
                if sharding is not None:
                    want = sharding.local_shape(node.out.shape, self.mesh)
                    if tuple(got.shape) != tuple(want):
                        raise _Fault(
                            f"input {node.attrs['name']} of rank {rank} is {list(got.shape)}, its share as {sharding} "
                            f"is {list(want)}"
                        )
                self.held[got] = _Held(node.out, sharding or Sharding(()))

    def outputs(self) -> None:
        if self.at < len(self.steps):
            node = self.steps[self.at]
            wanted = {v for n in self.steps[self.at :] for v in n.outs} & set(self.graph.results())
            if wanted:
                raise _Fault(f"{self.title(node)}: no rank computes it, or what is left of the program")
        self.settle_free()
        for i, (out, sharding) in enumerate(zip(self.graph.outputs, self.program.outputs, strict=True)):
            if sharding is not None:
                self.leaves([g.outputs[i] for g in self.ranks], out, sharding, f"output {i}")
        for i, ((target, v), sharding) in enumerate(zip(self.graph.effects, self.program.effects, strict=True)):
            self.leaves([g.effects[i][1] for g in self.ranks], v, sharding, f"new {target.attrs['name']}")

    def leaves(self, got: Sequence[Value], want: Value, sharding: Sharding, what: str) -> None:
        for rank, v in enumerate(got):
            held = self.held.get(v)
            if held is None or held.value != want:
                is_ = "something else" if held is None else self.name(held.value)
                raise _Fault(f"{what} of rank {rank} is {is_}, not {self.name(want)}")
            same = held.sharding == sharding or (
                held.number is not None and held.sharding.parts(self.mesh) == sharding.parts(self.mesh)
            )
            if not same:
                made = self.title(want.node)
                raise _Fault(f"{made}: {what} leaves as {held.sharding}, it is to be {sharding}")

    # ------------------------------------------------------------ side by side

    def nodes(self) -> None:
        queues = [iter(g.nodes) for g in self.ranks]
        while True:
            step = [self.next(rank, q) for rank, q in enumerate(queues)]
            if all(n is None for n in step):
                return
            for rank, n in enumerate(step):
                first = step[0]
                if n is None or first is None or n.op.name != first.op.name:
                    a, b = (m.op.name if m else "nothing" for m in (first, n))
                    where = next(m for m in step if m is not None)
                    raise _Fault(f"{self.title(where)}: rank 0 runs {a} where rank {rank} runs {b}: they would wait")
            nodes = [n for n in step if n is not None]
            if self.exchanged(nodes, queues):
                continue
            if nodes[0].op.name in COLLECTIVE or self.is_share(nodes):
                self.move(nodes)
                self.report.collectives += nodes[0].op.name in COLLECTIVE
            else:
                self.operation(nodes)
                self.report.operations += 1

    def next(self, rank: int, queue: Iterator[Node]) -> Node | None:
        """The rank's next operation; constants on the way are put by."""
        for node in queue:
            if node.op.name not in _FREE:
                return node
            self.free[rank].append(node)
        return None

    def settle_free(self, all_there: bool = True) -> None:
        """Constants of the ranks that stand for those of the whole graph; what is left over are zeros for shares.

        Args:
            all_there: those before the next operation have all been seen.
        """
        for j, whole in enumerate(self.before[self.at]):
            own = [free[j] if j < len(free) else None for free in self.free]
            if None in own and not all_there:
                return
            for rank, n in enumerate(own):
                if n is None or n.op != whole.op:
                    raise _Fault(f"{self.title(whole)}: rank {rank} does not make it")
            found = self.constant(whole, [n for n in own if n is not None])
            for n in own:
                if n is not None:
                    self.held[n.out] = found

    def constant(self, whole: Node, own: Sequence[Node]) -> _Held:
        """Of which share of a constant the ranks have theirs."""
        shape = whole.out.shape
        ratios = [_ratio(n, m) for n, m in zip(shape, own[0].out.shape, strict=True)]
        number = whole.attrs["value"] if whole.op.name == "full" else None
        keys = [k for k in whole.attrs if k not in ("shape", "start")]
        for rank, n in enumerate(own):
            for k in keys:
                if n.attrs.get(k) != whole.attrs[k]:
                    raise _Fault(f"{self.title(whole)}: {k} is {n.attrs.get(k)} on rank {rank}, not {whole.attrs[k]}")
        for s in self.shardings(ratios, self.mesh):
            if number is not None:
                return _Held(whole.out, s, float(number))
            step, first = whole.attrs.get("step", 1), whole.attrs.get("start", 0)
            size = own[0].out.shape[0]
            starts = [first + self.mesh.index(r, s.dims[0]) * size * step for r in range(len(own))]
            if starts == [n.attrs.get("start", 0) for n in own]:
                return _Held(whole.out, s)
        raise _Fault(f"{self.title(whole)}: the ranks' constants are no shares of it")

    def shardings(self, ratios: Sequence[int | None], axes: Sequence[str] | Mapping[str, int]) -> Iterator[Sharding]:
        """Every sharding with so many parts of each dimension."""
        choices = []
        for ratio in ratios:
            ways = [p for k in range(len(axes) + 1) for c in combinations(axes, k) for p in permutations(c)]
            choices.append([w for w in ways if prod(self.mesh[a] for a in w) == ratio and (ratio != 1 or not w)])
        for dims in product(*choices):
            if len({a for d in dims for a in d}) == sum(map(len, dims)):
                yield Sharding(dims)

    def reads(self, nodes: Sequence[Node], i: int) -> tuple[_Held | None, frozenset[int]]:
        """What operand ``i`` is, and the ranks that have zeros in its place."""
        found: set[_Held] = set()
        zero = set()
        for rank, n in enumerate(nodes):
            v = n.operands[i]
            held = self.held.get(v)
            if held is not None:
                found.add(held)
            elif v.op.name == "full" and v.node.attrs["value"] == 0:
                zero.add(rank)
            else:
                raise _Fault(f"{self.title(nodes[rank])}: operand {i} of rank {rank} is no share of anything")
        if len(found) > 1:
            a, b = sorted(map(self.told, found))[:2]
            raise _Fault(f"{self.title(nodes[0])}: some ranks read {a}, others {b}")
        return next(iter(found), None), frozenset(zero)

    # ------------------------------------------------------------ rings and merges

    def exchanged(self, nodes: Sequence[Node], queues: Sequence[Iterator[Node]]) -> bool:
        """Take an operation whose ranks exchange pieces while they compute it, if that begins here.

        What the ranks do then has to be the whole pattern (``passes/_exchange.py``), place by place; that the pattern
        computes the operation is not proved here but tested against one device.
        """
        if self.at == len(self.steps):
            return False
        whole, seen = self.steps[self.at], [list(nodes)]
        if whole.op.name not in EXCHANGING:
            return False
        cut = nodes[0].op.name == "slice" and self.held.get(nodes[0].operands[0])
        if cut:  # of a mask, of which each step of a ring takes a part
            if cut.value not in whole.operands:
                return False
            seen.append([n for r, q in enumerate(queues) if (n := self.next(r, q)) is not None])
        first = seen[-1]
        if len(first) != len(nodes) or any(n.op != whole.op for n in first):
            return False
        self.settle_free()
        args = [[seen[0][r].args[0] if cut and a == seen[0][r].out else a for a in n.args] for r, n in enumerate(first)]
        rule = rule_of(whole)
        flat = [[v for v in some if isinstance(v, Value)] for some in args]
        lies = []
        for i, v in enumerate(whole.operands):
            held = {self.held.get(own[i]) for own in flat}
            (one,) = held if len(held) == 1 else (None,)
            if one is None or one.value != v:
                raise _Fault(f"{self.title(first[0])}: operand {i} is not {self.name(v)} on every rank")
            lies.append(one.sharding)
        split = self.joint_split(rule, lies)
        ex = exchange_of(rule, split)
        if ex is None:
            if cut:
                raise _Fault(f"{self.title(first[0])}: reads part of a mask, and no ring goes through its keys")
            return False
        ring = ex.kind == "ring"
        apart = {f: a for f, a in split.items() if not (ring and f in ("s", "t"))}
        results = [layout(shape, split, rule, self.mesh) for shape in rule.dims.results]
        done: list[list[Value]] = []
        for rank, queue in enumerate(queues):
            attrs = dict(whole.attrs) | self.changed(whole, rule, apart, rank)
            expected = Builder()
            outs = write_exchange(expected, ex, whole, args[rank], attrs, self.mesh, rank)
            actual: dict[Value, Value] = {}
            got = [step[rank] for step in seen]
            for i, want in enumerate(expected.nodes):
                n = got[i] if i < len(got) else self.next(rank, queue)
                same = tuple(_renamed(a, actual) for a in want.args)
                if n is None or n.op != want.op or dict(n.attrs) != dict(want.attrs) or tuple(n.args) != same:
                    where = self.title(n if n is not None else whole)
                    raise _Fault(f"{where}: rank {rank} is to run {want.op.name} here, step {i} of a {ex.kind}")
                actual.update(zip(want.outs, n.outs, strict=True))
            done.append([actual[v] for v in outs])
            if rank == 0:
                self.report.collectives += sum(n.op.name in COLLECTIVE for n in expected.nodes)
        for made in done:
            for old, new, s in zip(whole.outs, made, results, strict=True):
                assert s is not None
                self.held[new] = _Held(old, s)
        self.go_on()
        self.report.operations += 1
        self.report.opaque[f"{whole.op.name} ({ex.kind})"] += 1
        return True

    def joint_split(self, rule: Rule, lies: Sequence[Sharding]) -> Split:
        """The mesh axes of every factor; one axis may split several."""
        found: Split = {}
        for sharding, shape in zip(lies, rule.dims.operands, strict=True):
            for term, axes in zip(shape, sharding.dims, strict=True):
                for factor, some in project(term, axes, rule.sizes, self.mesh)[0].items():
                    found.setdefault(factor, some)
        return found

    # ------------------------------------------------------------ collectives and slices

    def is_share(self, nodes: Sequence[Node]) -> bool:
        """Whether slices cut the ranks' shares, and are none of the whole graph."""
        if nodes[0].op.name != "slice":
            return False
        if self.at == len(self.steps) or self.steps[self.at].op.name != "slice":
            return True
        whole, own = self.steps[self.at].attrs, [n.attrs for n in nodes]
        return any(a.get(k) != whole.get(k) for a in own for k in ("start", "size", "step") if k in whole)

    def move(self, nodes: Sequence[Node]) -> None:
        first = nodes[0]
        self.settle_free(all_there=False)
        held, zero = self.reads(nodes, 0)
        if held is None or zero:
            raise _Fault(f"{self.title(first)}: moves zeros")
        shape = tuple(held.value.shape)
        attrs = {r: n.attrs for r, n in enumerate(nodes)}
        if first.op.name in COLLECTIVE:
            for r, n in enumerate(nodes):
                if dict(n.attrs) != dict(first.attrs):
                    raise _Fault(f"{self.title(first)}: rank {r} calls it otherwise than rank 0: they would wait")
            parts = prod(self.mesh.get(a, 0) for a in first.attrs["axes"])
            if parts != first.attrs["parts"]:
                raise _Fault(f"{self.title(first)}: {first.attrs['parts']} parts over axes of {parts} devices")
        last = Verdict("refuted", "no sharding fits")
        for after in self.goals(first, held, shape):
            key = (first.op.name, held.sharding, after, self.lengths(shape), self.frozen(attrs, first, shape))
            verdict = self.ask(
                key, partial(moved, first.op.name, held.sharding, after, shape, attrs, self.mesh, QUESTION)
            )
            if verdict.state != "refuted":
                self.keep(verdict, first)
                for n in nodes:
                    self.held[n.out] = _Held(held.value, after, held.number)
                return
            last = verdict
        over = f" over {', '.join(first.attrs['axes'])}" if "axes" in first.attrs else ""
        raise _Fault(
            f"{self.title(first)}: {first.op.name}{over} of {self.told(held)} makes no share of it: {last.why}"
        )

    def goals(self, node: Node, held: _Held, shape: Sequence[int]) -> Iterator[Sharding]:
        """The shardings that a collective could bring its operand to."""
        s, a = held.sharding, node.attrs
        axes: tuple[str, ...] = tuple(a.get("axes", ()))
        rest = tuple(p for p in s.partial if p[0] not in axes)
        name = node.op.name
        reduced = name in ("all_reduce", "reduce_scatter")
        if reduced and len(rest) + len(axes) != len(s.partial):
            return  # an axis that nothing is partial over: copies would be added up
        if name == "all_reduce":
            yield Sharding(s.dims, rest)
        elif name == "reduce_scatter":
            yield Sharding(s.dims, rest).with_dim(a["dim"], s.dims[a["dim"]] + axes)
        elif name in ("all_gather", "all_to_all"):
            d = a["dim"] if name == "all_gather" else a["join"]
            if s.dims[d][len(s.dims[d]) - len(axes) :] == axes:
                after = s.with_dim(d, s.dims[d][: len(s.dims[d]) - len(axes)])
                yield after if name == "all_gather" else after.with_dim(a["split"], s.dims[a["split"]] + axes)
        elif name == "slice":
            d = a["dim"]
            ratio = _ratio(s.local_shape(tuple(shape), self.mesh)[d], a["size"])
            unused = [x for x in self.mesh if x not in s.axes and x not in dict(s.partial)]
            for found in self.shardings([ratio], unused):
                yield s.with_dim(d, s.dims[d] + found.dims[0])
        else:
            mine = [x for x in self.mesh if x in {*axes, *s.axes} and x not in dict(s.partial)]
            for found in self.shardings(list(s.parts(self.mesh)), mine):
                yield Sharding(found.dims, s.partial)

    def frozen(self, attrs: Mapping[int, Mapping[str, Any]], node: Node, shape: Sequence[int]) -> Any:
        if node.op.name != "slice":
            return tuple(sorted((k, str(v)) for k, v in node.attrs.items()))
        return node.attrs["dim"], tuple(a["start"] // max(a["size"], 1) for a in attrs.values()), tuple(shape)

    # ------------------------------------------------------------ operations

    def operation(self, nodes: Sequence[Node]) -> None:
        local = nodes[0]
        self.settle_free()
        if self.at == len(self.steps):
            raise _Fault(f"{self.title(local)}: one device computes nothing more here")
        whole = self.steps[self.at]
        if len(local.operands) != len(whole.operands):
            raise _Fault(f"{self.title(local)}: one device computes {self.title(whole)} here")
        rule = rule_of(whole)
        operands, told = self.operands(nodes, whole, rule)
        split = self.split(whole, rule, operands, local)
        operands = [self.fitted(o, shape, split, rule) for o, shape in zip(operands, rule.dims.operands, strict=True)]
        for rank, n in enumerate(nodes):
            self.attributes(whole, n, rule, split, rank)
        last = Verdict("refuted", "no sharding of its results fits")
        for results in self.claims(rule, split, operands, local):
            key = (
                local.op.name, whole.op.name, str(rule.dims), str(whole.attrs), self.literals(whole),
                self.literals(local), tuple(sorted(split.items())), tuple(operands), results,
                tuple(self.lengths([n])[0] for n in rule.sizes.values()),
            )  # fmt: skip
            proof = partial(holds, whole, local, rule.dims, rule.sizes, split, operands, results, self.mesh, QUESTION)
            verdict = self.ask(key, proof)
            if verdict.state != "refuted":
                self.keep(verdict, local)
                self.settle(nodes, whole, results)
                if not interpreted(whole):
                    self.report.opaque[whole.op.name] += 1
                return
            last = verdict
        instead = "" if local.op == whole.op else f" (one device computes {whole.op.name})"
        raise _Fault(f"{self.title(local)}{instead}: reads {'; '.join(told)}: {last.why}")

    def operands(self, nodes: Sequence[Node], whole: Node, rule: Rule) -> tuple[list[Operand], list[str]]:
        found, told = [], []
        for i, v in enumerate(whole.operands):
            held, zero = self.reads(nodes, i)
            if not isinstance(v.type, TensorType):
                continue
            if held is None:
                raise _Fault(f"{self.title(nodes[0])}: operand {i} is zero on every rank")
            if held.value != v:
                raise _Fault(
                    f"{self.title(nodes[0])}: operand {i} is {self.told(held)}, one device reads {self.name(v)}"
                )
            found.append(Operand(held.sharding, zero, held.number))
            told.append(self.told(held) + (f", zeros on ranks {', '.join(map(str, sorted(zero)))}" if zero else ""))
        return found, told

    def split(self, whole: Node, rule: Rule, operands: Sequence[Operand], local: Node) -> Split:
        """The mesh axes of every factor, as the operands have it, else as the result's size needs it."""
        found: Split = {}
        for operand, shape in zip(operands, rule.dims.operands, strict=True):
            if operand.number is None:
                for term, axes in zip(shape, operand.sharding.dims, strict=True):
                    for factor, some in project(term, axes, rule.sizes, self.mesh)[0].items():
                        if not any(a in taken for taken in found.values() for a in some):
                            found.setdefault(factor, some)
        made = [v for v in local.outs if isinstance(v.type, TensorType)]
        for v, mine, shape in zip(rule.results, made, rule.dims.results, strict=True):
            for n, m, term in zip(v.shape, mine.shape, shape, strict=True):
                ratio = _ratio(n, m)
                parts = prod(self.mesh[a] for f in term for a in found.get(f.name, ()))
                if ratio is None or ratio == parts or len(term) != 1 or term[0].name in found:
                    continue
                taken = {a for axes in found.values() for a in axes}
                fits = next(self.shardings([ratio], [a for a in self.mesh if a not in taken]), None)
                if fits is not None:
                    found[term[0].name] = fits.dims[0]
        return found

    def fitted(self, operand: Operand, shape: Any, split: Split, rule: Rule) -> Operand:
        """An operand that is one number everywhere lies as the others need it, if its shares have that size."""
        if operand.number is None:
            return operand
        dims = [compose(term, split, rule.sizes, self.mesh) for term in shape]
        if None in dims:
            return operand
        s = Sharding(tuple(d for d in dims if d is not None))
        fits = s.parts(self.mesh) == operand.sharding.parts(self.mesh)
        return Operand(s, operand.zero, operand.number) if fits else operand

    def claims(
        self, rule: Rule, split: Split, operands: Sequence[Operand], local: Node
    ) -> Iterator[tuple[Sharding, ...]]:
        """How the results could lie."""
        carried = {p for o in operands for p in o.sharding.partial}
        results: list[Sharding] = []
        for shape in rule.dims.results:
            kept = {f.name for term in shape for f in term}
            folded = {(a, rule.combine(f) or "sum") for f, axes in split.items() if f not in kept for a in axes
                      if rule.dims.factors[f].kind == "reduce"}  # fmt: skip
            dims = [compose(term, split, rule.sizes, self.mesh) for term in shape]
            if None in dims:
                return
            used = {a for d in dims for a in d or ()}
            left = {a: how for a, how in (*carried, *folded) if a not in used}
            results.append(Sharding(tuple(d for d in dims if d is not None), tuple(left.items())))
        yield tuple(results)

    def attributes(self, whole: Node, local: Node, rule: Rule, split: Split, rank: int) -> None:
        """A share's attributes and literals are the whole's, but for what the operator says of its splits."""
        pieces = [self.piece(whole, rule, f, axes, rank) for f, axes in split.items()]
        expected = dict(whole.attrs) | self.changed(whole, rule, split, rank)
        for key in {*expected, *local.attrs} - {"shape"}:  # the results' sizes say that one
            want, got = expected.get(key), local.attrs.get(key)
            if got != want and (got or 0) != (want or 0):  # an offset of 0 may be left out
                raise _Fault(f"{self.title(local)}: {key} is {got} on rank {rank}, its share needs {want}")
        changed = {i: x for p in pieces for i, x in p.args.items()}
        for i, (a, b) in enumerate(zip(local.args, whole.args, strict=True)):
            want = changed.get(i, b)
            if not isinstance(want, Value | tuple | list) and a != want and a is not want:
                raise _Fault(f"{self.title(local)}: argument {i} is {a} on rank {rank}, its share needs {want}")

    def changed(self, whole: Node, rule: Rule, split: Split, rank: int) -> dict[str, Any]:
        """The attributes that a rank's share has of its own."""
        pieces = [self.piece(whole, rule, f, axes, rank) for f, axes in split.items()]
        found = {}
        for key in {k for p in pieces for k in p.attrs} - {"shape"}:
            old = whole.attrs.get(key)
            new = [p.attrs[key] for p in pieces if key in p.attrs and p.attrs[key] != old]
            found[key] = new[0] if len(new) == 1 else (old or 0) + sum(n - (old or 0) for n in new) if new else old
        return found

    def piece(self, whole: Node, rule: Rule, factor: str, axes: Sequence[str], rank: int) -> Piece:
        size = rule.sizes[factor] // prod(self.mesh[a] for a in axes)
        return whole.op.split(whole, factor, self.mesh.index(rank, axes) * size, size) if whole.op.split else Piece()

    def settle(self, nodes: Sequence[Node], whole: Node, results: Sequence[Sharding]) -> None:
        for rank, n in enumerate(nodes):
            mine = iter(results)
            for old, got in zip(whole.outs, n.outs, strict=True):
                s = next(mine) if isinstance(old.type, TensorType) else Sharding(())
                if isinstance(old.type, TensorType):
                    want = tuple(s.local_shape(old.shape, self.mesh))
                    if tuple(got.shape) != want:
                        raise _Fault(f"{self.title(n)}: rank {rank} makes {list(got.shape)}, {s} is {list(want)}")
                self.held[got] = _Held(old, s)
        self.go_on()

    def go_on(self) -> None:
        self.at += 1
        for free in self.free:
            free.clear()

    # ------------------------------------------------------------ proofs and words

    def ask(self, key: Any, prove: Callable[[], Verdict]) -> Verdict:
        if key not in self.known:
            late = time.monotonic() > self.until
            verdict = Verdict("unknown", "the time was over") if late else prove()
            if late:
                return verdict
            self.known[key] = verdict
        return self.known[key]

    def keep(self, verdict: Verdict, node: Node) -> None:
        if verdict.state != "proved":
            self.report.unproved.append(f"{self.title(node)}: {verdict.why}")

    def lengths(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Sizes, so far as a lemma tells them apart: their common part with the mesh's devices."""
        most = self.mesh.devices
        return tuple(n if n <= most else most + 1 for n in shape)

    def literals(self, node: Node) -> str:
        return str([a for a in node.args if not isinstance(a, Value)])

    def name(self, v: Value) -> str:
        return f"{v.node.attrs['name']}" if v.op is INPUT else self.names[v]

    def told(self, held: _Held) -> str:
        return f"{self.name(held.value)} {held.value.type} as {held.sharding}"

    def title(self, node: Node) -> str:
        return f"{node.op.name} at {node.loc}"


def _renamed(arg: Any, actual: Mapping[Value, Value]) -> Any:
    return map_values(arg, lambda v: actual.get(v, v))


def _ratio(n: int, m: int) -> int | None:
    """Into how many parts of ``m`` a size falls."""
    if n == m:
        return 1
    return n // m if m > 0 and n % m == 0 else None
