"""Bits by budget for a whole model: each layer's bits and group, chosen together.

    spent = spend(model, layers, weights, batches, "4.25bits")
    spent.formats["model.layers.0.mlp.down_proj"], spent.report.sqnr

A layer may be stored in any of ``WIDTHS`` bits with a scale for each of ``GROUPS`` values, or stay whole. Its error is
taken to be ``gain * sum_j c_j sum_i (W - Q)_ij^2 / |y|^2``: rounding errors of different columns do not know of each
other, so the inputs count by the mean squares c of their channels alone. The gain is measured: it is what the model's
result changes by, relative to its size, for a relative change of this layer's output, with this layer alone rounded.
Errors of layers add up, so the sum predicts the error of the model's result, and the assignment is a knapsack
(``budget.py``), solved exactly. Without data, the weights' own errors count, each layer by its share of all weights.

A budget is an average of stored bits a weight ("4.25bits", scales counted), a size of all parameters ("30GiB"),
a signal-to-noise ratio ("20dB"), or a predicted time of all layers ("250us", on a target).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TesselError, check
from ..ir.nested import leaves
from ..targets import Target
from .budget import Choice, Layer, frontier
from .calibrate import call, running
from .formats import WHOLE_ROW, Format, integers, quantize
from .report import Bits, size_text, time_text
from .speed import seconds, stored_bytes

__all__ = ["CONSTRAINTS", "GROUPS", "WIDTHS", "Budget", "Constraint", "Spent", "parse_budget", "result_of", "spend"]

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that are tried; 7 take as many words as 8."""

GROUPS = (32, 64, 128, WHOLE_ROW)

_PROBES = 2  # batches that gains are measured on
_SHOWN = 64  # points of the frontier in a report
_PROBE = 4  # bits that a layer is rounded to when its gain is measured
_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """``kind`` is ``bits`` (a weight), ``bytes``, ``dB`` or ``seconds``."""

    kind: str
    value: float
    text: str


def parse_budget(text: str) -> Budget:
    """The budget of a text.

    >>> parse_budget("4.25bits").kind, parse_budget("30GiB").value, parse_budget("20dB").kind
    ('bits', 32212254720.0, 'dB')

    Raises:
        TesselError: it is none.
    """
    forms = "'4.25bits' (a weight), '30GiB', '20dB' or '250us' (with a target)"
    found = _BUDGET.match(text) if isinstance(text, str) else None
    check(found is not None, lambda: f"budget {text!r}: expected a number and a unit: {forms}")
    assert found is not None
    value, unit = float(found[1]), found[2].lower()
    check(value > 0, lambda: f"budget {text!r}: more than nothing is needed")
    if unit in ("bit", "bits"):
        return Budget("bits", value, text)
    if unit == "db":
        return Budget("dB", value, text)
    if unit in _UNITS:
        return Budget("bytes", value * _UNITS[unit], text)
    if unit in _TIMES:
        return Budget("seconds", value * _TIMES[unit], text)
    raise TesselError(f"budget {text!r}: unknown unit {found[2]!r}; {forms}")


@dataclass(frozen=True)
class Constraint:
    """What tiles and shards will demand of a format: ``broken(n, k, format, shards)`` says why it is not met, or
    nothing."""

    name: str
    broken: Callable[[int, int, Format, int], str]


def _whole_groups(n: int, k: int, f: Format, shards: int) -> str:
    return f"{k} % {f.group} = {k % f.group}" if f.group > 0 and k % f.group else ""


def _groups_in_shards(n: int, k: int, f: Format, shards: int) -> str:
    if shards == 1:
        return ""
    if k % shards:
        return f"{k} % {shards} shards = {k % shards}"
    if f.group <= 0:
        return f"{shards} shards would share a scale"
    own = k // shards
    return f"({k} / {shards} shards) % {f.group} = {own % f.group}" if own % f.group else ""


def _words_in_shards(n: int, k: int, f: Format, shards: int) -> str:
    per = 32 // f.bits
    own = f.group if f.group > 0 else k
    return f"a group of {own} codes ends inside a word of {per}" if shards > 1 and own % per else ""


def shard_limit(n: int, k: int, f: Format, shards: int) -> str:
    """Why a weight ``[n, k]`` of this format cannot be cut along k into so many pieces; empty if it can.

    >>> shard_limit(8, 384, integers(4, group=128), 2)
    '(384 / 2 shards) % 128 = 64'
    """
    return _groups_in_shards(n, k, f, shards) or _words_in_shards(n, k, f, shards)


def _tiles_in_groups(n: int, k: int, f: Format, shards: int) -> str:
    return f"a tile of {_TILE} columns reaches over groups of {f.group}" if f.group % _TILE > 0 else ""


_TILE = 16  # the fewest columns that a product's tile has

CONSTRAINTS = (
    Constraint("groups divide k", _whole_groups),
    Constraint("groups divide shards", _groups_in_shards),
    Constraint("words divide shards", _words_in_shards),
    Constraint("tiles lie in groups", _tiles_in_groups),
)


@dataclass(frozen=True)
class Spent:
    """The assignment: a format a layer (None: it stays whole), and what the report says of it."""

    formats: dict[str, Format | None]
    report: Bits

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``from_dict`` reads them."""
        formats = {n: None if f is None else [f.bits, f.group, f.symmetric] for n, f in self.formats.items()}
        own = asdict(self.report)
        return {"formats": formats, "report": own | {"sqnr": None if math.isinf(own["sqnr"]) else own["sqnr"]}}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Spent:
        formats = {n: None if f is None else integers(*f) for n, f in d["formats"].items()}
        said = d["report"]
        points = [(float(a), math.inf if b is None else float(b)) for a, b in said["frontier"]]
        sqnr = math.inf if said["sqnr"] is None else said["sqnr"]
        return cls(formats, Bits(**{**said, "frontier": points, "sqnr": sqnr}))


@dataclass
class _Sensitivity:
    """Of one layer: what its columns' errors count, what they count against, and the measured gain."""

    columns: Tensor
    energy: float
    gain: float = 1.0
    reached: bool = True


@dataclass
class _Ways:
    """What one layer may become."""

    formats: list[Format | None] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def spend(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    batches: Sequence[Any] | None,
    budget: str,
    *,
    symmetric: bool = True,
    widths: Sequence[int] | None = None,
    shards: int = 1,
    target: Target | None = None,
    rows: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Spent:
    """Each layer's format within the budget, the predicted error of the model the least that there is.

    Args:
        model: as it is, whole.
        layers: the linear layers to choose for, by name; ``weights``: theirs, ``[n, k]``.
        batches: calibration data, or None.
        budget: see ``parse_budget``.
        symmetric: of the integers.
        widths: bits to choose from; ``WIDTHS`` if None.
        shards: pieces that every layer's k will be cut in.
        target, rows: where and for how many rows of inputs a budget of time counts, and what is slower than a whole
            layer is no choice.
        progress: told a layer's name, how many are done, how many there are.

    Raises:
        TesselError: a budget that is none or that nothing meets (the least that can be had is named), weights or data
            that hold NaN or infinity.
    """
    asked = parse_budget(budget)
    check(
        asked.kind != "seconds" or target is not None,
        lambda: f"budget {budget!r}: name the target that the time counts on",
    )
    sizes = tuple(WIDTHS if widths is None else widths)
    check(bool(sizes), lambda: "budget: no widths to choose from")
    total = sum(w.numel() for w in weights.values())
    energies = {n: _energy(n, w) for n, w in weights.items()}
    if batches:
        known = _measured(model, layers, weights, batches, progress)
    else:
        known = {n: _Sensitivity(torch.ones(w.shape[1]), energies[n], w.numel() / total) for n, w in weights.items()}

    def size(n: int, k: int, dtype: torch.dtype, f: Format | None) -> float:
        if asked.kind == "seconds":
            assert target is not None
            return seconds(n, k, rows, dtype, f, target)
        return float(stored_bytes(n, k, f, dtype))

    def slower(n: int, k: int, dtype: torch.dtype, f: Format) -> str:
        if target is None:
            return ""
        times = [seconds(n, k, rows, dtype, way, target) for way in (f, None)]
        return f"{time_text(times[0])}, {time_text(times[1])} whole" if times[0] >= times[1] else ""

    ways = {}
    for done, (name, weight) in enumerate(weights.items()):
        ways[name] = _ways(name, weight, known[name], sizes, symmetric, shards, size, slower)
        if progress is not None:
            progress(f"pricing {name}", done + 1, len(weights))
    points = frontier([Layer(n, tuple(w.choices)) for n, w in ways.items()])
    fixed = _fixed(model, weights) if asked.kind == "bytes" else 0.0
    scale = 8.0 / total if asked.kind in ("bits", "dB") else 1.0
    at = _point(asked, points, fixed, scale, total)
    taken, loss, chosen = points[at]
    unit = {"bits": "bits a weight", "dB": "bits a weight", "bytes": "bytes", "seconds": "seconds"}[asked.kind]
    step = max(1, len(points) // _SHOWN)
    shown = sorted({*range(0, len(points), step), len(points) - 1, at})
    report = Bits(
        budget=budget,
        taken=taken * scale + fixed,
        sqnr=_db(loss),
        of="the model's result on the calibration data" if batches else "the weights",
        unit=unit,
        choices={n: w.choices[i].name for (n, w), i in zip(ways.items(), chosen, strict=True)},
        gains={n: s.gain for n, s in known.items()},
        refused={n: w.refused for n, w in ways.items() if w.refused},
        frontier=[(points[i][0] * scale + fixed, _db(points[i][1])) for i in shown if points[i][1] > 0],
    )
    return Spent({n: w.formats[i] for (n, w), i in zip(ways.items(), chosen, strict=True)}, report)


def _db(loss: float) -> float:
    return -10 * math.log10(loss) if loss > 0 else math.inf


def _fixed(model: nn.Module, weights: Mapping[str, Tensor]) -> float:
    """Bytes of all parameters but these weights."""
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    return float(every - sum(w.numel() * w.element_size() for w in weights.values()))


def _point(asked: Budget, points: Sequence[tuple[float, float, Any]], fixed: float, scale: float, total: int) -> int:
    """The last point within the budget, or the first that is good enough."""
    if asked.kind == "dB":
        fits = [i for i, p in enumerate(points) if _db(p[1]) >= asked.value]
        best = _db(points[-1][1])
        check(bool(fits), lambda: f"budget {asked.text!r}: {best:.4g} dB is the most that these layers can have")
        return fits[0]
    within = [i for i, p in enumerate(points) if p[0] * scale + fixed <= asked.value * (1 + 1e-12)]
    if within:
        return within[-1]
    least = points[0][0] * scale
    if asked.kind == "bits":
        raise TesselError(f"budget {asked.text!r}: {least:.4g} bits a weight is the least that these layers can have")
    words = time_text if asked.kind == "seconds" else size_text
    rest = f", and {words(fixed)} is what stays whole" if fixed else ""
    raise TesselError(f"budget {asked.text!r}: {words(least)} is the least that these layers can have{rest}")


def _ways(
    name: str,
    weight: Tensor,
    known: _Sensitivity,
    widths: Sequence[int],
    symmetric: bool,
    shards: int,
    size: Callable[[int, int, torch.dtype, Format | None], float],
    slower: Callable[[int, int, torch.dtype, Format], str],
) -> _Ways:
    """A layer's choices: what each takes and loses; and those that a constraint rules out."""
    (n, k), dtype = weight.shape, weight.dtype
    ways = _Ways([None], [Choice("whole", size(n, k, dtype, None), 0.0)])
    own = weight.detach().float().cpu()
    for bits in widths:
        for group in GROUPS:
            format = integers(bits, group, symmetric)
            text = f"w{bits}-" + (f"g{group}" if group > 0 else "channel")
            why = next((f"{text} ({c.name}: {w})" for c in CONSTRAINTS if (w := c.broken(n, k, format, shards))), "")
            if not why and (times := slower(n, k, dtype, format)):
                why = f"{text} (slower than whole: {times})"
            if why:
                ways.refused.append(why)
                continue
            ways.formats.append(format)
            ways.choices.append(Choice(text, size(n, k, dtype, format), known.gain * _error(name, own, format, known)))
    return ways


def _error(name: str, weight: Tensor, format: Format, known: _Sensitivity) -> float:
    """Of the layer's result, relative to its size, if the weight is rounded to nearest."""
    try:
        off = weight - quantize(weight, format).dequantize()
    except TesselError as e:
        raise TesselError(f"quantize: {name}: {e}") from e
    return float(off.square().double().sum(0) @ known.columns.double()) / known.energy


def _energy(name: str, weight: Tensor) -> float:
    found = float(weight.detach().double().square().sum())
    check(math.isfinite(found), lambda: f"quantize: {name}: the weight holds NaN or infinite values")
    return found or 1.0


# ---------------------------------------------------------------- what the model's result says


def _measured(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    batches: Sequence[Any],
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, _Sensitivity]:
    """One run of all data for what the layers see and give; then one of a few batches for each layer's gain."""
    columns: dict[str, Tensor] = {}
    energy: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            seen = x.reshape(-1, x.shape[-1]).double().square().sum(0).cpu()
            check(
                bool(torch.isfinite(seen).all()), lambda: f"quantize: calibration gives {name} NaN or infinite inputs"
            )
            columns[name] = columns[name] + seen if name in columns else seen
            bias: Any = getattr(module, "bias", None)
            own = out if bias is None else out - bias
            energy[name] = energy.get(name, 0.0) + float(own.double().square().sum())

        return see

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    probes = batches[:_PROBES]
    try:
        with running(model):
            want = [result_of(call(model, batch, f"item {i}")) for i, batch in enumerate(probes)]
            for batch in batches[_PROBES:]:
                call(model, batch)
    finally:
        for h in handles:
            h.remove()
    known: dict[str, _Sensitivity] = {}
    for done, (name, weight) in enumerate(weights.items()):
        if name in columns:
            known[name] = _Sensitivity(columns[name], energy[name] or 1.0)
            known[name].gain = _gain(model, layers[name], name, weight, known[name], probes, want)
        else:
            known[name] = _Sensitivity(torch.ones(weight.shape[1]), _energy(name, weight), reached=False)
        if progress is not None:
            progress(f"measuring {name}", done + 1, len(weights))
    gains = sorted(s.gain for s in known.values() if s.reached)
    for s in known.values():  # what the data never reaches counts as a layer in the middle
        s.gain = s.gain if s.reached else gains[len(gains) // 2] if gains else 1.0
    return known


def _gain(
    model: nn.Module,
    layer: nn.Module,
    name: str,
    weight: Tensor,
    known: _Sensitivity,
    probes: Sequence[Any],
    want: Sequence[Tensor],
) -> float:
    """What the result changes by, for a relative change of the layer's output, with the layer alone rounded."""
    k = weight.shape[1]
    group = next(g for g in (*GROUPS[2::-1], WHOLE_ROW) if g == WHOLE_ROW or k % g == 0)
    format = integers(_PROBE, group)
    whole = weight.detach().float()
    try:
        off = (quantize(whole, format).dequantize() - whole).to(weight.dtype)
    except TesselError as e:
        raise TesselError(f"quantize: {name}: {e}") from e

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return out + x @ off.t()

    handle = layer.register_forward_hook(add, with_kwargs=True)
    try:
        with running(model):
            got = [result_of(call(model, batch)) for batch in probes]
    finally:
        handle.remove()
    moved = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True))
    size = sum(float(w.square().sum()) for w in want)
    own = float(off.double().square().sum(0).cpu() @ known.columns.double()) / known.energy
    return moved / size / own if size > 0 and own > 0 else 0.0


def result_of(out: Any) -> Tensor:
    """The largest floating tensor of a model's result (beside a loss, the scores), flat, float64."""
    found = max((x for x in leaves(out, Tensor) if x.is_floating_point()), key=Tensor.numel, default=None)
    if found is None:
        raise TesselError(f"budget: the model gives {type(out).__name__}, without a floating tensor to compare")
    check(bool(torch.isfinite(found).all()), lambda: "budget: the model's result on the calibration data is no number")
    return found.detach().double().reshape(-1).cpu()
