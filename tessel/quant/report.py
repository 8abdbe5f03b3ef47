"""What quantizing did to a model, layer by layer: as text, as values for JSON, and as a page (``report_html``)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Bits", "LayerReport", "Measured", "QuantReport", "Speed", "size_text", "time_text"]


@dataclass(frozen=True)
class Speed:
    """Predicted seconds of a layer's product for ``rows`` rows of inputs, whole and quantized."""

    rows: int
    before: float
    after: float


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: of the module.
        shape: ``(n, k)``.
        how: the format in words, or why the layer is as it was.
        sqnr: of the weight, dB; None where it was left whole.
        expected: the same of normal values (``sqnr.expected``), where there is a closed form.
        outliers: channels of the weight that stick out, and how often the median's size.
        before, after: bytes.
        fallback: what the method could not do here; empty if nothing.
        kurtosis: of the weight's values: 3 for normal ones, more where few are far larger than the others.
        speed: predicted, where a target was named that there is a model of.
        slower: what the scheme was predicted to take where that is why the layer was left whole.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    sqnr: float | None
    expected: float | None
    outliers: tuple[tuple[int, float], ...]
    before: int
    after: int
    fallback: str = ""
    kurtosis: float | None = None
    speed: Speed | None = None
    slower: Speed | None = None

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LayerReport:
        """What ``dataclasses.asdict`` gave, also after JSON."""
        odd = tuple((int(i), float(ratio)) for i, ratio in d["outliers"])
        times = {name: None if d.get(name) is None else Speed(**d[name]) for name in ("speed", "slower")}
        return cls(**{**d, "shape": tuple(d["shape"]), "outliers": odd, **times})


@dataclass(frozen=True)
class Bits:
    """How a budget was spent.

    Attributes:
        budget: as it was asked for.
        taken: what the assignment takes of it, in the budget's unit.
        sqnr: predicted, dB; infinite where nothing is rounded.
        of: what the SQNR is of.
        unit: of ``taken`` and of the frontier's sizes.
        choices: layer -> what was chosen.
        gains: layer -> its share of the error at equal error of its own: how sensitive the model is to it.
        refused: layer -> the choices that a constraint ruled out, with the constraint's name.
        frontier: ``(size, SQNR)`` of assignments that none beats in both, a sample by rising size.
    """

    budget: str
    taken: float
    sqnr: float
    of: str
    unit: str
    choices: dict[str, str]
    gains: dict[str, float]
    refused: dict[str, list[str]]
    frontier: list[tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """Milliseconds of the compiled model before and after, medians of interleaved runs, and the SQNR of its output."""

    target: str
    before_ms: float
    after_ms: float
    runs: int
    sqnr: float | None


@dataclass
class QuantReport:
    """All layers in order, and parameters that were left as they are.

    Attributes:
        target: that speed is predicted for; empty if none was named.
        inputs: what rounded inputs are multiplied as, where it is not what they are rounded to; empty otherwise.
        cache: what the cache of keys and values became; empty if it is as it was.
        resumed: layers that an earlier run had finished.
    """

    scheme: str
    method: str
    layers: list[LayerReport] = field(default_factory=list)
    whole: list[LayerReport] = field(default_factory=list)
    bits: Bits | None = None
    target: str = ""
    measured: Measured | None = None
    resumed: int = 0
    cache: str = ""
    inputs: str = ""

    @property
    def before(self) -> int:
        """Bytes of all parameters before; ``after``: after."""
        return sum(x.before for x in (*self.layers, *self.whole))

    @property
    def after(self) -> int:
        return sum(x.after for x in (*self.layers, *self.whole))

    @property
    def speed(self) -> tuple[float, float] | None:
        """Predicted seconds of all layers before and after; None where no target was named."""
        known = [x.speed for x in (*self.layers, *self.whole) if x.speed is not None]
        return (sum(s.before for s in known), sum(s.after for s in known)) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: numbers that are not finite are None."""
        speed = self.speed
        own = asdict(self) | {"format": 1, "before": self.before, "after": self.after}
        own["speed"] = None if speed is None else {"before": speed[0], "after": speed[1]}
        return _plain(own)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One page with plots that needs nothing from elsewhere."""
        from .report_html import quant_page

        return quant_page(self.to_dict())

    def __str__(self) -> str:
        title = f"{self.scheme} by {self.method}: {size_text(self.before)} -> {size_text(self.after)}"
        timed = any(x.speed is not None for x in (*self.layers, *self.whole))
        table = Table(title=title)
        columns = ["layer", "n x k", "became", "SQNR", "normal values", "outliers", "bytes"]
        for column in columns + ["predicted"] * timed:
            table.add_column(column, overflow="fold")
        for x in (*self.layers, *self.whole):
            got = "" if x.sqnr is None else f"{x.sqnr:.1f} dB"
            closed = "" if x.expected is None else f"{x.expected:.1f} dB"
            odd = ", ".join(f"{i}: x{ratio:g}" for i, ratio in x.outliers[:3])
            how = x.how + (f"; {x.fallback}" if x.fallback else "")
            cells = [x.name, " x ".join(map(str, x.shape)), how, got, closed, odd]
            cells.append(f"{size_text(x.before)} -> {size_text(x.after)}")
            if timed:
                cells.append("" if x.speed is None else f"{time_text(x.speed.before)} -> {time_text(x.speed.after)}")
            table.add_row(*cells)
        text = io.StringIO()
        console = Console(width=150, file=text)
        console.print(table)
        for line in self._lines():
            console.print(line, markup=False, highlight=False)
        return text.getvalue()

    def _lines(self) -> Iterator[str]:
        if self.inputs:
            yield self.inputs
        if self.cache:
            yield f"cache: {self.cache}"
        if (speed := self.speed) is not None:
            first = next(x.speed for x in (*self.layers, *self.whole) if x.speed is not None)
            before, after = speed
            yield (
                f"predicted on {self.target}, {first.rows} rows: {time_text(before)} -> {time_text(after)} "
                f"for all products, {before / after:.2f} times as fast"
            )
        if slower := [(x.name, x.slower) for x in self.whole if x.slower is not None]:
            yield f"left whole, since {self.scheme} is predicted to be slower on {self.target}: {len(slower)} layers"
            for name, s in slower:
                yield f"  {name}: {time_text(s.after)} for {s.rows} rows, {time_text(s.before)} whole"
        if self.measured is not None:
            m = self.measured
            near = "" if m.sqnr is None else f"; SQNR of the output {m.sqnr:.1f} dB"
            yield (
                f"measured on {m.target}: {m.before_ms:.3f} ms -> {m.after_ms:.3f} ms, "
                f"{m.before_ms / m.after_ms:.2f} times as fast (medians of {m.runs} interleaved runs){near}"
            )
        if self.bits is not None:
            b = self.bits
            taken = {"bytes": size_text, "seconds": time_text}.get(b.unit, lambda x: f"{x:.4g} {b.unit}")(b.taken)
            yield f"budget {b.budget}: {taken} taken; predicted SQNR of {b.of}: {b.sqnr:.1f} dB"
            for layer, why in b.refused.items():
                yield f"  {layer} could not have {'; '.join(why)}"
        if self.resumed:
            yield f"{self.resumed} layers were finished by an earlier run"


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def size_text(count: float) -> str:
    """Bytes in words.

    >>> size_text(4718592)
    '4.5 MiB'
    """
    step = 0 if count < 1 else min(3, int(math.log2(count)) // 10)
    return f"{count / 2 ** (10 * step):.4g} {('B', 'KiB', 'MiB', 'GiB')[step]}"


def time_text(seconds: float) -> str:
    """Seconds in words.

    >>> time_text(2.5e-5)
    '25 µs'
    """
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}"
