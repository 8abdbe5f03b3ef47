"""Let Dynamo capture ``associative_scan`` as one loop with its combine function as a region.

Away from GPUs torch opens a scan while it traces, into a tree of as many levels as the length has bits, and Dynamo
traces the combine function at each level through the Python code of ``vmap``: 10 s for the 4 layers of a Mamba model.
Under Tessel's backend it is traced as torch's ``scan`` instead, which goes on from the first element, between two
operators that mark where it begins and ends; ``scans`` then says what becomes of it. For every other backend nothing
changes. (Torch's own operator ``associative_scan`` refuses combine functions that are not pointwise.)
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.scan import scan

from . import scan_op  # noqa: F401  its operators are traced
from .compat import for_tessel, pytree

__all__ = ["register"]

# The package has a function of the module's name.
_module: Any = importlib.import_module("torch._higher_order_ops.associative_scan")
_original = _module.associative_scan
# A second function with the same code: the first is what Dynamo replaces.
_by_torch = types.FunctionType(
    _original.__code__, _original.__globals__, _original.__name__, _original.__defaults__, _original.__closure__
)
_by_torch.__kwdefaults__ = _original.__kwdefaults__


def _traced(
    combine_fn: Callable[..., Any], xs: Any, dim: int, reverse: bool = False, combine_mode: str = "pointwise"
) -> Any:
    """What Dynamo traces in place of ``associative_scan``."""
    leaves, spec = pytree.tree_flatten(xs)
    plain = for_tessel() and type(dim) is int and type(reverse) is bool and len(leaves) > 0
    plain = plain and all(isinstance(x, torch.Tensor) for x in leaves)
    plain = plain and all(-x.ndim <= dim < x.ndim and x.shape[dim] > 0 for x in leaves)
    if not plain:
        return _by_torch(combine_fn, xs, dim, reverse, combine_mode)
    dim = dim % leaves[0].ndim
    moved = [torch.movedim(x, dim, 0) for x in leaves]
    if reverse:
        moved = [torch.flip(x, [0]) for x in moved]
    if moved[0].shape[0] > 1:

        def step(carry: Any, x: Any) -> Any:
            new = combine_fn(pytree.tree_unflatten(carry, spec), pytree.tree_unflatten(x, spec))
            out = [o.clone(memory_format=torch.contiguous_format) for o in pytree.tree_leaves(new)]
            return out, [o.clone() for o in out]

        start = [torch.ops.tessel.scan_start(x) for x in moved]
        _, ys = scan(step, start, [x[1:] for x in moved])
        moved = [torch.ops.tessel.scan_result(x, y) for x, y in zip(moved, ys)]
    if reverse:
        moved = [torch.flip(x, [0]) for x in moved]
    return pytree.tree_unflatten([torch.movedim(x, 0, dim) for x in moved], spec)


def register() -> None:
    """Tell Dynamo; for the whole process. A second time does nothing."""
    if not _registered:
        _registered.append(True)
        torch.compiler.substitute_in_graph(_original, skip_signature_check=True)(_traced)


_registered: list[bool] = []
