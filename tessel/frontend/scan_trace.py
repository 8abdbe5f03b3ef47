"""Let Dynamo trace ``associative_scan`` quickly where its combine function is plain arithmetic.

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

Torch calls ``combine`` through ``vmap`` at every level of the scan, and Dynamo traces each of these calls through the
Python code of ``vmap`` and of pytrees: 10 s for the 4 layers of a Mamba model. Arithmetic alone gives the same on
whole tensors as on each slice, if all tensors have one rank and one type, and then it is traced as it is: the same
operators, in seconds less. Everything else takes torch's own way.
"""

from __future__ import annotations

import dis
import importlib
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["is_arithmetic", "register"]

# The package has a function of the module's name.
_module: Any = importlib.import_module("torch._higher_order_ops.associative_scan")
_original = _module.associative_scan
# A second function with the same code: the first is what Dynamo replaces.
_by_torch = types.FunctionType(
    _original.__code__, _original.__globals__, _original.__name__, _original.__defaults__, _original.__closure__
)
_by_torch.__kwdefaults__ = _original.__kwdefaults__

_MOVES = frozenset(
    "RESUME NOP CACHE LOAD_FAST STORE_FAST UNPACK_SEQUENCE BUILD_TUPLE SWAP COPY POP_TOP RETURN_VALUE "
    "LOAD_FAST_LOAD_FAST STORE_FAST_STORE_FAST STORE_FAST_LOAD_FAST".split()
)


@torch._dynamo.assume_constant_result
def is_arithmetic(code: types.CodeType, count: int) -> bool:
    """Whether a function of two tuples only adds, subtracts and multiplies, and returns ``count`` values.

    >>> is_arithmetic((lambda a, b: (a * b, b)).__code__, 2), is_arithmetic((lambda a, b: (a @ b, b)).__code__, 2)
    (True, False)
    """
    steps = list(dis.get_instructions(code))
    plain = code.co_argcount == 2 and not code.co_kwonlyargcount and not code.co_flags & 0xC  # *args, **kwargs
    ends = [before for before, step in itertools.pairwise(steps) if step.opname == "RETURN_VALUE"]
    return (
        plain
        and not code.co_freevars
        and all(map(_allowed, steps))
        and len(ends) == 1
        and (ends[0].opname, ends[0].argval) == ("BUILD_TUPLE", count)
    )


def _allowed(step: dis.Instruction) -> bool:
    if step.opname == "BINARY_OP":
        return step.argrepr in ("+", "-", "*")
    return step.opname in _MOVES


def _scan(combine: Callable[..., Any], xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The algorithm of ``generic_associative_scan`` along dimension 0: pairs, their scan, what lies between."""
    n = xs[0].shape[0]
    if n < 2:
        return xs
    cut = torch.ops.aten.slice
    pairs = combine(tuple([cut(x, 0, 0, -1, 2) for x in xs]), tuple([cut(x, 0, 1, None, 2) for x in xs]))
    odd = _scan(combine, pairs)
    left = tuple([cut(e, 0, 0, -1) for e in odd]) if n % 2 == 0 else odd
    first = tuple([cut(x, 0, 0, 1) for x in xs])
    even = first
    if n > 2:
        between = combine(left, tuple([cut(x, 0, 2, None, 2) for x in xs]))
        even = tuple([torch.cat([f, b]) for f, b in zip(first, between)])
    return tuple([_module._interleave(a, b, dim=0) for a, b in zip(even, odd)])


def _traced(
    combine_fn: Callable[..., Any], xs: Any, dim: int, reverse: bool = False, combine_mode: str = "pointwise"
) -> Any:
    """What Dynamo traces in place of ``associative_scan``."""
    plain = combine_mode == "generic" and type(dim) is int and type(reverse) is bool and type(xs) is tuple
    if plain and isinstance(combine_fn, types.FunctionType) and len(xs) > 0:
        plain = all(isinstance(x, torch.Tensor) for x in xs) and is_arithmetic(combine_fn.__code__, len(xs))
        plain = plain and all(x.shape == xs[0].shape and x.dtype == xs[0].dtype for x in xs)
        plain = plain and -xs[0].ndim <= dim < xs[0].ndim and xs[0].shape[dim] > 0
    else:
        plain = False
    if not plain:
        return _by_torch(combine_fn, xs, dim, reverse, combine_mode)
    moved = tuple([torch.movedim(x, dim, 0) for x in xs])
    if reverse:
        moved = tuple([torch.flip(x, [0]) for x in moved])
    out = _scan(combine_fn, moved)
    if reverse:
        out = tuple([torch.flip(x, [0]) for x in out])
    return tuple([torch.movedim(x, 0, dim) for x in out])


def register() -> None:
    """Tell Dynamo; for the whole process, whoever compiles. A second time does nothing."""
    if not _registered:
        _registered.append(True)
        torch.compiler.substitute_in_graph(_original, skip_signature_check=True)(_traced)


_registered: list[bool] = []
