"""Layers of experts whose inputs are rounded too: to integers, so that whole numbers may be multiplied, or to floats.

The code of such a module says nothing of rounding, and what its first product is given lies inside. So its code is
replaced by ``tessel::packed_experts``, where both are shown to be the same: a few tokens are sent through each, with
the matrices as they are stored. A module that computes something else keeps its code, and its inputs whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..frontend.packed_experts_op import packed_experts
from ..ops.experts import ACTS, experts_ref
from .formats import WHOLE_ROW, Format

__all__ = ["ExpertInputs", "inputs_of"]

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_FAR = {torch.float32: 1e-4, torch.float64: 1e-4}
_FAR_OF_HALVES = 3e-2  # two orders of operations; another activation is farther off
_Act = tuple[str, bool, float, float]


class ExpertInputs:
    """Puts ``tessel::packed_experts`` in the place of modules' code, as far as it is the same.

    What a class computes is looked at once for each of its configurations.
    """

    def __init__(self, format: Format | None) -> None:
        """Args: format: what inputs are rounded to, None: they stay whole."""
        self.format = format
        self._known: dict[Any, _Act | str] = {}

    def put(self, module: nn.Module) -> str:
        """Let a module, whose matrices are stacks, round its inputs; why it does not, or empty."""
        f = self.format
        if f is None:
            return ""
        if f.kind == "codebook" or (f.kind == "int" and not (f.group == WHOLE_ROW and f.symmetric)):
            return "its inputs stay whole: experts round them to integers a row, or to small floats"
        key = (type(module).__mro__[1], getattr(module, "act_fn", None).__class__, *_numbers(module))
        if key not in self._known:
            self._known[key] = _what(module)
        act = self._known[key]
        if isinstance(act, str):
            return f"its inputs stay whole: {act}"
        odd = next((s.k for s in _stacks(module) if f.group > 0 and s.k % f.group), 0)
        if odd:
            return f"its inputs stay whole: groups of {f.group} do not divide k = {odd}"
        own: Any = module
        own.packed_attrs = (f, act)
        kind: Any = type(module)
        module.__class__ = _rounding(kind)
        return ""


def inputs_of(module: nn.Module) -> Format | None:
    """What a module of experts rounds its inputs to."""
    held: Any = getattr(module, "packed_attrs", None)
    return None if held is None else held[0]


def _numbers(module: Any) -> tuple[float, float]:
    """``alpha`` and ``limit`` of GPT-OSS's activation."""
    alpha, limit = (getattr(module, name, 0.0) for name in ("alpha", "limit"))
    known = isinstance(alpha, int | float) and isinstance(limit, int | float)
    return (float(alpha), float(limit)) if known else (0.0, 0.0)


def _stacks(module: nn.Module) -> tuple[Any, Any]:
    return getattr(module, f"{_GATE_UP}_stack", None), getattr(module, f"{_DOWN}_stack", None)


def _what(module: Any) -> _Act | str:
    """What a module does between its products, or why it is not known."""
    up, down = _stacks(module)
    if up is None or down is None:
        return f"it has no stacks {_GATE_UP} and {_DOWN}"
    if up.format.bits != down.format.bits:
        return "its stacks differ in bits"
    (experts, _, _), k, device = up.words.shape, up.k, up.words.device
    made = torch.Generator().manual_seed(0)
    choices = min(2, experts)
    x = torch.randn(3, k, generator=made).to(device, up.dtype)
    index = torch.stack([torch.arange(choices), torch.arange(choices).flip(0), torch.arange(choices)]).to(device)
    weights = torch.rand(3, choices, generator=made).to(device, up.dtype)
    with torch.no_grad():
        try:
            want = module(x, index, weights)
        except Exception as e:  # whatever a library's code raises: it is then not what is known
            return f"it cannot be tried: {type(e).__name__}: {' '.join(str(e).split())[:120]}"
        matrices = [getattr(module, n)[:choices] for n in (_GATE_UP, _DOWN)]
        biases = [None if b is None else b[:choices] for b in _biases(module)]
        far, best = float("inf"), ("silu", False, 1.0, 0.0)
        for act in _acts(module):
            operands = (x, matrices[0], biases[0], matrices[1], biases[1], index, weights)
            if up.turned != down.turned or not isinstance(want, Tensor) or want.shape != x.shape:
                break
            got = experts_ref(*operands, act[0], act[1], up.turned, act[2], act[3])[0]
            error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-20))
            far, best = min((far, best), (error, act))
    if not far <= _FAR.get(up.dtype, _FAR_OF_HALVES):
        return f"its code computes something else, {far:.2g} of the largest result apart at best"
    return best


def _acts(module: Any) -> Iterator[_Act]:
    alpha, limit = _numbers(module)
    for interleaved in (False, True):
        for act in ACTS:
            if act != "limited":
                yield act, interleaved, 1.0, 0.0
            elif limit > 0:
                yield act, interleaved, alpha, limit


def _biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    return getattr(module, f"{_GATE_UP}_bias", None), getattr(module, f"{_DOWN}_bias", None)


@cache
def _rounding(base: Any) -> type:
    """A class like ``base`` whose inputs are rounded."""
    return type(base.__name__, (base,), {"__module__": base.__module__, "forward": _forward})


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    given, act = self.packed_attrs
    whole = given.kind == "int"
    floats = [] if whole else [given.group, given.exponent, given.mantissa, given.largest]
    up, down = _stacks(self)
    f, x = up.format, hidden_states.reshape(-1, up.k)
    bias, down_bias = _biases(self)
    out = packed_experts(
        x, up.words, up.scale, up.zero, bias, up.table, down.words, down.scale, down.zero, down_bias, down.table,
        top_k_index.reshape(x.shape[0], -1), top_k_weights.reshape(x.shape[0], -1), f.bits,
        given.bits if whole else 0, f.exponent if f.kind == "float" else 0, *act, floats, "" if whole else given.scale,
    )  # fmt: skip
    return out.reshape(hidden_states.shape)
