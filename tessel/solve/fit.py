"""Fitting the resource model to measured compiles, and judging the fit on rows it has not seen.

Registers a thread are a sum of the terms that a template's header declares, by least squares over the rows that
neither spill nor touch the limit. Whether a row spills is a linear rule on ``registers / limit`` and the
header's ``spill_terms``: logistic regression, then the threshold with the fewest wrong calls on the rows
it was fitted to, a spill that is missed counting as ten false alarms (a spill missed is a slow kernel, a false
alarm one candidate of many). Only numpy; the result is plain JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TesselError, did_you_mean
from ..tiles.formula import evaluate
from ..tiles.header import FAMILIES, Header, LoadPath, load_header

__all__ = ["COLUMNS", "FOLDS", "Fitted", "Row", "Verdict", "cross", "fit", "fold_of", "header_of", "judge", "read_rows"]

FOLDS = 5
"""Rows are dealt into this many parts by hash; part 0 is held out."""

_GEMM = ("BM", "BN", "BK", "num_stages", "num_warps", "shared", "registers", "spills", "tensor_columns")
_ATTENTION = ("BM", "BN", "BD", "num_stages", "num_warps", "shared", "registers", "spills")
_GRADIENTS = (*_ATTENTION[:3], "by_keys", *_ATTENTION[3:])
COLUMNS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("attn90", "attn80", "attn942"), _ATTENTION),
    **{f"{of}{arch}": _GRADIENTS for of in ("dq", "dk") for arch in (80, 90, 100, 942)},
    "rmsnorm90": ("RB", "num_warps", "shared", "registers", "spills"),
}
"""What the columns of a path's rows mean; a product's where nothing is said."""

_SATURATED = 1  # registers below the limit at which a row no longer tells how many it wanted
_MISS = 10  # false alarms that one missed spill is worth
_SPILL_WEIGHT = 5.0  # spilling rows are few


@dataclass(frozen=True)
class Row:
    """One measured compile: the tile and what was allocated."""

    knobs: Mapping[str, int]
    shared: int
    registers: int
    spills: int
    tensor_columns: int | None


@dataclass(frozen=True)
class Fitted:
    """The coefficients of one path.

    Attributes:
        registers: one coefficient for each term the header declares.
        spill: of ``registers / limit``, then of each spill term, then a constant; spilled where the sum is positive.
        error: registers, mean and largest distance on the rows held out.
        rows: how many were fitted.
    """

    registers: tuple[float, ...]
    spill: tuple[float, ...]
    error: tuple[float, float]
    rows: int


def fold_of(path: str, knobs: Mapping[str, int], by: Sequence[str] | None = None) -> int:
    """Which part a row belongs to, by the hash of its tile (or of the knobs in ``by`` only)."""
    names = knobs if by is None else by
    text = f"{path}:" + ",".join(f"{n}={knobs[n]}" for n in sorted(names) if n in knobs)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % FOLDS


def read_rows(data: Mapping[str, Any], path: str) -> list[Row]:
    """The rows of one path of the measured data.

    Raises:
        TesselError: there is no such path.
    """
    if path not in data["paths"]:
        raise TesselError(f"no measured path {path!r}; {did_you_mean(path, data['paths'])}")
    columns = COLUMNS.get(path, _GEMM)
    rows = []
    for values in data["paths"][path]["rows"]:
        got = dict(zip(columns, values))
        results = {n: got.pop(n, None) for n in ("shared", "registers", "spills", "tensor_columns")}
        if "BD" in got:
            got["BE"] = got["BD"]
        if "RB" in got:
            got["XB"] = 1
        rows.append(Row(got, **results))
    return rows


def header_of(path: str) -> tuple[Header, LoadPath]:
    """The template that declares a path, and the path."""
    for family in FAMILIES:
        header = load_header(family)
        if path in header.paths:
            return header, header.paths[path]
    raise TesselError(f"no template declares the path {path!r}")


def table(header: Header, rows: Sequence[Row], warp_size: int) -> dict[str, Any]:
    """The rows' knobs as arrays, with item sizes of 2 bytes (f16) and what the header derives."""
    names = rows[0].knobs
    values: dict[str, Any] = {n: np.array([r.knobs[n] for r in rows], dtype=np.int64) for n in names}
    return header.with_derived({**values, "itemsize": 2, "out_itemsize": 2, "score_bytes": 0, "warp_size": warp_size})


def terms(formulas: Sequence[str], values: Mapping[str, Any], count: int) -> np.ndarray:
    """One column a formula."""
    columns = [np.broadcast_to(np.asarray(evaluate(f, values), dtype=float), (count,)) for f in formulas]
    return np.stack(columns, axis=1) if columns else np.zeros((count, 0))


def fit(path: str, rows: Sequence[Row], train: np.ndarray) -> Fitted:
    """Fit one path to the rows where ``train`` is true."""
    header, declared = header_of(path)
    values = table(header, rows, _warp_size(declared))
    got = np.array([r.registers for r in rows], dtype=float)
    spilled = np.array([r.spills > 0 for r in rows])
    limit = _column(declared.register_limit, values, len(rows))
    clear = ~spilled & (got < limit - _SATURATED)
    x = terms(declared.registers, values, len(rows))
    coefficients = np.linalg.lstsq(x[train & clear], got[train & clear], rcond=None)[0]
    wanted = x @ coefficients
    z = np.concatenate([(wanted / limit)[:, None], terms(declared.spill_terms, values, len(rows))], axis=1)
    always = _column(declared.always_spills, values, len(rows)) > 0
    brim = ~spilled & (got >= limit)  # all registers in use and none spilled: it tells neither yes nor no
    use = train & ~always & ~brim
    rule = _spill_rule(z[use], spilled[use])
    off = np.abs(wanted - got)[~train & clear]
    error = (round(float(off.mean()), 2), round(float(off.max()), 2)) if off.size else (0.0, 0.0)
    short = tuple(round(float(c), 6) for c in coefficients)
    return Fitted(short, tuple(round(float(c), 6) for c in rule), error, int(train.sum()))


def _column(formula: str, values: Mapping[str, Any], count: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(evaluate(formula, values), dtype=float), (count,))


def _warp_size(path: LoadPath) -> int:
    return 64 if path.archs[0].startswith("gfx") else 32


def _spill_rule(z: np.ndarray, spilled: np.ndarray) -> np.ndarray:
    """Weights and constant of the rule ``z @ weights + constant > 0``."""
    if not spilled.any():  # no spill to learn from: what has been seen to fit fits, and so does what wants less
        weights = np.zeros(z.shape[1])
        weights[0] = 1.0
        return np.append(weights, -max(1.0, 1.001 * float(z[:, 0].max())))
    weights = _logistic(z, spilled.astype(float), np.where(spilled, _SPILL_WEIGHT, 1.0))
    score = (z @ weights).round(9)
    cuts = np.unique(score)
    middles = np.concatenate([[cuts[0] - 1], (cuts[1:] + cuts[:-1]) / 2, [cuts[-1] + 1]])
    costs = [_MISS * np.sum(spilled & (score <= c)) + np.sum(~spilled & (score > c)) for c in middles]
    good = [c for c, cost in zip(middles, costs) if cost == min(costs)]
    return np.append(weights, -good[0])


def _logistic(z: np.ndarray, want: np.ndarray, weight: np.ndarray, ridge: float = 1e-2) -> np.ndarray:
    """Weights of a logistic regression by Newton's method; the constant is left to the threshold."""
    mean, spread = z.mean(0), z.std(0) + 1e-9
    x = np.concatenate([np.ones((len(z), 1)), (z - mean) / spread], axis=1)
    penalty = ridge * np.eye(x.shape[1])
    penalty[0, 0] = 1e-6
    b = np.zeros(x.shape[1])
    for _ in range(60):
        p = 1 / (1 + np.exp(-np.clip(x @ b, -30, 30)))
        slope = x.T @ (weight * (p - want)) + penalty @ b
        b -= np.linalg.solve((x.T * (weight * p * (1 - p) + 1e-9)) @ x + penalty, slope)
    return b[1:] / spread


@dataclass(frozen=True)
class Verdict:
    """How a fit does on some rows.

    ``exact``: rows whose shared bytes are the formula's, ``bounded``: inside its bounds. ``error``: registers,
    mean, 90th percentile and largest, over ``clear`` rows that neither spill nor touch the limit. ``missed`` of
    ``spilling`` rows and ``false`` of ``others`` were called wrongly. ``tensor`` rows have wrong columns.
    """

    rows: int
    exact: int
    bounded: int
    clear: int
    error: tuple[float, float, float]
    spilling: int
    missed: int
    others: int
    false: int
    tensor: int


def judge(path: str, rows: Sequence[Row], test: np.ndarray, fitted: Fitted) -> Verdict:
    """Compare a fit with the rows where ``test`` is true."""
    wanted, called = _predicted(path, rows, fitted)
    return _verdict(path, rows, test, wanted, called)


def cross(path: str, rows: Sequence[Row], by: Sequence[str] | None = None) -> Verdict:
    """Every row judged by a fit to the four parts that it is not in.

    Args:
        by: rows that agree in these knobs stay in one part. By default all knobs: rows are dealt one by one.
    """
    part = np.array([fold_of(path, r.knobs, by) for r in rows])
    wanted, called = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for i in range(FOLDS):
        held = part == i
        if held.any():
            own_wanted, own_called = _predicted(path, rows, fit(path, rows, ~held))
            wanted[held], called[held] = own_wanted[held], own_called[held]
    return _verdict(path, rows, np.ones(len(rows), dtype=bool), wanted, called)


def _predicted(path: str, rows: Sequence[Row], fitted: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """Registers wanted, and whether it spills, a row."""
    header, declared = header_of(path)
    values, n = table(header, rows, _warp_size(declared)), len(rows)
    wanted = terms(declared.registers, values, n) @ np.array(fitted.registers)
    ratio = wanted / _column(declared.register_limit, values, n)
    z = np.concatenate([ratio[:, None], terms(declared.spill_terms, values, n), np.ones((n, 1))], axis=1)
    return wanted, (z @ np.array(fitted.spill) > 0) | (_column(declared.always_spills, values, n) > 0)


def _verdict(path: str, rows: Sequence[Row], test: np.ndarray, wanted: np.ndarray, called: np.ndarray) -> Verdict:
    header, declared = header_of(path)
    values, n = table(header, rows, _warp_size(declared)), len(rows)
    got = np.array([r.registers for r in rows], dtype=float)
    shared = np.array([r.shared for r in rows], dtype=float)
    spilled = np.array([r.spills > 0 for r in rows])
    most, least = _column(declared.shared, values, n), _column(declared.shared_least, values, n)
    columns = _column(declared.tensor_columns, values, n)
    wrong = np.array([r.tensor_columns is not None and r.tensor_columns != c for r, c in zip(rows, columns)])
    clear = test & ~spilled & (got < _column(declared.register_limit, values, n) - _SATURATED)
    off = np.abs(wanted - got)[clear]
    return Verdict(
        rows=int(test.sum()),
        exact=int(((shared == most) & test).sum()),
        bounded=int(((least <= shared) & (shared <= most) & test).sum()),
        clear=int(clear.sum()),
        error=(round(float(off.mean()), 1), round(float(np.quantile(off, 0.9)), 1), round(float(off.max()), 1)),
        spilling=int((spilled & test).sum()),
        missed=int((spilled & ~called & test).sum()),
        others=int((~spilled & test).sum()),
        false=int((~spilled & called & test).sum()),
        tensor=int((wrong & test).sum()),
    )
