"""What the attention templates are given, forward and backward: lines of code, made from a tile program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TesselError
from ..ir.types import product
from ..tiles.default import batch_axes, head_pieces, next_power, plain_dot
from ..tiles.hidden import hidden
from ..tiles.kernel import ACC, DK, DQ, DSCORE, DV, LSE, Kernel, Load, Operand, Ref, refs
from ..tiles.slope import NoSlope, slope
from .contract import BOTH, Side, around, batch_index, dot, emitter, operand, part
from .dialect import compute_dtype, literal, narrow, rounded, size_text, triton_dtype
from .expr import Emitter
from .families import divides, flat_axes, names_for
from .names import NONE, Lane, Names

_ROWS = frozenset({0})
_FEWEST, _MOST_TILES = 4, 1024  # tiles along a loop that are worth, and are few enough, to keep a list of


def _pieces(axis: str, sizes: Sequence[int]) -> list[_Piece]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_Piece(axis, str(i + 1) if i else "", at, n) for i, (at, n) in enumerate(zip(starts, sizes, strict=True))]


@dataclass(frozen=True)
class _Piece:
    """A piece of a head width: its axis, its tile variables along a row and down a column, and its place."""

    axis: str
    number: str  # what its names end in: nothing for the first piece
    start: int
    size: int

    @property
    def row(self) -> str:
        return f"{self.axis}{self.number}"

    @property
    def column(self) -> str:
        return f"{self.axis}k{self.number}"


class _Writer:
    """What forward and backward share: tiles of each operand, the edits of the scores, which keys are seen."""

    def __init__(self, kernel: Kernel, knobs: Mapping[str, int], vendor: str, *taken: str) -> None:
        self.kernel, self.interpret, self.knobs = kernel, vendor == "interpret", knobs
        self.extents = {n: kernel.axis(n).extent for n in "mnde"}
        self.over = {axis: not divides(knobs[f"B{axis.upper()}"], self.extents[axis]) for axis in "mn"}
        self.pieces = {axis: _pieces(axis, sizes) for axis, sizes in head_pieces(kernel).items()}
        lanes = [name for p in (*self.pieces["d"], *self.pieces["e"]) for name in (p.row, p.column)]
        numbered = [f"{name}{p.number}" for name in taken for p in (*self.pieces["d"], *self.pieces["e"])]
        self.names: Names = names_for(
            kernel, "BM", "BN", "m", "n", "nv", "m_ok", "n_ok", "nv_ok", "keys", "first_key", "score", "tile",
            "tiles_m", "n_start", "places", "some", "order", "turn",
            *lanes, *(f"{name}_ok" for name in lanes), *taken, *numbered,
        )  # fmt: skip
        attrs = kernel.attrs
        scale = attrs.get("scale")
        self.scale: float = 1 / math.sqrt(int(self.extents["d"])) if scale is None else scale  # type: ignore[arg-type]
        self.causal = bool(attrs.get("causal", False))
        self.window: int | None = attrs.get("window")
        offset = attrs.get("offset", 0)
        self.offset = "" if offset == 0 else f" + {size_text(offset)}"
        self.plain = plain_dot(kernel, vendor)
        self.emitters: list[Emitter] = []  # all that were made: names of values go by emitter

    def overhangs(self, piece: _Piece) -> bool:
        """Whether a piece reaches past its axis."""
        return piece.start + piece.size > int(self.extents[piece.axis])  # type: ignore[arg-type]

    def emitter(self, rows: str | _Piece, cols: str | _Piece, batch: str = "x", down: str = "n") -> Emitter:
        """An emitter for a tile. ``rows`` and ``cols`` are "m", "n" or a piece of a width; ``batch`` is the variable of
        the head, ``down`` that of keys where they run along the rows of a tile ("nv")."""
        sides: list[Side] = []
        shape: list[str] = []
        for dim, side in enumerate((rows, cols)):
            if isinstance(side, str):
                sides.append((side, down if side == "n" and dim == 0 else side, self.over[side]))
                shape.append(f"B{side.upper()}")
            else:
                sides.append((side.axis, side.column if dim == 0 else side.row, self.overhangs(side)))
                shape.append(str(side.size))
        e = emitter(self.kernel, self.names, sides[0], sides[1], (shape[0], shape[1]), self.interpret)
        if batch != "x":
            e.axes, e.lanes = flat_axes(batch_axes(self.kernel), batch), {**e.lanes, batch: Lane(batch, NONE)}
        self.emitters.append(e)
        return e

    def ok(self, piece: _Piece, text: str) -> str | None:
        """The mask of a variable of a piece, where the piece reaches past its axis."""
        return f"{text}_ok" if self.overhangs(piece) else None

    def seen(self) -> list[str]:
        """Conditions under which a key is seen, by the attributes and the number of keys."""
        found = ["n_ok"] if self.over["n"] else []
        last = f"m{self.offset}"
        if self.causal:
            found.append(f"(n <= {last})")
        if self.window is not None:
            found.append(f"(n > {last} - {self.window})")
            if not self.causal:
                found.append(f"(n < {last} + {self.window})")
        return found

    def score(self, e: Emitter) -> str:
        """The text of an edited score, after the lines of ``parts["score"]``."""
        edited = self.kernel.provides.get("score")
        if not isinstance(edited, Ref) or edited.number == ACC:
            return "score"
        text, dims, dtype = e.values[edited.number]
        text, wide = e.spread(text, dims, BOTH), e.values[ACC][2]
        return text if compute_dtype(dtype) == wide else f"{text}.to({triton_dtype(wide)})"

    def common(self, acc_dtype: torch.dtype) -> dict[str, Any]:
        return {
            "m": size_text(self.extents["m"]),
            "n": size_text(self.extents["n"]),
            **{f"{n}_masked": value for n, value in self.over.items()},
            "widths": [self._lane(p, p.row, False) for axis in "de" for p in self.pieces[axis]],
            "batched": product(a.extent for a in batch_axes(self.kernel)) != 1,
            "causal": self.causal,
            "key_end": self._keys(),
            "first_key": self._first_key(),
            "acc_dtype": triton_dtype(acc_dtype),
            "scale": literal(self.scale, acc_dtype, False, "1, 1" if self.interpret else ""),
        }

    def _lane(self, piece: _Piece, name: str, column: bool) -> dict[str, str]:
        """How a variable of a piece is defined; ``limit`` only where the piece overhangs."""
        at = f"tl.arange(0, {piece.size}).to(INDEX)"
        at = f"({piece.start} + {at})" if piece.start else at
        shape = "[:, None]" if column else "[None, :]"
        limit = size_text(self.extents[piece.axis]) if self.overhangs(piece) else ""
        return {"name": name, "at": f"{at}{shape}", "limit": limit}

    def columns(self, axis: str) -> list[dict[str, str]]:
        """The variables of a width that run down a column."""
        return [self._lane(p, p.column, True) for p in self.pieces[axis]]

    def skip(self, step: str) -> dict[str, Any] | None:
        """How the tiles along ``step`` that a mask shows are found; None where no mask hides, or it does not pay."""
        extent, block = self.extents[step], self.knobs[f"B{step.upper()}"]
        found = hidden(self.kernel, biases=False)
        if not found.conds or not isinstance(extent, int) or not _FEWEST <= -(-extent // block) <= _MOST_TILES:
            return None
        e = self.emitter("m", "n")
        before, loop = around(e, found.stmts, step)
        texts = [e.values[n][0] if wanted else f"({e.values[n][0]} == 0)" for n, wanted in found.conds]
        bounds = (["m_ok"] if self.over["m"] else []) + self.seen()
        return {
            "tiles": next_power(-(-extent // block)),
            "before": before,
            "loop": loop,
            "seen": " & ".join([*texts, *bounds]),
        }

    def rows(self) -> str:
        """Queries from here on see no key of a tile of keys."""
        m = size_text(self.extents["m"])
        if self.window is None:
            return m
        return f"min({m}, (tile + 1) * BN + {self.window - 1}{_minus(self.offset)})"

    def first_row(self) -> str:
        """The tile of queries in which the first one lies that sees some key of a tile of keys."""
        if not self.causal and self.window is None:
            return "0"
        back = "" if self.causal or self.window is None else f" - {self.window - 1}"
        return f"max(tile * BN{back}{_minus(self.offset)}, 0) // BM * BM"

    def _keys(self) -> str:
        """Keys from here on are hidden from every query of a tile."""
        n, last, window = size_text(self.extents["n"]), f"(tile + 1) * BM{self.offset}", self.window
        if self.causal:
            return f"min({n}, {last})"
        return n if window is None else f"min({n}, {last} + {window - 1})"

    def _first_key(self) -> str:
        """The tile of keys in which the first one lies that some query of a tile sees."""
        if self.window is None:
            return "0"
        return f"max(tile * BM{self.offset} - {self.window - 1}, 0) // BN * BN"


def _minus(added: str) -> str:
    """The text that takes away what ``added`` adds."""
    return f" - ({added.removeprefix(' + ')})" if added else ""


def forward(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, Any]:
    """Context of ``attention.triton.j2``."""
    taken = ("acc", "peak", "total", "new_peak", "base", "weight", "fade", "out", "lse", "sink", "q")
    w = _Writer(kernel, knobs, vendor, *taken)
    interpret = w.interpret
    before: list[str] = []
    key_loop: list[str] = []
    scores: str | None = None
    for p in w.pieces["d"]:
        q, k = w.emitter("m", p), w.emitter(p, "n")
        still, lines = part(q, "q", "n")
        q_tile, dtype = operand(q, "q", (1, w.ok(p, p.row)))
        if not q_tile.isidentifier():
            lines.append(f"q{p.number} = {q_tile}")
            q_tile = f"q{p.number}"
        k_before, k_lines = part(k, "k", "n")
        k_tile, _ = operand(k, "k", (0, w.ok(p, p.column)))
        before += still + lines + k_before
        key_loop += k_lines
        scores = dot(q_tile, k_tile, scores, dtype, w.plain)
    acc_dtype = compute_dtype(dtype)
    values: list[dict[str, Any]] = []
    for p in w.pieces["e"]:
        v = w.emitter("n", p, down="nv")
        v_before, v_loop = part(v, "v", "n")
        v_tile, v_dtype = operand(v, "v", (0, "nv_ok" if w.over["n"] else None))
        before += v_before
        weight = rounded("weight", v_dtype, True) if interpret else narrow("weight", v_dtype, False)
        acc = f"acc{p.number}"
        product = dot(weight, v_tile, acc, v_dtype, w.plain)
        values.append({"acc": acc, "out": f"out{p.number}", "size": p.size, "loop": v_loop, "product": product})
    s = w.emitter("m", "n")
    s.define(ACC, "score", BOTH, acc_dtype)
    s_before, s_loop = part(s, "score", "n")
    score_name = w.score(s)
    seen = w.seen()
    hiding = [f'score = tl.where({" & ".join(seen)}, {score_name}, float("-inf"))'] if seen else []
    sink: list[str] = []
    body: list[str] = []
    for p, value in zip(w.pieces["e"], values, strict=True):
        o = w.emitter("m", p)
        if "sink" in kernel.parts and not body:
            sink = [*part(o, "sink", "n")[0], f"sink = {_wide_value(o, kernel.provides['sink'], acc_dtype)}"]
        o.define(ACC, value["out"], BOTH, acc_dtype)
        o.define(LSE, "lse", _ROWS, acc_dtype)
        for stmt in kernel.body:
            if not p.number or ACC in refs(stmt):
                o.emit(stmt)
        body += o.take()
    return {
        **w.common(acc_dtype),
        "columns": w.columns("d"),
        "batch_index": batch_index(kernel, "tiles_m", interpret),
        "before": before + s_before,
        "skip": w.skip("n"),
        "one_stage": not interpret and not (_loaded(kernel, "k") and _loaded(kernel, "v")),
        "key_part": key_loop,
        "scores": scores,
        "score": s_loop,
        "hidden": hiding,
        "score_name": "score" if hiding else score_name,
        "values": values,
        "sink": sink,
        "needs_lse": any(LSE in list(refs(stmt)) for stmt in kernel.body),
        "body": body,
    }


def backward(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, Any]:
    """Context of ``attention_backward.triton.j2``: of the pass over tiles of keys or of that over tiles of queries.

    The loop goes over ``step`` ("m" or "n"), a program holds a tile of the other axis. The pass over keys also loops
    over the query heads that share a key head: ``x`` is the query head, ``first`` the first one of the program's group.
    """
    taken = ("weight", "inner", "dq", "d_key", "d_value", "lse", "delta", "first", "member", "group", "tiles_n", "mv",
             "rows", "first_row", "m_start", "back", "query", "key", "value", "grad")  # fmt: skip
    w = _Writer(kernel, knobs, vendor, *taken)
    keys = kernel.attrs.get("wrt") == "keys"
    if "wrt" not in kernel.attrs:
        raise TesselError(f"{kernel.name}: on a GPU attention's gradients take two passes, and this is the whole")
    step, held = ("m", "first") if keys else ("n", "x")
    # In the order in which they are written: what an index needs is named by the first that needs it.
    sides = (("k", "d"), ("v", "e"), ("q", "d"), ("grad", "e"))
    sides = sides if keys else (*sides[2:], *sides[:2])
    words = {"q": "query", "k": "key", "v": "value", "grad": "grad"}
    own: list[str] = []  # of the tile that is held
    each_head: list[str] = []
    loop: list[str] = []
    tiles: dict[str, list[str]] = {}
    emitters: dict[str, list[Emitter]] = {}
    for name, axis in sides:
        row = name in ("q", "grad")
        emitters[name] = [w.emitter("m", p) if row else w.emitter("n", p, held, "nv") for p in w.pieces[axis]]
        tiles[name] = [f"{words[name]}{p.number}" for p in w.pieces[axis]]
        outside = own if row != keys else each_head
        for p, e, tile in zip(w.pieces[axis], emitters[name], tiles[name], strict=True):
            still, moving = part(e, name, step)
            text, dtype = operand(e, name, (1, w.ok(p, p.row)))
            (moving if row == keys else still).append(f"{tile} = {text}")
            outside += still
            loop += moving
        if name == "q":
            q_dtype, acc_dtype = dtype, compute_dtype(dtype)
        if name == "grad":
            for wanted in ("lse", "delta"):
                still, moving = part(e, wanted, step)
                (moving if keys else still).append(f"{wanted} = {_wide_value(e, kernel.provides[wanted], acc_dtype)}")
                outside += still
                loop += moving
    s = w.emitter("m", "n")
    s.define(ACC, "score", BOTH, acc_dtype)
    s_before, s_loop = part(s, "score", step)
    score_name = w.score(s)
    sloped = _slope(s, acc_dtype)
    s_loop += s.take()
    results = {DQ: ("dq", "q"), DK: ("d_key", "k"), DV: ("d_value", "v")}
    body: list[str] = []
    edge: list[str] = []
    for stmt in kernel.body:
        (number,) = (n for n in refs(stmt) if n in (*results, DSCORE))
        if number == DSCORE:
            s.define(DSCORE, "inner", BOTH, acc_dtype)
            s.emit(stmt)
            edge += s.take()
            continue
        base, name = results[number]
        for p, e in zip(w.pieces["e" if name == "v" else "d"], emitters[name], strict=True):
            e.define(number, f"{base}{p.number}", BOTH, acc_dtype)
            e.emit(stmt)
            body += e.take()
    seen = [*(["m_ok"] if w.over["m"] else []), *w.seen()]

    def half(text: str) -> str:
        return rounded(text, q_dtype, True) if w.interpret else narrow(text, q_dtype, False)

    def chain(left: Sequence[str], right: Sequence[str]) -> str:
        total: str | None = None
        for a, b in zip(left, right, strict=True):
            total = dot(a, f"tl.trans({b})", total, q_dtype, w.plain)
        assert total is not None
        return total

    def sums(base: str, axis: str, left: str, right: Sequence[str]) -> list[dict[str, Any]]:
        out = []
        for p, tile in zip(w.pieces[axis], right, strict=True):
            acc = f"{base}{p.number}"
            out.append({"name": acc, "size": p.size, "product": dot(left, tile, acc, q_dtype, w.plain)})
        return out

    d_key = sums("d_key", "d", f"tl.trans({half('inner')})", tiles["q"])
    d_value = sums("d_value", "e", f"tl.trans({half('weight')})", tiles["grad"])
    return {
        **w.common(acc_dtype),
        "wrt_keys": keys,
        "rows": w.rows(),
        "first_row": w.first_row(),
        "group": _group(kernel),
        "first_index": batch_index(kernel, "tiles_n", w.interpret),
        "batch_index": batch_index(kernel, "tiles_m", w.interpret),
        "held": own,
        "each_head": each_head + s_before,
        "skip": w.skip(step),
        "one_stage": False,
        "loop_operands": loop,
        "scores": chain(tiles["q"], tiles["k"]),
        "back": chain(tiles["grad"], tiles["v"]),
        "score": s_loop,
        "score_name": score_name,
        "seen": " & ".join(seen),
        "inner": "weight * (back - delta)",
        "edge": edge,
        "slope": sloped,
        "sums": [*d_value, *d_key] if keys else sums("dq", "d", half("inner"), tiles["k"]),
        "scaled": d_key if keys else sums("dq", "d", half("inner"), tiles["k"]),
        "body": body,
    }


def _loaded(kernel: Kernel, part: str) -> bool:
    """Whether an operand is read as it is wanted."""
    provided = kernel.provides[part]
    number = provided.number if isinstance(provided, Ref) else None
    return any(isinstance(s, Load) and s.out == number for s in kernel.parts[part])


def _slope(e: Emitter, dtype: torch.dtype) -> str:
    """What the gradient of an edited score is multiplied by; empty where the edits only add or hide."""
    value = e.kernel.provides.get("score", Ref(ACC))
    try:
        stmts, factor = slope(e.kernel.parts.get("score", ()), value)
    except NoSlope as problem:
        raise TesselError(f"{e.kernel.name}: {problem}") from None
    if not isinstance(factor, Ref):
        return "" if factor == 1.0 else literal(float(factor), dtype, False, e.unit)
    for stmt in stmts:
        e.emit(stmt)
    text, dims, _ = e.values[factor.number]
    return e.spread(text, dims, BOTH)


def _group(kernel: Kernel) -> int:
    """How many query heads share a key head."""
    heads, shared = kernel.attrs["heads"]
    return int(heads) // int(shared)


def _wide_value(e: Emitter, provided: Operand, dtype: torch.dtype) -> str:
    text, _, own = e.values[provided.number]
    return text if compute_dtype(own) == dtype else f"{text}.to({triton_dtype(dtype)})"


__all__ = ["backward", "forward"]
