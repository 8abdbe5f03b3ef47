"""How long products with weights of few bits take on a CPU whose rates were measured (``tessel targets --show cpu``).

    product_seconds(Product(512, 8192, 8192, torch.bfloat16, bits=4, groups=64), rates, 512)

The kernels (``packed.hpp``, ``packed_odd.hpp``, ``int8.hpp`` and ``sparse.hpp`` of ``codegen/templates``) have three
forms, by the number of rows:

    few      numbers are made of codes in registers, again for every few rows; reading hides behind that, or that
             behind reading: the longer of the two counts
    panels   a panel of columns is unpacked once for up to 1024 rows, then multiplied at the rate of whole numbers of
             its type
    columns  2:4 and few rows: columns are written out, then multiplied

Arithmetic is counted in lane operations: one of a vector of float32 is as many as the vector has lanes, and the CPU
does half as many a second as it does float32 operations in multiply-adds. The counts are fitted to measurements, see
``_COST``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..targets import HostRates, Target, get_target, host_measured
from ..targets.host import TILES, vector_bits
from .formats import Format

__all__ = ["Product", "of_format", "product_seconds", "seconds"]

_COLUMNS, _INTEGERS, _HIGH = 24, 16, 1024  # rows: of few columns, of few whole numbers, and that share a panel
_DOTS = 24  # rows of dot products (few of codegen/cpp/gemm.py)
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
        if self.sparse or (self.kind == "table" and self.bits > 4):
            return "columns" if self.rows <= _COLUMNS else "panels"
        if self.kind == "int" and not self.integers and 8 % self.bits:
            return "few" if self.rows <= 10 and -(-self.k // (32 // self.bits)) >= lanes else "panels"
        chunk, group = lanes * 32 // self.bits, self.k // self.groups
        scales = 1 if group % chunk == 0 else chunk // group if chunk % group == 0 else 0
        if self.integers:
            fits, most = self.groups == 1 or scales in (1, 2, 4), _INTEGERS
        else:
            fits = scales in (1, 2, 4) or (scales == 8 and self.bits <= 4)
            most = 4 if scales > 2 else 10 if self.kind == "int" and self.bits < 8 else 6
        return "few" if fits and 8 % self.bits == 0 and self.k % chunk == 0 and self.rows <= most else "panels"


# Lane operations an element of the weight; `round`: of the inputs; `group`: of results, for each group; `reach`: of the
# rates in registers. Fitted to seconds of CPU time of one thread, 2048 x 2048 bf16, 1 to 512 rows, on an AMD Zen 5
# (AVX-512 with bf16 and int8 products), 2026-11-21: within a fifth there, and a third for 1 to 4 rows of tables.
# `reach_tiles`: 1024 rows, 768 to 3072, on a Granite Rapids, 2026-11-23, as benchmarks/gemm.py has it.
# `read`: of the bandwidth of a plain sum, from benchmarks/results/quant-2026-11-21.json, a layer 8192 wide in bf16.
_COST = {
    "decode": 2.9, "decode_eight": 5.0, "decode_table": 4.2, "decode_short": 7.6, "decode_odd": 3.6,
    "decode_integers": 1.0, "decode_integers_row": 2.0, "dot_integers": 0.37, "columns": 10.0, "dot": 1.1, "panel": 7.0,
    "panel_eight": 12.0, "panel_table": 9.0, "panel_odd": 15.0, "written": 14.0, "written_table": 70.0, "pack": 8.0,
    "pack_integers": 3.0, "pack_integers_groups": 8.0, "round": 2.0, "group": 7.0, "reach": 0.87,
    "reach_integers": 0.76, "reach_tiles": 0.33, "read": 0.6, "start": 5e-6,
}  # fmt: skip


def product_seconds(p: Product, rates: HostRates, bits: int) -> float:
    """The predicted time of a product.

    Args:
        p: what is multiplied.
        rates: of the CPU.
        bits: of its vectors.
    """
    c, lane = _COST, rates.flops["f32"] / 2
    elements, results = float(p.n * p.k), float(p.rows * p.n)
    bandwidth, form, blocks = c["read"] * rates.read_bytes_per_s, p.form(max(4, bits // 32)), -(-p.rows // _HIGH)
    read = p.stored_bytes / bandwidth
    start = c["start"] + (p.rows * p.k + results) * p.dtype.itemsize / bandwidth
    if p.integers:
        products = 2 * results * p.k / (2 * _rate(p, rates) * c["reach_integers"])
        start += p.rows * p.k * c["round"] / lane
        if p.groups > 1:
            products += results * p.groups * c["group"] / lane
    else:
        tiles = rates.flops.get(TILES, 0.0) if p.dtype == torch.bfloat16 and p.rows > _DOTS else 0.0
        products = 2 * results * p.k / (tiles * c["reach_tiles"] if tiles else _rate(p, rates) * c["reach"])
    if form == "few":
        if p.integers:
            name, together = ("decode_integers_row", 4) if p.groups == 1 else ("decode_integers", 2)
            each = -(-p.rows // together) * c[name] + p.rows * c["dot_integers"]
        else:
            each = -(-p.rows // 2) * c[_decoding(p)]
        return start + max(read, elements * each / lane)
    if form == "columns":
        made = c["columns"] if p.sparse else c["written_table"]
        return start + max(read, elements * (made + p.rows * c["dot"]) / lane)
    if form == "whole" and p.rows <= 8:
        return start + max(read, products)
    return start + blocks * max(read, elements * c[_unpacking(p)] / lane) + products


def _rate(p: Product, rates: HostRates) -> float:
    """Of products of floats; those of whole numbers are twice as many in an instruction. CPUs without products of bf16
    widen them."""
    return rates.flops.get(_NAMES.get(p.dtype, "f32"), rates.flops["f32"])


def _decoding(p: Product) -> str:
    """What numbers in registers cost, by its name in ``_COST``."""
    if p.kind == "int" and 8 % p.bits:
        return "decode_odd"
    if p.k // p.groups * p.bits <= 128:
        return "decode_short"
    return "decode_table" if p.kind == "table" else "decode_eight" if p.bits == 8 else "decode"


def _unpacking(p: Product) -> str:
    """What making a panel costs, by its name in ``_COST``."""
    if p.integers:
        return "pack_integers" if p.bits == 8 else "pack_integers_groups"
    if p.sparse:
        return "written"
    if not p.bits:
        return "pack"
    if p.kind == "table":
        return "panel_table" if p.bits <= 4 else "written_table"
    return "panel_odd" if 8 % p.bits else "panel_eight" if p.kind == "float" else "panel"


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
