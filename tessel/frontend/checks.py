"""``tessel::check_classes``: the error eager gives for a class number that a loss has no class for.

A loss compares its targets with every class, so that a number outside of them would select nothing and
count as a loss of zero. This operator raises first, as eager does on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define(
    "check_classes(Tensor target, SymInt classes, SymInt ignore) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_classes(target: Tensor, classes: int, ignore: int) -> None:
    wrong = (target != ignore) & ((target < 0) | (target >= classes))
    if wrong.any():
        raise IndexError(f"Target {target[wrong].flatten()[0].item()} is out of bounds.")


_LIB.impl("check_classes", _check_classes, "CPU")
torch.library.register_fake("tessel::check_classes", lambda target, classes, ignore: None, lib=_LIB)

check_classes = torch.ops.tessel.check_classes.default

__all__ = ["check_classes"]
