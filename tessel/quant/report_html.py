"""The report of a quantized model as one HTML page: no scripts, nothing from elsewhere, names escaped.

The template is ``report.html.j2``; pictures are SVG that it draws from the numbers made here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from .report import size_text, time_text

__all__ = ["quant_page"]

_WIDE, _TALL = 1000.0, 220.0  # units of a picture's coordinates
_BARS = 400  # layers that pictures show


def quant_page(report: Mapping[str, Any]) -> str:
    """The page for ``QuantReport.to_dict()``."""
    return _template().render(_view(report))  # type: ignore[no-any-return]


@cache
def _template() -> Any:
    text = (files("tessel") / "quant/report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )


def _view(d: Mapping[str, Any]) -> dict[str, Any]:
    layers = d["layers"]
    return {
        "scheme": d["scheme"],
        "method": d["method"],
        "figures": list(_figures(d)),
        "sqnr": _sqnr(layers),
        "sizes": _pairs(layers, lambda x: (x["before"], x["after"]), size_text),
        "times": _pairs(
            layers, lambda x: (x["speed"]["before"], x["speed"]["after"]) if x["speed"] else None, time_text
        ),
        "target": d["target"],
        "shown": min(_BARS, len(layers)),
        "of": len(layers),
        "bits": d["bits"],
        "frontier": _frontier(d["bits"]) if d["bits"] else None,
        "refused": list(d["bits"]["refused"].items()) if d["bits"] else [],
        "rows": [_row(x, d["bits"]) for x in layers],
        "whole": [_row(x, d["bits"]) for x in d["whole"]],
        "resumed": d["resumed"],
        "said": [words for words in (d["inputs"], d["cache"]) if words],
    }


def _figures(d: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "before", size_text(d["before"])
    yield "after", size_text(d["after"])
    yield "layers quantized", str(len(d["layers"]))
    yield "fell back", str(sum(bool(x["fallback"]) for x in d["layers"]))
    if d["speed"]:
        yield f"predicted on {d['target']}", f"× {d['speed']['before'] / d['speed']['after']:.2f}"
    if d["measured"]:
        m = d["measured"]
        yield f"measured on {m['target']}", f"× {m['before_ms'] / m['after_ms']:.2f}"
        if m["sqnr"] is not None:
            yield "SQNR of the output", f"{m['sqnr']:.1f} dB"
    if d["bits"]:
        yield f"of {d['bits']['budget']}", _taken(d["bits"], d["bits"]["taken"])
        yield "SQNR predicted", _decibels(d["bits"]["sqnr"])


def _taken(bits: Mapping[str, Any], value: float) -> str:
    words = {"bytes": size_text, "seconds": time_text}.get(bits["unit"])
    return f"{value:.4g} {bits['unit']}" if words is None else words(value)


def _decibels(value: float | None) -> str:
    return "no error" if value is None else f"{value:.1f} dB"


def _row(x: Mapping[str, Any], bits: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "name": x["name"],
        "shape": " × ".join(map(str, x["shape"])),
        "how": x["how"],
        "fallback": x["fallback"],
        "sqnr": "" if x["sqnr"] is None else f"{x['sqnr']:.1f}",
        "expected": "" if x["expected"] is None else f"{x['expected']:.1f}",
        "kurtosis": "" if x["kurtosis"] is None else f"{x['kurtosis']:.1f}",
        "outliers": ", ".join(f"{i}: × {ratio:g}" for i, ratio in x["outliers"][:4]),
        "sizes": f"{size_text(x['before'])} → {size_text(x['after'])}",
        "times": f"{time_text(x['speed']['before'])} → {time_text(x['speed']['after'])}" if x["speed"] else "",
        "choice": "" if bits is None else bits["choices"].get(x["name"], ""),
        "gain": "" if bits is None or x["name"] not in bits["gains"] else f"{bits['gains'][x['name']]:.3g}",
    }


def _sqnr(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A bar a layer for what was measured, a mark for what normal values would give."""
    known = [x for x in layers[:_BARS] if x["sqnr"] is not None]
    if not known:
        return None
    top = max(max(x["sqnr"], x["expected"] or 0.0) for x in known) * 1.05 or 1.0
    wide = _WIDE / len(known)

    def y(value: float) -> float:
        return _TALL * (1 - max(0.0, value) / top)

    bars = [
        {
            "x": i * wide, "w": max(0.5, wide * 0.8), "y": y(x["sqnr"]), "h": _TALL - y(x["sqnr"]),
            "mark": None if x["expected"] is None else y(x["expected"]), "odd": bool(x["outliers"]),
            "say": f"{x['name']}: {x['sqnr']:.1f} dB"
            + ("" if x["expected"] is None else f", normal values {x['expected']:.1f} dB"),
        }
        for i, x in enumerate(known)
    ]  # fmt: skip
    return {"bars": bars, "ticks": [(y(v), f"{v:g} dB") for v in _ticks(0.0, top)]}


def _pairs(layers: Sequence[Mapping[str, Any]], of: Any, words: Any) -> dict[str, Any] | None:
    """Two bars a layer, before and after."""
    known = [(x["name"], pair) for x in layers[:_BARS] if (pair := of(x)) is not None]
    if not known:
        return None
    top = max(max(pair) for _, pair in known) or 1.0
    wide = _WIDE / len(known)
    bars = []
    for i, (name, pair) in enumerate(known):
        say = f"{name}: {words(pair[0])} → {words(pair[1])}"
        for kind, value in enumerate(pair):
            tall = _TALL * value / top
            bars.append(
                {"x": (i + 0.4 * kind) * wide, "w": max(0.5, wide * 0.4), "y": _TALL - tall, "h": tall, "kind": kind,
                 "say": say}
            )  # fmt: skip
    return {"bars": bars, "top": words(top)}


def _frontier(bits: Mapping[str, Any]) -> dict[str, Any] | None:
    """Points by size and SQNR, and the one that was taken."""
    points = [(size, db) for size, db in bits["frontier"] if db is not None]
    if len(points) < 2:
        return None
    low, high = points[0][0], points[-1][0]
    least, most = min(p[1] for p in points), max(p[1] for p in points)

    def place(size: float, db: float) -> tuple[float, float]:
        return _WIDE * (size - low) / ((high - low) or 1.0), _TALL * (1 - (db - least) / ((most - least) or 1.0))

    at = None if bits["sqnr"] is None else place(min(max(bits["taken"], low), high), bits["sqnr"])
    return {
        "path": " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points)),
        "points": [(*place(*p), f"{_taken(bits, p[0])}: {p[1]:.1f} dB") for p in points],
        "at": at,
        "say": f"{_taken(bits, bits['taken'])}: {_decibels(bits['sqnr'])}",
        "across": [(place(v, least)[0], _taken(bits, v)) for v in (low, (low + high) / 2, high)],
        "up": [(place(low, v)[1], f"{v:g} dB") for v in _ticks(least, most)],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, about five."""
    wide = high - low
    if wide <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(wide / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= wide / 5)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
