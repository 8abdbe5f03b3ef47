"""What the combines of reduced axes mean, in plain torch: the reference for every split.

>>> import torch
>>> a, b = Part(0, 1, (), (torch.tensor(1.0),)), Part(1, 3, (), (torch.tensor(5.0),))
>>> combine("mean", [a, b], {}, 0)
tensor(4.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ..errors import check


@dataclass(frozen=True)
class Part:
    """One piece of a split axis: where it starts, its size, and the piece's operands and results."""

    start: int
    size: int
    operands: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]


Combine = Callable[[Sequence[Part], Mapping[str, Any], int], torch.Tensor]


def _fold(fn: Callable[[torch.Tensor], torch.Tensor]) -> Combine:
    """Stack the pieces' results and fold the new axis."""
    return lambda parts, attrs, i: fn(torch.stack([p.results[i] for p in parts]))


def _mean(parts: Sequence[Part], attrs: Mapping[str, Any], i: int) -> torch.Tensor:
    """Weighted by the sizes of the pieces."""
    total = sum(p.size for p in parts)
    return torch.stack([p.results[i] * (p.size / total) for p in parts]).sum(0)


# Attention over some of the keys: its output [.., s, e] and the log of its sum of exponentials [.., s].
Partial: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def merge_attention(*parts: Partial) -> Partial:
    """Attention over all keys from attention over parts of them (ring attention, split keys in decoding).

    Associative and commutative up to rounding; ``(zeros, -inf)`` is neutral, so a part that sees nothing
    changes nothing. The sum that a step of a ring keeps is the pair itself. (Liu et al., Ring Attention, 2023;
    the merge is Milakov and Gimelshein's online softmax, 2018.)

    Args:
        parts: pairs ``(out [.., s, e], lse [.., s])``, the results of the ``attention`` operator without a sink.

    Returns:
        ``(out, lse)`` in the dtypes of the first part.

    >>> one = torch.ones(1, 2), torch.zeros(1)
    >>> merge_attention(one, (3 * torch.ones(1, 2), torch.zeros(1)))
    (tensor([[2., 2.]]), tensor([0.6931]))
    """
    check(bool(parts), lambda: "merge_attention: no partial results were given")
    lse = torch.stack([part[1] for part in parts])
    merged = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - merged.masked_fill(merged == -torch.inf, 0))
    out = torch.stack([part[0].to(w.dtype) * w[..., None] for part, w in zip(parts, weights, strict=True)]).sum(0)
    return out.to(parts[0][0].dtype), merged


def _softmax_merge(parts: Sequence[Part], attrs: Mapping[str, Any], i: int) -> torch.Tensor:
    """Results (out, lse) of parts of the keys."""
    return merge_attention(*((p.results[0], p.results[1]) for p in parts))[i]


def _nll_merge(parts: Sequence[Part], attrs: Mapping[str, Any], i: int) -> torch.Tensor:
    """Results (loss, lse) of pieces of the classes: what each piece took off its lse is taken off the whole."""
    lse = torch.logsumexp(torch.stack([p.results[1] for p in parts]), 0)
    if i == 1:
        return lse
    counted = parts[0].operands[-1] != attrs.get("ignore_index", -100)  # the last operand is the target
    return torch.where(counted, lse - torch.stack([p.results[1] - p.results[0] for p in parts]).sum(0), 0)


def _arg(best: Callable[..., torch.Tensor], place: Callable[..., torch.Tensor]) -> Combine:
    """The place in the piece that has the best value, moved by where the piece starts; the first wins."""

    def fold(parts: Sequence[Part], attrs: Mapping[str, Any], i: int) -> torch.Tensor:
        dim, keepdim = attrs["dims"][0], attrs.get("keepdim", False)
        values = torch.stack([best(p.operands[0], dim, keepdim) for p in parts])
        places = torch.stack([p.results[i] + p.start for p in parts])
        return places.gather(0, place(values, 0, True))[0]

    return fold


COMBINES: dict[str, Combine] = {
    "sum": _fold(lambda x: x.sum(0).to(x.dtype)),
    "prod": _fold(lambda x: x.prod(0).to(x.dtype)),
    "max": _fold(lambda x: x.amax(0)),
    "min": _fold(lambda x: x.amin(0)),
    "any": _fold(lambda x: x.any(0)),
    "all": _fold(lambda x: x.all(0)),
    "mean": _mean,
    "logsumexp": _fold(lambda x: torch.logsumexp(x, 0)),
    "softmax-merge": _softmax_merge,
    "nll-merge": _nll_merge,
    "argmax": _arg(torch.amax, torch.argmax),
    "argmin": _arg(torch.amin, torch.argmin),
}


def combine(name: str, parts: Sequence[Part], attrs: Mapping[str, Any], i: int) -> torch.Tensor:
    """Result ``i`` of the whole from the results of the pieces, which lack the split axis.

    Args:
        name: the combine of the split factor.
        parts: the pieces, in order.
        attrs: the attributes of the node that was split.

    Raises:
        TesselError: there is no such combine (the results of a scan have the axis: ``join_scan``).
    """
    check(name in COMBINES, lambda: f"no combine {name!r} of results that lack the axis")
    return COMBINES[name](parts, attrs, i)


def join_scan(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Join running sums: each piece goes on from the last sum of the one before."""
    done: list[torch.Tensor] = []
    for piece in pieces:
        if done and done[-1].shape[dim]:
            piece = piece + done[-1].narrow(dim, done[-1].shape[dim] - 1, 1)
        done.append(piece)
    return torch.cat(done, dim)


__all__ = ["COMBINES", "Part", "Partial", "combine", "join_scan", "merge_attention"]
