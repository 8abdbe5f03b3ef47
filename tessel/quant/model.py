"""Quantize the linear layers of a model, block by block.

    model = tessel.quantize(model, "w4a16", calibration=batches, method="gptq")
    print(model.quantization)

Layers are done in the order of the model's blocks, each with inputs that have passed through what is quantized already.
Beside the model, memory holds one block's statistics.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TesselError, check, did_you_mean
from ..targets import Target, get_target
from .bits import Spent, shard_limit, spend
from .calibrate import Seen, empty, look
from .formats import WHOLE_ROW, WHOLE_TENSOR, Format, Quantized, quantize
from .hessian import gptq, rows_gain, turboboa
from .kv_model import cache_for, give_cache
from .linear import QuantLinear, divided
from .moments import shape_of
from .report import LayerReport, QuantReport, Speed, time_text
from .resume import Work, run_of
from .scheme import Scheme, scheme
from .sparse import SparseLinear, sparse_layer
from .speed import multiplied_as, seconds, sparse_seconds
from .sqnr import expected, sqnr_of
from .stacks import quantize_stacks
from .transforms import awq_scales, channel_order, outliers, signs, smooth_scales

__all__ = ["METHODS", "quantize_model"]

METHODS = {
    "rtn": "round to nearest",
    "mse": "round to nearest, the range clipped where the squared error is least",
    "gptq": "columns make up for the errors of those before them (needs calibration)",
    "turboboa": "gptq, and rows make up for those before them where a block's result mixes them (needs calibration)",
    "smoothquant": "outliers of the inputs move into the weight (needs calibration)",
    "awq": "channels whose inputs are large are scaled up before rounding (needs calibration)",
    "hadamard": "inputs and weight are rotated, which spreads outliers",
}
_NEED_DATA = {"gptq", "turboboa", "smoothquant", "awq"}
_CLIPS = [1 - 0.025 * i for i in range(21)]
_ORDER_MATTERS = 0.5  # dB that an order of channels must gain
_ROWS_MATTER = 1.05  # times: what rows could gain by making up for each other before it is worth the time


def quantize_model(
    model: nn.Module,
    scheme_name: str | Scheme | None,
    calibration: Iterable[Any] | None = None,
    *,
    method: str = "rtn",
    skip: Sequence[str] = ("lm_head",),
    inplace: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    budget: str | None = None,
    widths: Sequence[int] | None = None,
    shards: int = 1,
    target: str | None = None,
    rows: int = 1,
    work: str | Path | None = None,
) -> nn.Module:
    """See ``tessel.quantize``."""
    check(
        scheme_name is not None or budget is not None,
        lambda: "quantize: name a scheme ('w4a16'), a budget ('4.25bits'), or both: the inputs' format, and the budget",
    )
    given = "w4a16" if scheme_name is None else scheme_name
    chosen = scheme(given) if isinstance(given, str) else given
    if chosen.keys is not None or chosen.values is not None:
        rest = replace(chosen, keys=None, values=None, recent=0)
        words = cache_for(model, chosen)
        if rest.weight is None and not rest.sparse and budget is None:
            check(method == "rtn", lambda: f"quantize: method {method!r} is about weights, scheme {chosen.name!r} not")
            model = model if inplace else copy.deepcopy(model)
            model.quantization = QuantReport(chosen.name, method, whole=_rest(model, ()))  # type: ignore[assignment]
        else:
            model = quantize_model(
                model, rest, calibration, method=method, skip=skip, inplace=inplace, progress=progress, budget=budget,
                widths=widths, shards=shards, target=target, rows=rows, work=work,
            )  # fmt: skip
        give_cache(model, chosen)
        model.quantization.cache = words  # type: ignore[union-attr]
        return model
    steps = _steps(method)
    _check_scheme(chosen, steps)
    device = None if target is None else get_target(target)
    check(rows >= 1 and shards >= 1, lambda: f"quantize: {rows} rows, {shards} shards: at least 1 of each")
    one = isinstance(calibration, Mapping | str)
    check(not one, lambda: "quantize: calibration is a list of what the model is called with, call by call: [batch]")
    batches = None if calibration is None else list(calibration)
    needs = [s for s in steps if s in _NEED_DATA]
    check(batches is None or bool(batches), lambda: "quantize: the calibration data is an empty list; leave it out")
    nothing = batches is not None and empty(batches)
    check(not nothing, lambda: f"quantize: the {len(batches or ())} items of the calibration data hold no values")
    check(
        not needs or batches is not None,
        lambda: (
            f"quantize: method {needs[0]!r} looks at calibration data, and there is none; "
            "give calibration=[...] of what the model is called with"
        ),
    )
    layers = {name: m for name, m in model.named_modules() if _weight(m) is not None and not _skipped(name, skip)}
    check(bool(layers), lambda: f"quantize: {type(model).__name__} has no linear layer outside {list(skip)}")
    check("" not in layers, lambda: "quantize: the model is a linear layer itself; put it into nn.Sequential")
    check(not chosen.sparse or budget is None, lambda: "quantize: 2:4 has one size; no budget can be spent on it")
    kept = None
    if work is not None:
        said = {"scheme": chosen, "method": method, "skip": list(skip), "budget": budget, "widths": widths}
        kept = Work(Path(work), run_of(model, batches, **said, shards=shards, target=target, rows=rows))
    if not inplace:
        model = copy.deepcopy(model)
        layers = {name: model.get_submodule(name) for name in layers}
    own: dict[str, Scheme | None] = dict.fromkeys(layers, chosen)
    report = QuantReport(chosen.name if budget is None else f"{budget}", method, target=target or "")
    if budget is not None:
        weights = {name: w for name, m in layers.items() if (w := _weight(m)) is not None}
        symmetric = chosen.weight is None or chosen.weight.symmetric
        spent = _spent(kept, lambda: spend(
            model, layers, weights, batches, budget, symmetric=symmetric, widths=widths,
            shards=shards, target=device, rows=rows, progress=progress,
        ))  # fmt: skip
        report.bits = spent.report
        own = {n: None if f is None else replace(chosen, weight=f) for n, f in spent.formats.items()}
        if scheme_name is not None:
            report.scheme = f"{chosen.name}, weights within {budget}"
    done = 0
    made: nn.Module | None
    for block, names in _blocks(list(layers)).items():
        missing = {n: layers[n] for n in names if own[n] is not None and (kept is None or n not in kept)}
        inside = model.get_submodule(block) if block not in layers else None
        seen = look(model, missing, batches, steps, inside) if needs and missing and batches else {}
        for name in names:
            layer, s = layers[name], own[name]
            if kept is not None and name in kept and s is not None:
                made, row = kept.read(name, layer, s, _weight(layer).dtype)  # type: ignore[union-attr]
                report.resumed += 1
            else:
                made, row = _layer(name, layer, s, steps, seen.get(name), device, rows, shards)
                if kept is not None and isinstance(made, QuantLinear):
                    kept.write(name, made, row)
            report.layers.append(row) if made is not None else report.whole.append(row)
            if made is not None:
                _put(model, name, made)
            done += 1
            if progress is not None:
                progress(name, done, len(layers))
    if chosen.activation is not None and report.layers:
        first = next(w for m in layers.values() if (w := _weight(m)) is not None)
        report.inputs = multiplied_as(chosen.activation, first.dtype, device)
    left = {r.name for r in report.whole}
    if chosen.weight is not None and not chosen.sparse:
        stacks, whole = _stacks(model, chosen, steps, skip)
        report.layers += stacks
        report.whole += whole
    told = {r.name for r in report.whole}
    report.whole += [r for r in _rest(model, left) if r.name not in told]
    model.quantization = report  # type: ignore[assignment]
    return model


def _spent(kept: Work | None, run: Callable[[], Spent]) -> Spent:
    """How the budget is spent, by an earlier run if it came to that."""
    held = None if kept is None else kept.bits()
    if held is not None:
        return Spent.from_dict(held)
    made = run()
    if kept is not None:
        kept.put_bits(made.to_dict())
    return made


# ---------------------------------------------------------------- what is asked for


def _steps(method: str) -> tuple[str, ...]:
    steps = tuple(method.split("+"))
    for step in steps:
        if step not in METHODS:
            known = f"there are {', '.join(METHODS)}, joined by +"
            raise TesselError(f"quantize: no method {step!r}{did_you_mean(step, METHODS)}; {known}")
    rounding = [s for s in steps if s in ("rtn", "mse", "gptq", "turboboa")]
    check(len(rounding) <= 1, lambda: f"quantize: {' and '.join(rounding)} round the same weight; choose one")
    both = {"smoothquant", "awq"} <= set(steps)
    check(not both, lambda: "quantize: smoothquant and awq scale the same channels; choose one")
    return steps


def _check_scheme(s: Scheme, steps: Sequence[str]) -> None:
    check(s.weight is not None or s.sparse, lambda: f"quantize: scheme {s.name!r} says nothing of weights")
    if s.sparse:
        few = s.weight is not None or s.activation is not None
        check(not few, lambda: f"quantize: of scheme {s.name!r}, 2:4 weights are stored whole; name 2:4 alone")
        other = [step for step in steps if step not in ("rtn", "gptq")]
        check(not other, lambda: f"quantize: {other[0]!r} says nothing of which weights are zero; rtn or gptq do")
        return
    assert s.weight is not None
    fits = s.weight.symmetric and s.weight.rows == 1 and s.weight.group != WHOLE_TENSOR
    by = " and ".join(step for step in ("gptq", "turboboa") if step in steps)
    check(
        not by or fits, lambda: f"quantize: {by} rounds symmetric formats with a scale a group or a row, not {s.name!r}"
    )


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


def _blocks(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by the numbered module that holds them (``model.layers.3``), in the model's order; others alone."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"(.*?\.\d+)\.", name)
        blocks.setdefault(found[1] if found else name, []).append(name)
    return blocks


def _put(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, made)


# ---------------------------------------------------------------- one layer


def _layer(
    name: str,
    layer: nn.Module,
    s: Scheme | None,
    steps: Sequence[str],
    seen: Seen | None,
    target: Target | None = None,
    rows: int = 1,
    shards: int = 1,
) -> tuple[QuantLinear | SparseLinear | None, LayerReport]:
    """The layer in the scheme's format, or None where it stays whole; and what became of it."""
    weight = _weight(layer)
    assert weight is not None
    dtype = weight.dtype
    weight = weight.detach().cpu()
    n, k = weight.shape
    before = sum(p.numel() * p.element_size() for p in layer.parameters())
    found = shape_of(weight)
    odd, kurtosis = tuple(outliers(found.largest)), found.kurtosis

    def whole(why: str, slower: Speed | None = None) -> tuple[None, LayerReport]:
        speed = None if slower is None else Speed(rows, slower.before, slower.before)
        how = f"left whole: {why}"
        return None, LayerReport(name, (n, k), how, None, None, odd, before, before, "", kurtosis, speed, slower)

    def too_slow(speed: Speed) -> tuple[None, LayerReport]:
        less, more = time_text(speed.before), time_text(speed.after)
        assert target is not None
        return whole(f"{rows} rows are predicted to take {more} on {target.name}, {less} as it is", speed)

    if s is None:
        return whole("the budget has room for it")
    speed = None
    if s.sparse:
        if k % (4 * shards) and shards > 1:
            return whole(f"four weights do not divide k = {k} in {shards} shards")
        if target is not None and k % 4 == 0:
            speed = Speed(rows, seconds(n, k, rows, dtype, None, target), sparse_seconds(n, k, rows, dtype, target))
            if speed.after >= speed.before:
                return too_slow(speed)
        made_sparse, row = sparse_layer(name, layer, weight, None if seen is None else seen.gram)
        return made_sparse, replace(row, speed=speed)
    format = s.weight
    assert format is not None
    for what, f in (("weight", format), ("inputs", s.activation)):
        if f is not None and f.group > 0 and k % f.group:
            return whole(f"groups of {f.group} of its {what} do not divide k = {k}")
    if why := shard_limit(n, k, format, shards):
        return whole(f"its weight cannot be cut into {shards} shards: {why}")
    if target is not None:
        own = seconds(n, k, rows, dtype, format, target, s.activation)
        speed = Speed(rows, seconds(n, k, rows, dtype, None, target), own)
        if speed.after >= speed.before:
            return too_slow(speed)
    fallback = ""
    if seen is None and any(step in _NEED_DATA for step in steps):
        fallback = "rounded to nearest: the calibration data never reaches it"
        steps = [step for step in steps if step not in _NEED_DATA]
    divisor = sign = None
    try:
        if seen is not None and "smoothquant" in steps:
            divisor = smooth_scales(seen.largest, weight)
        if seen is not None and "awq" in steps:
            divisor = awq_scales(torch.cat(seen.rows), weight, format)
        if "hadamard" in steps:
            sign = signs(k)
        ready = weight if divisor is None and sign is None else divided(weight, divisor, sign)
        h = _gram(seen, divisor, sign)
        order = _order(ready, format, shards, h) if s.ordered else None
        if order is not None:
            ready, h = ready[:, order], None if h is None else h[order][:, order]
        quantized, why = _round(ready, format, steps, h, None if seen is None else seen.outputs)
    except TesselError as e:
        raise TesselError(f"quantize: {name}: {e}") from e
    made = QuantLinear.of(layer, quantized, s.activation, divisor, sign, order)
    after = sum(t.numel() * t.element_size() for t in (*made.buffers(), *made.parameters()))
    group = k if format.group == WHOLE_ROW else format.group
    uniform = format.kind == "int" and format.symmetric and group > 0 and format.scale == "f32"
    closed = expected(format.bits, group) if uniform else None
    got, how = sqnr_of((ready[part], own) for part, own in quantized.blocks()), _words(format, s.activation)
    how += "" if order is None else ", channels in order"
    row = LayerReport(name, (n, k), how, got, closed, odd, before, after, why or fallback, kurtosis, speed)
    return made, row


def _stacks(
    model: nn.Module, s: Scheme, steps: Sequence[str], skip: Sequence[str]
) -> tuple[list[LayerReport], list[LayerReport]]:
    """Experts' matrices in the scheme's format, rounded alone: no calibration data tells them apart."""
    assert s.weight is not None
    format, own = s.weight, [step for step in steps if step == "mse"]
    more = [step for step in steps if step not in ("rtn", "mse")]
    note = f"rounded to nearest: {' and '.join(more)} of experts is not known" if more else ""
    return quantize_stacks(
        model, format, _words(format, None), lambda name: _skipped(name, skip),
        lambda one: _round(one, format, own, None, None)[0], note, s.activation,
    )  # fmt: skip


def _round(
    weight: Tensor,
    format: Format,
    steps: Sequence[str],
    h: Tensor | None,
    outputs: Tensor | None,
) -> tuple[Quantized, str]:
    """The codes, and what could not be done."""
    if ("gptq" in steps or "turboboa" in steps) and h is not None:
        note = ""
        if "turboboa" in steps:
            gain = 1.0 if outputs is None else rows_gain(outputs)
            if outputs is not None and gain >= _ROWS_MATTER:
                made = turboboa(weight, h, outputs, format)
                return made.weight, made.fallback
            note = f"by gptq: its rows hardly matter to each other ({gain:.2f} times at most)"
        done = gptq(weight, h, format)
        return done.weight, done.fallback or note
    if "mse" not in steps:
        return quantize(weight, format), ""
    tried = (quantize(weight, format, clip) for clip in _CLIPS)
    return max(tried, key=lambda q: sqnr_of((weight[part], own) for part, own in q.blocks())), ""


def _gram(seen: Seen | None, divisor: Tensor | None, sign: Tensor | None) -> Tensor | None:
    """``X^T X`` of the inputs that the weight meets, ``[k, k]`` float64; None where it was not looked at."""
    if seen is None or seen.gram is None:
        return None
    h = seen.gram
    if divisor is not None:
        h = h / divisor.double() / divisor.double()[:, None]
    return h if sign is None else divided(divided(h, None, sign).T, None, sign).double()


def _order(weight: Tensor, format: Format, shards: int, h: Tensor | None) -> Tensor | None:
    """The order of channels in which rounding errs less, by the energy of the inputs where that is known; None where it
    hardly matters: x need not be moved then. Without an order, a channel that sticks out is rounded better, alone in
    its group, and all others of the group worse: which counts is a matter of what they are multiplied by."""
    order = channel_order(weight, shards)
    size = torch.ones(weight.shape[1]) if h is None else h.diagonal().clamp(min=0).sqrt().float()

    def got(w: Tensor, by: Tensor) -> float:
        return sqnr_of((w[part] * by, own * by) for part, own in quantize(w, format).blocks())

    return order if got(weight[:, order], size[order]) >= got(weight, size) + _ORDER_MATTERS else None


def _words(weight: Format, activation: Format | None) -> str:
    group = {WHOLE_ROW: "a row", WHOLE_TENSOR: "one scale"}.get(weight.group, f"groups of {weight.group}")
    inputs = "" if activation is None else f", inputs {activation.kind}{activation.bits}"
    return f"{weight.kind}{weight.bits}, {group}{inputs}"


def _rest(model: nn.Module, left: Collection[str]) -> list[LayerReport]:
    """Parameters that no quantized layer holds, nor one of those in ``left``."""
    inside = {id(p) for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters()}
    inside |= {id(p) for name in left for p in model.get_submodule(name).parameters()}
    rows = []
    for name, p in model.named_parameters():
        if id(p) not in inside and p.dim() > 1:
            size = p.numel() * p.element_size()
            rows.append(LayerReport(name, tuple(p.shape), "as it was", None, None, (), size, size))
    return rows
