"""The table of ATen targets: what each becomes in the IR.

A target that is missing here becomes an opaque call. To add one: write an entry in the file of its
family (``aten_pointwise``, ``aten_view``, ``aten_reduce``, ``aten_norm``, ``aten_index``); the
decomposition table of ``decomp.py`` then leaves the operator whole by itself.
"""

from __future__ import annotations

from . import (
    aten_fused,
    aten_index,
    aten_norm,
    aten_pointwise,
    aten_reduce,
    aten_scan,
    aten_view,
    cache_op,
    packed_experts_op,
    packed_op,
    rounding_op,
)
from .lower import Table, merge

TABLE: Table = merge(
    aten_pointwise.TABLE,
    aten_view.TABLE,
    aten_reduce.TABLE,
    aten_norm.TABLE,
    aten_index.TABLE,
    aten_scan.TABLE,
    aten_fused.TABLE,
    packed_op.TABLE,
    cache_op.TABLE,
    rounding_op.TABLE,
    packed_experts_op.TABLE,
)

__all__ = ["TABLE"]
