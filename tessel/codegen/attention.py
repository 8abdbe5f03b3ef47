"""What the attention templates are given, forward and backward: lines of code, made from a tile program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import TesselError
from ..ir.types import product
from ..tiles.default import batch_axes, head_widths, plain_dot
from ..tiles.kernel import ACC, DK, DQ, DSCORE, DV, LSE, Kernel, Operand, Ref, refs
from ..tiles.slope import NoSlope, slope
from .contract import BOTH, batch_index, dot, emitter, operand, part
from .dialect import compute_dtype, literal, narrow, rounded, size_text, triton_dtype
from .expr import Emitter
from .families import divides, flat_axes, names_for
from .names import NONE, Lane, Names

_ROWS = frozenset({0})


class _Writer:
    """What forward and backward share: tiles of each operand, the edits of the scores, which keys are seen."""

    def __init__(self, kernel: Kernel, knobs: Mapping[str, int], vendor: str, *taken: str) -> None:
        self.kernel, self.interpret = kernel, vendor == "interpret"
        self.extents = {n: kernel.axis(n).extent for n in "mnde"}
        widths = head_widths(kernel)
        blocks = {"m": knobs["BM"], "n": knobs["BN"], "d": widths["BD"], "e": widths["BE"]}
        self.over = {axis: not divides(block, self.extents[axis]) for axis, block in blocks.items()}
        self.names: Names = names_for(
            kernel, "BM", "BN", "BD", "BE", "m", "n", "d", "e", "dk", "nv", "m_ok", "n_ok", "d_ok", "e_ok", "dk_ok",
            "nv_ok", "keys", "first_key", "score", "tile", "tiles_m", "n_start", *taken,
        )  # fmt: skip
        attrs = kernel.attrs
        scale = attrs.get("scale")
        self.scale: float = 1 / math.sqrt(int(self.extents["d"])) if scale is None else scale  # type: ignore[arg-type]
        self.causal = bool(attrs.get("causal", False))
        self.window: int | None = attrs.get("window")
        offset = attrs.get("offset", 0)
        self.offset = "" if offset == 0 else f" + {size_text(offset)}"
        self.plain = plain_dot(kernel, vendor)

    def emitter(
        self, rows: tuple[str, str], cols: tuple[str, str], shape: tuple[str, str], batch: str = "x"
    ) -> Emitter:
        """An emitter for a tile whose dims are (axis, variable); ``batch`` is the variable of the head."""
        k, over = self.kernel, self.over
        e = emitter(k, self.names, (*rows, over[rows[0]]), (*cols, over[cols[0]]), shape, self.interpret)
        if batch != "x":
            e.axes, e.lanes = flat_axes(batch_axes(k), batch), {**e.lanes, batch: Lane(batch, NONE)}
        return e

    def ok(self, axis: str, text: str) -> str | None:
        """The mask of a tile variable, where tiles of its axis overhang."""
        return f"{text}_ok" if self.over[axis] else None

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
            **{n: size_text(d) for n, d in self.extents.items()},
            **{f"{n}_masked": value for n, value in self.over.items()},
            "batched": product(a.extent for a in batch_axes(self.kernel)) != 1,
            "causal": self.causal,
            "key_end": self._keys(),
            "first_key": self._first_key(),
            "acc_dtype": triton_dtype(acc_dtype),
            "scale": literal(self.scale, acc_dtype, False, "1, 1" if self.interpret else ""),
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
    taken = ("acc", "peak", "total", "new_peak", "base", "weight", "fade", "out", "lse", "sink")
    w = _Writer(kernel, knobs, vendor, *taken)
    interpret = w.interpret
    q = w.emitter(("m", "m"), ("d", "d"), ("BM", "BD"))
    k = w.emitter(("d", "dk"), ("n", "n"), ("BD", "BN"))
    v = w.emitter(("n", "nv"), ("e", "e"), ("BN", "BE"))
    s = w.emitter(("m", "m"), ("n", "n"), ("BM", "BN"))
    o = w.emitter(("m", "m"), ("e", "e"), ("BM", "BE"))
    q_before, q_lines = part(q, "q", "n")
    q_tile, dtype = operand(q, "q", (1, w.ok("d", "d")))
    k_before, k_loop = part(k, "k", "n")
    k_tile, _ = operand(k, "k", (0, w.ok("d", "dk")))
    v_before, v_loop = part(v, "v", "n")
    v_tile, v_dtype = operand(v, "v", (0, w.ok("n", "nv")))
    acc_dtype = compute_dtype(dtype)
    if not q_tile.isidentifier():
        q_lines.append(f"q = {q_tile}")
        q_tile = "q"
    s.define(ACC, "score", BOTH, acc_dtype)
    s_before, s_loop = part(s, "score", "n")
    score_name = w.score(s)
    seen = w.seen()
    hidden = [f'score = tl.where({" & ".join(seen)}, {score_name}, float("-inf"))'] if seen else []
    sink: list[str] = []
    if "sink" in kernel.parts:
        sink = [*part(o, "sink", "n")[0], f"sink = {_wide_value(o, kernel.provides['sink'], acc_dtype)}"]
    o.define(ACC, "out", BOTH, acc_dtype)
    o.define(LSE, "lse", _ROWS, acc_dtype)
    for stmt in kernel.body:
        o.emit(stmt)
    weight = rounded("weight", v_dtype, True) if interpret else narrow("weight", v_dtype, False)
    return {
        **w.common(acc_dtype),
        "batch_index": batch_index(kernel, "tiles_m", interpret),
        "before": q_before + q_lines + k_before + v_before + s_before,
        "key_part": k_loop,
        "scores": dot(q_tile, k_tile, None, dtype, w.plain),
        "score": s_loop,
        "hidden": hidden,
        "score_name": "score" if hidden else score_name,
        "value_part": v_loop,
        "product": dot(weight, v_tile, "acc", v_dtype, w.plain),
        "sink": sink,
        "needs_lse": any(LSE in list(refs(stmt)) for stmt in kernel.body),
        "body": o.take(),
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
    q = w.emitter(("m", "m"), ("d", "d"), ("BM", "BD"))
    k = w.emitter(("n", "nv"), ("d", "d"), ("BN", "BD"), held)
    v = w.emitter(("n", "nv"), ("e", "e"), ("BN", "BE"), held)
    g = w.emitter(("m", "m"), ("e", "e"), ("BM", "BE"))
    s = w.emitter(("m", "m"), ("n", "n"), ("BM", "BN"))
    outs = {DQ: q, DSCORE: s, DK: k, DV: v}
    # In the order in which they are written: what an index needs is named by the first that needs it.
    held_first = {"k": k, "v": v, "q": q, "grad": g} if keys else {"q": q, "grad": g, "k": k, "v": v}
    words = {"q": "query", "k": "key", "v": "value", "grad": "grad"}
    before: list[list[str]] = []
    loop: list[str] = []
    tiles: dict[str, str] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, e in held_first.items():
        still, moving = part(e, name, step)
        text, dtypes[name] = operand(e, name, (1, w.ok("d" if name in "qk" else "e", "d" if name in "qk" else "e")))
        (moving if (name in ("q", "grad")) == keys else still).append(f"{words[name]} = {text}")
        tiles[name] = words[name]
        before.append(still)
        loop += moving
        if name == "grad":
            acc_dtype = compute_dtype(dtypes["q"])
            for row in ("lse", "delta"):
                still, moving = part(g, row, step)
                (moving if keys else still).append(f"{row} = {_wide_value(g, kernel.provides[row], acc_dtype)}")
                before.append(still)
                loop += moving
    s.define(ACC, "score", BOTH, acc_dtype)
    s_before, s_loop = part(s, "score", step)
    score_name = w.score(s)
    inner = "weight * (back - delta)"
    sloped = _slope(s, acc_dtype)
    s_loop += s.take()
    for number, e in outs.items():
        text = {DQ: "dq", DK: "d_key", DV: "d_value", DSCORE: "inner"}[number]
        e.define(number, text, BOTH, acc_dtype)
    body: list[str] = []
    edge: list[str] = []
    for stmt in kernel.body:
        (number,) = (n for n in refs(stmt) if n in outs)
        outs[number].emit(stmt)
        (edge if number == DSCORE else body).extend(outs[number].take())
    seen = [*(["m_ok"] if w.over["m"] else []), *w.seen()]

    def half(text: str, dtype: torch.dtype) -> str:
        return rounded(text, dtype, True) if w.interpret else narrow(text, dtype, False)

    def times(a: str, b: str, acc: str | None, dtype: torch.dtype) -> str:
        return dot(a, b, acc, dtype, w.plain)

    own = 2 if keys else len(before)  # of the pass over keys the first two belong to the tile, the others to each head
    return {
        **w.common(acc_dtype),
        "wrt_keys": keys,
        "rows": w.rows(),
        "first_row": w.first_row(),
        "group": _group(kernel),
        "first_index": batch_index(kernel, "tiles_n", w.interpret),
        "batch_index": batch_index(kernel, "tiles_m", w.interpret),
        "held": [line for lines in before[:own] for line in lines],
        "each_head": [line for lines in before[own:] for line in lines] + s_before,
        "loop_operands": loop,
        "scores": times(tiles["q"], f"tl.trans({tiles['k']})", None, dtypes["q"]),
        "back": times(tiles["grad"], f"tl.trans({tiles['v']})", None, dtypes["v"]),
        "score": s_loop,
        "score_name": score_name,
        "seen": " & ".join(seen),
        "inner": inner,
        "edge": edge,
        "slope": sloped,
        "d_value": times(f"tl.trans({half('weight', dtypes['grad'])})", tiles["grad"], "d_value", dtypes["grad"]),
        "d_key": times(f"tl.trans({half('inner', dtypes['q'])})", tiles["q"], "d_key", dtypes["q"]),
        "dq": times(half("inner", dtypes["k"]), tiles["k"], "dq", dtypes["k"]),
        "body": body,
    }


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
