"""Which kernel of the CPU a layer of packed weights gets for its number of rows, by the times that are predicted.

    way = choose(node, integers=True, floats=True, target=cpu)
    way.integers, way.why            # (True, "predicted 105 ms for 512 rows, 168 ms by floats; ...")

Each graph has its own rows, so that decoding and prefill of one model may choose differently. Where a whole weight
would be faster, ``why`` says so: what is packed stays packed, since its size may be what was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.node import Node
from ..quant.cpu_time import Product, seconds
from ..quant.report import time_text
from ..targets import Target

__all__ = ["Way", "choose"]


@dataclass(frozen=True)
class Way:
    """Whether whole numbers are multiplied, and the predicted times in words; empty where there are none."""

    integers: bool
    why: str = ""


def choose(node: Node, integers: bool, floats: bool, target: Target) -> Way:
    """The kernel of a ``packed_linear`` or ``sparse_linear``.

    Args:
        integers, floats: whether there is a kernel for products of whole numbers, and of floats.
        target: the CPU; without rates measured on it, whole numbers are multiplied wherever they can be.
    """
    product = _product(node)
    if product is None:
        return Way(integers)
    possible = {True: integers, False: floats}
    times = {w: seconds(replace(product, integers=w), target) for w, there in possible.items() if there}
    whole = seconds(Product(product.rows, product.n, product.k, product.dtype), target)
    known = {w: t for w, t in times.items() if t is not None}
    if not known or whole is None:
        return Way(integers, "the CPU's rates are not known (`tessel targets --show cpu`)" * (integers and floats))
    best = min(known, key=lambda w: known[w])
    dtype = str(product.dtype).removeprefix("torch.")
    said = f"predicted {time_text(known[best])} for {product.rows} rows"
    if (other := known.get(not best)) is not None:
        said += f", {time_text(other)} by {'floats' if best else 'whole numbers'}"
    said += f"; {time_text(whole)} if the weight were {dtype}"
    if known[best] > whole:
        said += f", which is faster: tessel.quantize(..., target='cpu', rows={product.rows}) leaves such layers whole"
    return Way(best, said)


def _product(node: Node) -> Product | None:
    """None where sizes are known only at run time."""
    x, weight, third, *more = [None if a is None else a.type for a in (*node.args, None, None, None, None)]
    rows, k = x.shape
    sparse = node.op.name == "sparse_linear"
    n = weight.shape[0]
    if not all(isinstance(size, int) for size in (rows, n, k)) or rows == 0:
        return None
    if sparse:
        return Product(rows, n, k, x.dtype, sparse=True)
    bits, zero, table = node.attrs["bits"], more[0], more[2]
    eight = bits == 8 and node.attrs.get("exponent", 0) in (4, 5)
    kind = "int" if table is None else "float" if eight else "table"
    return Product(rows, n, k, x.dtype, bits, kind, third.shape[1], zero is not None)
