"""The gradients of attention on the CPU: the parts of a tile program as C++ around ``attention_backward.hpp``.

    dq, dk, dv[, dmask][, dsink]    from grad, q, k, v, out and lse; scores never leave a block of a few rows and keys

Operands, bounds and score edits are written as for the forward; the derivative of the edits is written from them
(``tiles/slope.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...errors import TesselError
from ...ir.types import product
from ...tiles.index import var
from ...tiles.kernel import ACC, DK, DQ, DSCORE, DSINK, DV, Axis, Kernel, Ref, Store
from ...tiles.slope import NoSlope, slope
from .attention import Writer
from .expr import Emitter
from .text import points
from .words import literal, size_text

__all__ = ["attention_backward"]


def attention_backward(kernel: Kernel) -> dict[str, Any]:
    """Context of ``attention_backward.cpp.j2``.

    Raises:
        TesselError: a dtype, a head width or a score edit that the kernel does not take.
    """
    return _Backward(kernel).context()


class _Backward(Writer):
    """Writes the parts of one kernel."""

    few_rows = False

    def context(self) -> dict[str, Any]:
        """The words of the template."""
        row, rows = [*self.batch, *self.row], [*self.known, "member", "m"]
        words = self.common()
        stores = {s.arg.number: s for s in self.kernel.body if isinstance(s, Store) and isinstance(s.arg, Ref)}
        keys = _KeyHeads(self.kernel)
        mask, sink = stores.get(DSCORE), stores.get(DSINK)
        return {
            **words,
            **self._slope(words["has_edit"] == "true"),
            "grad": self._operand("grad", "e", row, rows),
            "out": self._operand("out", "e", row, rows),
            "lse": self.number("lse"),
            "dq": self.stored((Ref(DQ),), "d", "member", "m"),
            "dk": keys.stored((Ref(DK),), "d", "n"),
            "dv": keys.stored((Ref(DV),), "e", "n"),
            "dmask": self.stored((Ref(DSCORE),), "n", "member", "m") if mask else None,
            "dsink": self.stored((Ref(DSINK),), "e", "member", "m") if sink else None,
            "has_sink": "true" if sink else "false",
            "mask_kind": 0 if mask is None else 1 if "n" in self._loops(mask) else 2,
            **self._shares("mask", mask),
            **self._shares("sink", sink),
        }

    def whole_rows(self, lane: str) -> str:
        """Every operand is also read by whole vectors of words."""
        return f"words<Element>({size_text(self.kernel.axis(lane).extent)}) % LANES == 0"

    def _slope(self, edited: bool) -> dict[str, Any]:
        """The derivative of the score edits, None where it is 1."""
        nothing = {"slope": None, "has_slope": "false"}
        if not edited:
            return nothing
        stmts, value = self.edits()
        try:
            more, got = slope(stmts, value)
        except NoSlope as why:
            raise TesselError(f"{self.kernel.name}: {why}; options={{'attention': 'library'}} computes it") from why
        if got == 1.0:
            return nothing
        e = self._score_emitter()
        e.values[ACC] = "s[n - n0]", frozenset({"n"}), torch.float32
        if isinstance(got, Ref):
            text, dims = self._written(e, (*stmts, *more), got)
        else:
            text, dims = literal(got, torch.float32), frozenset()
        e.line(f"to[n - n0] = {text};", dims | {"n"})
        return {"slope": self._loop(e), "has_slope": "true"}

    def _loops(self, stmt: Store) -> frozenset[str]:
        """The loops that an element's place depends on."""
        return Emitter(self.kernel, self.at.space).element(stmt.access)[1]

    def _shares(self, name: str, stmt: Store | None) -> dict[str, Any]:
        """Which x have one gradient in common."""
        loops = self._loops(stmt) if stmt else frozenset(self.known)
        own = [a for a in self.at.batches if a.name in loops]
        shared = [a for a in self.at.batches if a.name not in loops]
        return {
            f"{name}_x": {"lines": [*points(own, "kind"), *points(shared, "repeat")], "value": _flat(self.at.batches)},
            f"{name}_classes": size_text(product(a.extent for a in own)),
            f"{name}_repeats": size_text(product(a.extent for a in shared)),
            f"{name}_heads": "true" if "member" in loops else "false",
            f"{name}_rows": "true" if "m" in loops else "false",
        }


class _KeyHeads(Writer):
    """Writes what lies at key heads: there the last batch axis counts those."""

    few_rows = False

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        if self.at.batches:
            head = self.at.batches[-1]
            place = {**self.at.space.place, self.heads: var(head.name, head.extent)}
            self.at = replace(self.at, space=replace(self.at.space, place=place))


def _flat(axes: Sequence[Axis]) -> str:
    """The number of a point, the last axis fastest."""
    text = "0"
    for a in axes:
        text = a.name if text == "0" else f"({text}) * {size_text(a.extent)} + {a.name}"
    return text
