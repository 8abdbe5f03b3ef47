"""Quantize the linear layers of a model, block by block.

    model = tessel.quantize(model, "w4a16", calibration=batches, method="gptq")
    print(model.quantization)

Layers are done in the order of the model's blocks, each with inputs that have passed through what is quantized already.
Beside the model, memory holds one block's statistics.
"""

from __future__ import annotations

import copy
import fnmatch
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..errors import TesselError, check, did_you_mean
from .formats import WHOLE_ROW, WHOLE_TENSOR, Format, Quantized, quantize
from .hessian import gptq
from .linear import QuantLinear, divided
from .scheme import Scheme, scheme
from .sqnr import expected, sqnr
from .transforms import awq_scales, shape_of_outliers, signs, smooth_scales

__all__ = ["METHODS", "LayerReport", "QuantReport", "quantize_model"]

METHODS = {
    "rtn": "round to nearest",
    "mse": "round to nearest, the range clipped where the squared error is least",
    "gptq": "columns make up for the errors of those before them (needs calibration)",
    "smoothquant": "outliers of the inputs move into the weight (needs calibration)",
    "awq": "channels whose inputs are large are scaled up before rounding (needs calibration)",
    "hadamard": "inputs and weight are rotated, which spreads outliers",
}
_NEED_DATA = {"gptq", "smoothquant", "awq"}
_SAMPLE = 1024  # rows of a layer's inputs that AWQ looks at
_CLIPS = [1 - 0.025 * i for i in range(21)]


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


@dataclass
class QuantReport:
    """All layers in order, and parameters that were left as they are."""

    scheme: str
    method: str
    layers: list[LayerReport] = field(default_factory=list)
    whole: list[LayerReport] = field(default_factory=list)

    @property
    def before(self) -> int:
        """Bytes of all parameters before; ``after``: after."""
        return sum(x.before for x in (*self.layers, *self.whole))

    @property
    def after(self) -> int:
        return sum(x.after for x in (*self.layers, *self.whole))

    def __str__(self) -> str:
        table = Table(title=f"{self.scheme} by {self.method}: {_size(self.before)} -> {_size(self.after)}")
        for column in ("layer", "n x k", "became", "SQNR", "normal values", "outliers", "bytes"):
            table.add_column(column, overflow="fold")
        for x in (*self.layers, *self.whole):
            got = "" if x.sqnr is None else f"{x.sqnr:.1f} dB"
            closed = "" if x.expected is None else f"{x.expected:.1f} dB"
            odd = ", ".join(f"{i}: x{ratio:g}" for i, ratio in x.outliers[:3])
            how = x.how + (f"; {x.fallback}" if x.fallback else "")
            sizes = f"{_size(x.before)} -> {_size(x.after)}"
            table.add_row(x.name, " x ".join(map(str, x.shape)), how, got, closed, odd, sizes)
        text = io.StringIO()
        Console(width=150, file=text).print(table)
        return text.getvalue()


def quantize_model(
    model: nn.Module,
    scheme_name: str | Scheme,
    calibration: Iterable[Any] | None = None,
    *,
    method: str = "rtn",
    skip: Sequence[str] = ("lm_head",),
    inplace: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """See ``tessel.quantize``."""
    chosen = scheme(scheme_name) if isinstance(scheme_name, str) else scheme_name
    steps = _steps(method)
    _check_scheme(chosen, steps)
    batches = None if calibration is None else list(calibration)
    needs = [s for s in steps if s in _NEED_DATA]
    have = "none" if batches is None else "an empty list"
    check(
        not needs or bool(batches),
        lambda: (
            f"quantize: method {needs[0]!r} looks at calibration data, and there is {have}; "
            "give calibration=[...] of what the model is called with"
        ),
    )
    if not inplace:
        model = copy.deepcopy(model)
    report = QuantReport(chosen.name, method)
    layers = {name: m for name, m in model.named_modules() if _weight(m) is not None and not _skipped(name, skip)}
    check(bool(layers), lambda: f"quantize: {type(model).__name__} has no linear layer outside {list(skip)}")
    blocks = _blocks(list(layers))
    done = 0
    for names in blocks:
        seen = _look(model, {n: layers[n] for n in names}, batches, steps) if needs and batches else {}
        for name in names:
            layer = layers[name]
            made, row = _layer(name, layer, chosen, steps, seen.get(name))
            report.layers.append(row) if made is not None else report.whole.append(row)
            if made is not None:
                _put(model, name, made)
            done += 1
            if progress is not None:
                progress(name, done, len(layers))
    report.whole += _rest(model)
    model.quantization = report  # type: ignore[assignment]
    return model


# ---------------------------------------------------------------- what is asked for


def _steps(method: str) -> tuple[str, ...]:
    steps = tuple(method.split("+"))
    for step in steps:
        if step not in METHODS:
            known = f"there are {', '.join(METHODS)}, joined by +"
            raise TesselError(f"quantize: no method {step!r}{did_you_mean(step, METHODS)}; {known}")
    rounding = [s for s in steps if s in ("rtn", "mse", "gptq")]
    check(len(rounding) <= 1, lambda: f"quantize: {' and '.join(rounding)} round the same weight; choose one")
    both = {"smoothquant", "awq"} <= set(steps)
    check(not both, lambda: "quantize: smoothquant and awq scale the same channels; choose one")
    return steps


def _check_scheme(s: Scheme, steps: Sequence[str]) -> None:
    check(s.weight is not None, lambda: f"quantize: scheme {s.name!r} says nothing of weights")
    check(
        s.keys is None and s.values is None and not s.sparse,
        lambda: f"quantize: of scheme {s.name!r}, caches of keys and values and 2:4 weights cannot be lowered yet",
    )
    assert s.weight is not None
    if "gptq" in steps:
        fits = s.weight.symmetric and s.weight.rows == 1 and s.weight.group != WHOLE_TENSOR
        check(fits, lambda: f"quantize: gptq rounds symmetric formats with a scale a group or a row, not {s.name!r}")


# ---------------------------------------------------------------- the layers of a model


def _weight(module: nn.Module) -> Tensor | None:
    """``[n, k]`` of a linear layer (of transformers' Conv1D, too, which is one with its weight turned)."""
    if type(module) is nn.Linear:
        return module.weight
    if type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None:
        return module.weight.t()  # type: ignore[operator, no-any-return]
    return None


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name.rpartition(".")[2], p) for p in skip)


def _blocks(names: Sequence[str]) -> list[list[str]]:
    """Names by the numbered module that holds them (``model.layers.3``), in the model's order; others alone."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"(.*?\.\d+)\.", name)
        blocks.setdefault(found[1] if found else name, []).append(name)
    return list(blocks.values())


def _put(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, made)


# ---------------------------------------------------------------- calibration


@dataclass
class _Seen:
    """Of a layer's inputs: ``2 sum x x^T`` (only for gptq), largest magnitudes, a sample of rows."""

    gram: Tensor | None
    largest: Tensor
    rows: list[Tensor] = field(default_factory=list)
    count: int = 0


def _look(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], steps: Sequence[str]
) -> dict[str, _Seen]:
    """What the layers see when the model runs on the calibration data."""
    seen: dict[str, _Seen] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            x = x.reshape(-1, x.shape[-1])
            check(bool(torch.isfinite(x).all()), lambda: f"quantize: calibration gives {name} NaN or infinite inputs")
            k = x.shape[1]
            mine = seen.get(name)
            if mine is None:
                gram = torch.zeros(k, k, dtype=torch.float64) if "gptq" in steps else None
                mine = seen[name] = _Seen(gram, torch.zeros(k))
            if mine.gram is not None:
                wide = x.double().cpu()
                mine.gram += 2 * wide.T @ wide
            mine.largest = torch.maximum(mine.largest, x.abs().amax(0).float().cpu())
            if "awq" in steps and mine.count < _SAMPLE:
                mine.rows.append(x[:: max(1, len(x) * len(batches) // _SAMPLE)].float().cpu())
                mine.count += len(mine.rows[-1])

        return look

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                _call(model, batch)
    finally:
        model.train(training)
        for h in handles:
            h.remove()
    return seen


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


# ---------------------------------------------------------------- one layer


def _layer(
    name: str, layer: nn.Module, s: Scheme, steps: Sequence[str], seen: _Seen | None
) -> tuple[QuantLinear | None, LayerReport]:
    weight, format = _weight(layer), s.weight
    assert weight is not None and format is not None
    weight = weight.detach().float().cpu()
    n, k = weight.shape
    before = sum(p.numel() * p.element_size() for p in layer.parameters())
    for what, f in (("weight", format), ("inputs", s.activation)):
        if f is not None and f.group > 0 and k % f.group:
            why = f"left whole: groups of {f.group} of its {what} do not divide k = {k}"
            return None, LayerReport(name, (n, k), why, None, None, (), before, before)
    fallback = ""
    if seen is None and any(step in _NEED_DATA for step in steps):
        fallback = "rounded to nearest: the calibration data never reaches it"
        steps = [step for step in steps if step not in _NEED_DATA]
    divisor = sign = None
    if seen is not None and "smoothquant" in steps:
        divisor = smooth_scales(seen.largest, weight)
    if seen is not None and "awq" in steps:
        divisor = awq_scales(torch.cat(seen.rows), weight, format)
    if "hadamard" in steps:
        sign = signs(k)
    try:
        ready = divided(weight, divisor, sign)
        quantized, why = _round(ready, format, steps, seen, divisor, sign)
    except TesselError as e:
        raise TesselError(f"quantize: {name}: {e}") from e
    made = QuantLinear.of(layer, quantized, s.activation, divisor, sign)
    after = sum(t.numel() * t.element_size() for t in (*made.buffers(), *made.parameters()))
    group = k if format.group == WHOLE_ROW else format.group
    uniform = format.kind == "int" and format.symmetric and group > 0
    closed = expected(format.bits, group) if uniform else None
    got = sqnr(ready, quantized.dequantize())
    odd = tuple(shape_of_outliers(weight))
    row = LayerReport(name, (n, k), _words(format, s.activation), got, closed, odd, before, after, why or fallback)
    return made, row


def _round(
    weight: Tensor,
    format: Format,
    steps: Sequence[str],
    seen: _Seen | None,
    divisor: Tensor | None,
    sign: Tensor | None,
) -> tuple[Quantized, str]:
    """The codes, and what could not be done."""
    if "gptq" in steps and seen is not None and seen.gram is not None:
        h = seen.gram
        if divisor is not None:
            h = h / divisor.double() / divisor.double()[:, None]
        if sign is not None:
            h = divided(divided(h, None, sign).T, None, sign).double()
        done = gptq(weight, h, format)
        return done.weight, done.fallback
    if "mse" not in steps:
        return quantize(weight, format), ""
    tried = (quantize(weight, format, clip) for clip in _CLIPS)
    best = min(tried, key=lambda q: float((q.dequantize() - weight).square().sum()))
    return best, ""


def _words(weight: Format, activation: Format | None) -> str:
    group = {WHOLE_ROW: "a row", WHOLE_TENSOR: "one scale"}.get(weight.group, f"groups of {weight.group}")
    inputs = "" if activation is None else f", inputs {activation.kind}{activation.bits}"
    return f"{weight.kind}{weight.bits}, {group}{inputs}"


def _rest(model: nn.Module) -> list[LayerReport]:
    """Parameters that no quantized layer holds."""
    inside = {id(p) for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters()}
    rows = []
    for name, p in model.named_parameters():
        if id(p) not in inside and p.dim() > 1:
            size = p.numel() * p.element_size()
            rows.append(LayerReport(name, tuple(p.shape), "as it was", None, None, (), size, size))
    return rows


def _size(count: float) -> str:
    step = 0 if count < 1 else min(3, int(math.log2(count)) // 10)
    return f"{count / 2 ** (10 * step):.4g} {('B', 'KiB', 'MiB', 'GiB')[step]}"
