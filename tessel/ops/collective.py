"""Collectives: what moves between the ranks of a mesh in the program of one rank.

The operand and the result are one rank's share. ``axes`` are the mesh axes whose ranks take part, major to
minor, ``parts`` how many those are. Who carries them out is put in from outside (``communicating``): one
process a rank over torch.distributed, or ``together`` for all ranks in one process.

Bytes are counted per device, as what it sends: all-gather ``(n-1)L``, reduce-scatter and all-to-all
``L(n-1)/n``, all-reduce ``2L(n-1)/n``, permute ``L``, with L the bytes of the operand (the ring algorithms'
volume, Chan et al., "Collective communication: theory, practice, and experience", 2007).

>>> payload("all_reduce", 1024, 4), payload("all_gather", 1024, 4)
(1536, 3072)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from ..errors import TesselError, check
from ..ir.node import Node, Op
from ..ir.types import TensorType
from .common import along, axis, letters, need_tensor, operand_types, pointwise_dims, result, table, words
from .dims import divide


class Communicator(Protocol):
    """What carries collectives out: one method, called by every rank in the same order."""

    def run(self, name: str, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
        """The result of the collective operator ``name`` on this rank."""
        ...


_current: ContextVar[Communicator | None] = ContextVar("tessel_communicator", default=None)


@contextmanager
def communicating(by: Communicator) -> Iterator[None]:
    """Collectives inside are carried out by ``by``."""
    token = _current.set(by)
    try:
        yield
    finally:
        _current.reset(token)


def _ref(name: str) -> Callable[..., torch.Tensor]:
    def ref(x: torch.Tensor, **attrs: Any) -> torch.Tensor:
        by = _current.get()
        if by is None:
            raise TesselError(
                f"{name} over {', '.join(attrs.get('axes', ()))}: no ranks to talk to; run the program of one rank "
                "by tessel.distribute, under torchrun"
            )
        return by.run(name, x, attrs)

    return ref


# ---------------------------------------------------------------- all ranks at once: the reference


def together(name: str, xs: Sequence[torch.Tensor], attrs: Mapping[str, Any]) -> list[torch.Tensor]:
    """What each rank of one group gets, from what each gave, in the group's order: the definition."""
    return _TOGETHER[name](list(xs), attrs)


def _combined(xs: list[torch.Tensor], how: str) -> torch.Tensor:
    if how == "sum":
        return torch.stack(xs).sum(0).to(xs[0].dtype)
    return torch.stack(xs).amax(0) if how == "max" else torch.stack(xs).amin(0)


def _all_reduce(xs: list[torch.Tensor], a: Mapping[str, Any]) -> list[torch.Tensor]:
    return [_combined(xs, a["combine"])] * len(xs)


def _all_gather(xs: list[torch.Tensor], a: Mapping[str, Any]) -> list[torch.Tensor]:
    return [torch.cat(xs, a["dim"])] * len(xs)


def _reduce_scatter(xs: list[torch.Tensor], a: Mapping[str, Any]) -> list[torch.Tensor]:
    return list(_combined(xs, a["combine"]).chunk(len(xs), a["dim"]))


def _all_to_all(xs: list[torch.Tensor], a: Mapping[str, Any]) -> list[torch.Tensor]:
    cut = [x.chunk(len(xs), a["split"]) for x in xs]
    return [torch.cat([c[i] for c in cut], a["join"]) for i in range(len(xs))]


def _permute(xs: list[torch.Tensor], a: Mapping[str, Any]) -> list[torch.Tensor]:
    return [xs[source] for source in a["sources"]]


_TOGETHER: dict[str, Callable[[list[torch.Tensor], Mapping[str, Any]], list[torch.Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "collective_permute": _permute,
}


# ---------------------------------------------------------------- bytes


def payload(name: str, local_bytes: int, parts: int) -> int:
    """Bytes that one device sends, by the formulas in this file's head.

    Args:
        name: the collective operator.
        local_bytes: of its operand on one rank.
        parts: how many ranks take part.
    """
    if parts == 1:
        return 0
    if name == "all_gather":
        return local_bytes * (parts - 1)
    if name == "collective_permute":
        return local_bytes
    times = 2 if name == "all_reduce" else 1
    return times * local_bytes * (parts - 1) // parts


def payload_of(node: Node) -> int:
    """Bytes that one device sends for a node of a program of one rank; 0 for what is no collective."""
    if node.op.name not in COLLECTIVE:
        return 0
    nbytes = node.args[0].type.nbytes
    check(isinstance(nbytes, int), lambda: f"{node.op.name}: the operand's size {nbytes} is not known")
    return payload(node.op.name, nbytes, node.attrs["parts"])


# ---------------------------------------------------------------- table


def _same(x: Any, **attrs: Any) -> tuple[TensorType, ...]:
    need_tensor("collective", x)
    return (result(x.shape, x.dtype, x),)


def _scaled(x: Any, **sizes: tuple[int, int, int]) -> tuple[TensorType, ...]:
    """The operand's type with dimensions multiplied and divided: ``name=(dim, times, by)``."""
    shape = list(x.shape)
    for name, (dim, times, by) in sizes.items():
        d = axis(name, dim, x.rank)
        shape[d] = divide(shape[d] * times, by)
    return (result(shape, x.dtype, x),)


def _gather_infer(x: Any, axes: Sequence[str], parts: int, dim: int) -> tuple[TensorType, ...]:
    need_tensor("all_gather", x)
    return _scaled(x, all_gather=(dim, parts, 1))


def _scatter_infer(x: Any, axes: Sequence[str], parts: int, dim: int, combine: str = "sum") -> tuple[TensorType, ...]:
    need_tensor("reduce_scatter", x)
    return _scaled(x, reduce_scatter=(dim, 1, parts))


def _exchange_infer(x: Any, axes: Sequence[str], parts: int, split: int, join: int) -> tuple[TensorType, ...]:
    need_tensor("all_to_all", x)
    return _scaled(x, split=(split, 1, parts), join=(join, parts, 1))


def _held(*names: str) -> Callable[[Node], str]:
    """The dimensions that attributes name stay whole, and have another size in the result."""

    def dims(node: Node) -> str:
        (x,) = operand_types(node)
        held = {axis(node.op.name, node.attrs[n], x.rank) for n in names}
        plain = letters(x.rank)
        return words(*([[w + mark if d in held else w for d, w in enumerate(plain)]] for mark in ("*", "2*")))

    return dims


def _entry(name: str, dims: Any, infer: Any, doc: str) -> Op:
    # "random" for what it promises: passes neither reorder nor merge them, so that every rank calls them in one order
    return Op(name, "library", dims=dims, ref=_ref(name), infer=infer, cost=1000, random=True, doc=doc)


COLLECTIVE = table(
    _entry(
        "all_reduce", pointwise_dims, _same, "all_reduce(x, axes=, parts=, combine=): the sum (max, min) on every rank"
    ),
    _entry("all_gather", _held("dim"), _gather_infer, "all_gather(x, axes=, parts=, dim=): the shares joined"),
    _entry(
        "reduce_scatter",
        _held("dim"),
        _scatter_infer,
        "reduce_scatter(x, axes=, parts=, dim=, combine=): a share of the sum",
    ),
    _entry(
        "all_to_all",
        _held("split", "join"),
        _exchange_infer,
        "all_to_all(x, axes=, parts=, split=, join=): split along one dim becomes split along another",
    ),
    _entry(
        "collective_permute",
        lambda node: along(node, ()),
        _same,
        "collective_permute(x, axes=, parts=, sources=): rank i of the group gets what rank sources[i] has",
    ),
)

__all__ = ["COLLECTIVE", "Communicator", "communicating", "payload", "payload_of", "together"]
