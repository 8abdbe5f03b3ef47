"""Operations of the ranks' programs: that shares of the operands give shares of the results, proved by z3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

from ..ir.node import Node, Value
from ..ir.sharding import Sharding
from ..ir.types import TensorType
from ..ops.dims import Piece
from ..passes._factors import Rule, Split, compose, project, rule_of
from ..solve.lemma import Operand, Verdict, holds
from ..solve.meaning import interpreted
from .verify_shares import QUESTION, Fault, Held, Shares, parts_of

__all__ = ["Operations"]


class Operations(Shares):
    """Proofs of operations, one at a time."""

    def operation(self, nodes: Sequence[Node]) -> None:
        local = nodes[0]
        self.settle_free()
        if self.at == len(self.steps):
            raise Fault(f"{self.title(local)}: one device computes nothing more here")
        whole = self.steps[self.at]
        if len(local.operands) != len(whole.operands):
            raise Fault(f"{self.title(local)}: one device computes {self.title(whole)} here")
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
        raise Fault(f"{self.title(local)}{instead}: reads {'; '.join(told)}: {last.why}")

    def operands(self, nodes: Sequence[Node], whole: Node, rule: Rule) -> tuple[list[Operand], list[str]]:
        found, told = [], []
        for i, v in enumerate(whole.operands):
            held, zero = self.reads(nodes, i)
            if not isinstance(v.type, TensorType):
                continue
            if held is None:
                raise Fault(f"{self.title(nodes[0])}: operand {i} is zero on every rank")
            if held.value != v:
                raise Fault(
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
                ratio = parts_of(n, m)
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
                raise Fault(f"{self.title(local)}: {key} is {got} on rank {rank}, its share needs {want}")
        changed = {i: x for p in pieces for i, x in p.args.items()}
        for i, (a, b) in enumerate(zip(local.args, whole.args, strict=True)):
            want = changed.get(i, b)
            if not isinstance(want, Value | tuple | list) and a != want and a is not want:
                raise Fault(f"{self.title(local)}: argument {i} is {a} on rank {rank}, its share needs {want}")

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
                        raise Fault(f"{self.title(n)}: rank {rank} makes {list(got.shape)}, {s} is {list(want)}")
                self.held[got] = Held(old, s)
        self.go_on()
