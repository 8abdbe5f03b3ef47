"""Which kernel of the CPU a layer of packed weights gets for its number of rows, by the times that are predicted.

    way = choose(node, integers=True, floats=True, target=cpu)
    way.integers(512), way.why          # True, "predicted 105 ms for 512 rows, 168 ms by floats; ..."

Each graph has its own rows, so that decoding and prefill of one model may choose differently; where a graph serves any
number of them, each call chooses. Where a whole weight would be faster, ``why`` says so: what is packed stays packed,
since its size may be what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..ir.node import Node
from ..quant.cpu_time import Product, seconds
from ..quant.report import time_text
from ..targets import Target

__all__ = ["Way", "choose"]

_SHOWN = (1, 16, 512)  # rows whose times are told where any number may come


@dataclass(frozen=True)
class Way:
    """Whether whole numbers are multiplied, by the number of rows, and the predicted times in words.

    Attributes:
        integers: of a number of rows.
        known: the rows, where they are known when the graph is compiled.
        why: empty where nothing is predicted.
    """

    integers: Callable[[int], bool]
    known: int | None = None
    why: str = ""


def choose(node: Node, integers: bool, floats: bool, target: Target) -> Way:
    """The kernel of a ``packed_linear`` or ``sparse_linear``.

    Args:
        integers, floats: whether there is a kernel for products of whole numbers, and of floats.
        target: the CPU; without rates measured on it, whole numbers are multiplied wherever they can be.
    """
    product, rows = _product(node)
    if product is None or seconds(product, target) is None:
        unknown = "the CPU's rates are not known (`tessel targets --show cpu`)"
        return Way(lambda _: integers, rows, unknown * (product is not None and integers and floats))

    @lru_cache(maxsize=256)
    def times(rows: int) -> dict[bool, float]:
        """Predicted seconds by whether whole numbers are multiplied, shortest first."""
        made = {w: replace(product, rows=rows, integers=w) for w, there in ((True, integers), (False, floats)) if there}
        found = {w: s for w, p in made.items() if (s := seconds(p, target)) is not None}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def told(rows: int) -> str:
        by = {True: "whole numbers", False: "floats"}
        (best, least), *others = times(rows).items()
        whole = seconds(Product(rows, product.n, product.k, product.dtype), target) or least
        dtype = str(product.dtype).removeprefix("torch.")
        said = f"predicted {time_text(least)} for {rows} rows" + (f" by {by[best]}" if others else "")
        said += "".join(f", {time_text(s)} by {by[w]}" for w, s in others) + f", {time_text(whole)} whole in {dtype}"
        if least <= whole:
            return said
        return f"{said}, which is faster: tessel.quantize(..., target='cpu', rows={rows}) leaves such layers whole"

    why = "; ".join(told(r) for r in ((rows,) if rows is not None else _SHOWN))
    return Way(lambda r: next(iter(times(r))), rows, why)


def _product(node: Node) -> tuple[Product | None, int | None]:
    """What is multiplied, of one row where their number is known only at run time, and that number; None where other
    sizes are not known."""
    types: list[Any] = [None if a is None else a.type for a in (*node.args, None, None, None, None)]
    x, weight, third, *more = types
    (rows, k), n = x.shape, weight.shape[0]
    held = rows if isinstance(rows, int) else None
    if not (isinstance(n, int) and isinstance(k, int)) or held == 0:
        return None, held
    if node.op.name == "sparse_linear":
        return Product(held or 1, n, k, x.dtype, sparse=True), held
    bits, zero, table = node.attrs["bits"], more[0], more[2]
    eight = bits == 8 and node.attrs.get("exponent", 0) in (4, 5)
    kind = "int" if table is None else "float" if eight else "table"
    return Product(held or 1, n, k, x.dtype, bits, kind, third.shape[1], zero is not None), held
