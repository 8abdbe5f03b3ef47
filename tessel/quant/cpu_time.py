"""How long products with weights of few bits take on a CPU whose rates were measured (``tessel targets --show cpu``).

    product_seconds(Product(512, 8192, 8192, torch.bfloat16, bits=4, groups=64), rates, 512)

The kernels (``templates/packed.hpp``, ``int8.hpp``, ``sparse.hpp``) have three forms, by the number of rows:

    few      numbers are made of codes in registers, again for every few rows; reading hides behind that, or that
             behind reading: the longer of the two counts
    columns  few rows of a format that has no such kernel: columns are written out once, then multiplied
    panels   many rows: a panel of columns is unpacked once for up to 1024 rows, then multiplied at the rate of whole
             numbers of its type

Arithmetic is counted in lane operations: one of a vector of float32 is as many as the vector has lanes, and the CPU
does half as many a second as it does float32 operations in multiply-adds. The counts are fitted to measurements, see
``_COST``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..targets import HostRates, Target, get_target, host_measured
from ..targets.host import vector_bits
from .formats import Format

__all__ = ["Product", "of_format", "product_seconds", "seconds"]

_FEW, _FEW_INTEGERS, _HIGH = 24, 16, 1024  # rows: of packed.hpp and int8.hpp, and that share a panel
_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclass(frozen=True)
class Product:
    """``[rows, k] x [n, k]^T`` with a weight as it is stored.

    Attributes:
        dtype: of the inputs.
        bits: of a code; 0: the weight is whole.
        kind: ``int``, ``float`` (8 bits, taken apart by their bits) or ``table``.
        groups: that a row of the weight has.
        zero: whether groups have zero points.
        integers: inputs are rounded to 8 bits and whole numbers multiplied.
        sparse: two of four are stored, whole; bits are 0.
    """

    rows: int
    n: int
    k: int
    dtype: torch.dtype
    bits: int = 0
    kind: str = "int"
    groups: int = 1
    zero: bool = False
    integers: bool = False
    sparse: bool = False

    @property
    def stored_bytes(self) -> float:
        """Of the weight."""
        if self.sparse:
            return self.n * self.k * (self.dtype.itemsize / 2 + 1 / 8)
        if not self.bits:
            return self.n * self.k * self.dtype.itemsize
        return 4.0 * self.n * (-(-self.k // (32 // self.bits)) + self.groups * (1 + self.zero))

    def form(self, lanes: int) -> str:
        """``whole``, ``few``, ``columns`` or ``panels`` on a CPU with vectors of so many float32."""
        if not self.bits and not self.sparse:
            return "whole"
        most = _FEW_INTEGERS if self.integers else _FEW
        if self.rows > most:
            return "panels"
        if self.sparse or not self.by_words:
            return "panels" if self.integers else "columns"
        chunk = lanes * 32 // self.bits
        group = self.k // self.groups
        fits = (self.integers and self.groups == 1) or group % chunk == 0 or chunk in (2 * group, 4 * group)
        fits = fits or (chunk == 8 * group and self.bits <= 4 and not self.integers)
        return "few" if fits and self.k % chunk == 0 else "panels" if self.integers else "columns"

    @property
    def by_words(self) -> bool:
        """Whether codes are taken out of whole vectors of words."""
        return self.bits > 0 and 8 % self.bits == 0 and not (self.kind == "table" and self.bits == 8)


# Lane operations an element of the weight; `round`: of the inputs; `group`: of results, for each group; `reach`:
# of the rate in registers that a product reaches.
_COST = {
    "decode": 2.0, "decode_integers": 0.6, "dot": 0.5, "columns": 12.0, "panel": 1.5, "written": 12.0,
    "pack": 0.5, "pack_integers": 1.0, "round": 4.0, "group": 4.0, "reach": 0.75, "start": 5e-6,
}  # fmt: skip


def product_seconds(p: Product, rates: HostRates, bits: int) -> float:
    """The predicted time of a product.

    Args:
        p: what is multiplied.
        rates: of the CPU.
        bits: of its vectors.
    """
    c, lane = _COST, rates.flops["f32"] / 2
    width = max(4, bits // 32)
    elements, results = float(p.n * p.k), float(p.rows * p.n)
    # of CPUs that have no products of bf16, packing widens them
    rate = rates.flops.get(_NAMES.get(p.dtype, "f32"), rates.flops["f32"])
    read = p.stored_bytes / rates.read_bytes_per_s
    moved = (p.rows * p.k + results) * p.dtype.itemsize / rates.read_bytes_per_s
    if p.integers:
        rate = 4 * rates.flops["f32"]
    products, form = 2 * results * p.k / (rate * c["reach"]), p.form(width)
    blocks = -(-p.rows // _HIGH)
    start = c["start"] + moved
    if p.integers:
        start += p.rows * p.k * c["round"] / lane
        if p.groups > 1:
            products += results * p.groups * c["group"] / lane
    if form == "whole":
        few = p.rows <= _FEW // 3
        return start + (max(read, products) if few else max(read, blocks * elements * c["pack"] / lane) + products)
    if form == "few":
        together = (4 if p.groups == 1 else 2) if p.integers else 2
        decode = -(-p.rows // together) * elements * c["decode_integers" if p.integers else "decode"]
        return start + max(read, (decode + p.rows * elements * c["dot"] * (0.5 if p.integers else 1)) / lane)
    if form == "columns":
        return start + max(read, elements * (c["columns"] + p.rows * c["dot"]) / lane)
    unpack = c["pack_integers"] if p.integers else c["panel"] if p.by_words else c["written"]
    return start + blocks * max(read, elements * unpack / lane) + products


def of_format(rows: int, n: int, k: int, dtype: torch.dtype, format: Format | None, inputs: Format | None) -> Product:
    """A layer's product, by its formats."""
    if format is None:
        return Product(rows, n, k, dtype)
    groups = k // format.group if format.group > 0 else 1
    eight = format.kind == "float" and format.bits == 8
    kind = "int" if format.kind == "int" else "float" if eight else "table"
    whole = inputs is not None and inputs.kind == "int" and inputs.bits == 8 and inputs.group == 0
    integers = whole and format.kind == "int" and (groups == 1 or k // groups % 4 == 0)
    zero = format.kind == "int" and not format.symmetric
    return Product(rows, n, k, dtype, format.bits, kind, groups, zero, integers)


def seconds(p: Product, target: Target | None = None) -> float | None:
    """``product_seconds`` on this CPU; None where its rates are not known."""
    rates = host_measured()
    cpu = get_target("cpu") if target is None else target
    return None if rates is None or "f32" not in rates.flops else product_seconds(p, rates, vector_bits(cpu) or 128)
