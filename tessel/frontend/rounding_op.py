"""``tessel::rounded``: inputs rounded to small floats as they come, as an operator that no tracer opens.

    rounded(x, group, exponent, mantissa, largest, scale) -> x

Meaning as of ``ops/rounding.py``, whose reference runs here for eager. The gradient is that of x as it is (Bengio et
al., "Estimating or propagating gradients through stochastic neurons").
"""

from __future__ import annotations

from typing import Any

import torch

from ..ir.node import Value
from ..ops.rounding import rounded_ref
from .lower import Lowering, Table, register

__all__ = ["TABLE", "rounded"]

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define(
    "rounded(Tensor x, int group, int exponent, int mantissa, float largest, str scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("rounded", lambda *args: rounded_ref(*args).contiguous(), "CompositeExplicitAutograd")
torch.library.register_fake(
    "tessel::rounded", lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format), lib=_LIB
)
torch.library.register_autograd("tessel::rounded", lambda _, grad: (grad, *(None,) * 5), lib=_LIB)

rounded = torch.ops.tessel.rounded.default

TABLE: Table = {}


@register(TABLE, "tessel.rounded.default")
def _rounded(c: Lowering, x: Any, *args: Any) -> Value:
    names = ("group", "exponent", "mantissa", "largest", "scale")
    return c("rounded", x, **dict(zip(names, args, strict=True)))
