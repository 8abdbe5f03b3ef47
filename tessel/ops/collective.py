"""Collectives: what moves between the ranks of a mesh in the program of one rank.

The operand and the result are one rank's share. ``axes`` are the mesh axes whose ranks take part, major to
minor, ``parts`` how many those are. Who carries them out is put in from outside (``communicating``): one
process a rank over torch.distributed, or ``together`` for all ranks in one process.

Several of one kind may be one call, and a call may go on while a rank computes: ``collective_start`` gives a token,
``collective_wait`` takes it for the results. It reads the operands too, so that their memory lives until then.

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
from ..ir.node import Node, Op, Value
from ..ir.types import TensorType
from .common import along, axis, letters, need_tensor, operand_types, pointwise_dims, result, table, whole_dims, words
from .dims import divide


class Communicator(Protocol):
    """What carries collectives out: one method, called by every rank in the same order."""

    def run(self, name: str, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
        """The result of the collective operator ``name`` on this rank."""
        ...

    def start(self, name: str, xs: Sequence[torch.Tensor], attrs: Sequence[Mapping[str, Any]]) -> int:
        """Begin collectives of one kind over the same ranks as one call; the number by which they are waited for."""
        ...

    def finish(self, number: int) -> tuple[torch.Tensor, ...]:
        """Wait for a call; a result for each of its operands."""
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
        return _ranks(name, attrs).run(name, x, attrs)

    return ref


def _ranks(name: str, attrs: Mapping[str, Any]) -> Communicator:
    """Who carries collectives out.

    Raises:
        TesselError: nobody does.
    """
    by = _current.get()
    if by is None:
        raise TesselError(
            f"{name} over {', '.join(attrs.get('axes', ()))}: no ranks to talk to; run the program of one rank "
            "by tessel.distribute, under torchrun"
        )
    return by


def _start(*xs: torch.Tensor, **call: Any) -> torch.Tensor:
    attrs = [of_operand(call, i) for i in range(len(xs))]
    return torch.tensor(_ranks(call["kind"], call).start(call["kind"], xs, attrs))


def _wait(token: torch.Tensor, *xs: torch.Tensor, **call: Any) -> Any:
    found = _ranks(call["kind"], call).finish(int(token))
    return found[0] if len(found) == 1 else found


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


# ---------------------------------------------------------------- several as one call


def call_attrs(kind: str, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The attributes of ``collective_start`` and ``collective_wait`` from those of the collectives that they carry.

    >>> gathers = [{"axes": ("dp",), "parts": 2, "dim": 0}, {"axes": ("dp",), "parts": 2, "dim": 1}]
    >>> call_attrs("all_gather", gathers)["each"]
    ((('dim', 0),), (('dim', 1),))
    """
    own = tuple(tuple(sorted((k, v) for k, v in a.items() if k not in ("axes", "parts"))) for a in each)
    return {"kind": kind, "axes": tuple(each[0]["axes"]), "parts": each[0]["parts"], "each": own}


def of_operand(call: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The attributes of collective ``i`` of a call."""
    return {"axes": tuple(call["axes"]), "parts": call["parts"], **dict(call["each"][i])}


def units(node: Node) -> list[tuple[str, Value, dict[str, Any]]]:
    """The collectives that a node begins, as (operator, operand, attributes); none for other nodes."""
    if node.op.name in COLLECTIVE:
        return [(node.op.name, node.args[0], dict(node.attrs))]
    if node.op.name == "collective_start":
        return [(str(node.attrs["kind"]), x, of_operand(node.attrs, i)) for i, x in enumerate(node.args)]
    return []


def sent_of(name: str, x: Value, parts: int) -> int:
    """Bytes that one device sends for a collective of an operand whose size is known."""
    nbytes = x.type.nbytes
    check(isinstance(nbytes, int), lambda: f"{name}: the operand's size {nbytes} is not known")
    return payload(name, nbytes, parts)


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


def _start_infer(*xs: Any, kind: str, axes: Sequence[str], parts: int, each: Sequence[Any]) -> tuple[TensorType, ...]:
    """A token."""
    check(kind in COLLECTIVE, lambda: f"collective_start: {kind!r} is no collective")
    check(len(xs) == len(each) > 0, lambda: f"collective_start: {len(xs)} operands, attributes of {len(each)}")
    for x in xs:
        need_tensor("collective_start", x)
    kinds = {x.dtype for x in xs}
    check(len(kinds) == 1, lambda: f"collective_start: one call has one dtype, got {', '.join(map(str, kinds))}")
    return (result((), torch.int64, xs[0]),)


def _wait_infer(token: Any, *xs: Any, **call: Any) -> tuple[TensorType, ...]:
    """What each collective gives."""
    infer = COLLECTIVE[call["kind"]].infer
    assert infer is not None
    return tuple(infer(x, **of_operand(call, i))[0] for i, x in enumerate(xs))


CALLS = table(
    Op(
        "collective_start", "library", dims=whole_dims, ref=_start, infer=_start_infer, cost=1000, random=True,
        doc="collective_start(x, ..., kind=, axes=, parts=, each=): collectives of one kind as one call begin; a token",
    ),
    Op(
        "collective_wait", "library", dims=whole_dims, ref=_wait, infer=_wait_infer, cost=1000, random=True,
        doc="collective_wait(token, x, ..., as collective_start): the results of the call, which has read x by then",
    ),
)  # fmt: skip

__all__ = [
    "CALLS", "COLLECTIVE", "Communicator", "call_attrs", "communicating", "of_operand", "payload",
    "sent_of", "together", "units",
]  # fmt: skip
