"""Pointwise operators: one result element from the operand elements at the same place.

``code`` strings get one expression per operand. In Triton a float operand is an f32 value
(f64 for f64), and names that start with ``tessel_`` are functions of
``codegen/templates/helpers.triton.j2``, to which literals must be handed as tensors of the
operand's dtype. In C++ the names in namespace ``tessel`` are in the C++ template's header.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import TesselError, check
from ..ir.nested import leaves
from ..ir.node import Op
from ..ir.types import TensorType
from .common import broadcast, need_tensor, plain, pointwise_dims, result, same_dtype, table


def _literal(x: Any, like: torch.Tensor, exact: bool) -> torch.Tensor:
    """A literal as a 0-d tensor that does not change the dtype of the result.

    ``exact`` keeps a float literal in double precision: kernels have it in f32 even
    beside f16 operands, and so has eager.
    """
    wide = exact and like.dtype.is_floating_point and like.dtype != torch.float64 and like.dim() > 0
    return torch.tensor(plain(x), dtype=torch.float64 if wide else like.dtype, device=like.device)


def lifted(fn: Callable[..., torch.Tensor], to_bool: bool = False) -> Callable[..., torch.Tensor]:
    """``fn`` over tensors, made to accept literals; the result keeps the tensors' dtype (or is bool)."""

    def ref(*args: Any, **attrs: Any) -> torch.Tensor:
        like = next(a for a in args if isinstance(a, torch.Tensor))
        got = fn(
            *(a if isinstance(a, torch.Tensor) else _literal(a, like, not to_bool) for a in args), **attrs
        )
        return got if to_bool else got.to(like.dtype)

    return ref


def infer_for(name: str, of: str, to_bool: bool) -> Callable[..., tuple[TensorType, ...]]:
    """Result type of a pointwise op. ``of``: ``any``, ``float`` (or complex), ``int`` (or bool)."""

    def infer(*args: Any) -> tuple[TensorType, ...]:
        types = list(leaves(args, TensorType))
        dtype = same_dtype(name, types)
        floating = dtype.is_floating_point or dtype.is_complex
        check(of != "float" or floating, lambda: f"{name}: {types[0]} is not floating; cast it first")
        check(of != "int" or not floating, lambda: f"{name}: {types[0]} is not an integer or bool tensor")
        for a in args:
            bad = isinstance(a, float) and not floating and (dtype == torch.bool or a != a or a % 1 != 0)
            if bad:
                raise TesselError(f"{name}: the literal {a} does not fit {types[0]}; cast the tensor first")
        return (result(broadcast(name, types), torch.bool if to_bool else dtype, args),)

    return infer


def op(
    name: str,
    ref: Callable[..., torch.Tensor],
    triton: str,
    cpp: str,
    of: str = "any",
    to_bool: bool = False,
    cost: int = 1,
    doc: str = "",
) -> Op:
    """A pointwise table entry."""
    return Op(
        name,
        "pointwise",
        dims=pointwise_dims,
        ref=lifted(ref, to_bool),
        infer=infer_for(name, of, to_bool),
        code={"triton": triton, "cpp": cpp},
        cost=cost,
        doc=doc,
    )


def _unary(name: str, triton: str, cpp: str = "", cost: int = 10, ref: Any = None) -> Op:
    """A function of one float operand."""
    return op(name, ref or getattr(torch, name), triton, cpp or f"tessel::{name}({{0}})", "float", cost=cost)


def _shift(fn: Callable[..., torch.Tensor], name: str) -> Callable[..., tuple[TensorType, ...]]:
    def infer(x: Any, by: Any) -> tuple[TensorType, ...]:
        need_tensor(name, x)
        check(not x.dtype.is_floating_point, lambda: f"{name}: {x} is not an integer tensor")
        return (result(broadcast(name, list(leaves((x, by), TensorType))), x.dtype, x, by),)

    return infer


def _where_ref(cond: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    like = a if isinstance(a, torch.Tensor) else b
    a, b = (x if isinstance(x, torch.Tensor) else _literal(x, like, False) for x in (a, b))
    return torch.where(cond, a, b)


def _where_infer(cond: Any, a: Any, b: Any) -> tuple[TensorType, ...]:
    need_tensor("where", cond)
    check(cond.dtype == torch.bool, lambda: f"where: the condition is {cond}, it must be b1")
    dtype = same_dtype("where", list(leaves((a, b), TensorType)))
    return (result(broadcast("where", list(leaves((cond, a, b), TensorType))), dtype, cond, a, b),)


def _cast_infer(x: Any, dtype: torch.dtype) -> tuple[TensorType, ...]:
    need_tensor("cast", x)
    return (result(x.shape, dtype, x),)


def _trunc_div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def _floor_div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="floor")


def _pow_ref(x: Any, y: Any) -> torch.Tensor:
    # Eager has short cuts for literal exponents (x*x for 2), which a tensor exponent would miss.
    if isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor):
        return torch.pow(x, plain(y)).to(x.dtype)
    return lifted(torch.pow)(x, y)


_ARITHMETIC = (
    op("add", torch.add, "({0} + {1})", "({0} + {1})"),
    op("sub", torch.sub, "({0} - {1})", "({0} - {1})"),
    op("mul", torch.mul, "({0} * {1})", "({0} * {1})"),
    op(
        "div",
        torch.div,
        "tessel_div({0}, {1})",
        "({0} / {1})",
        "float",
        cost=4,
        doc="true division of floats",
    ),
    op("floor_div", _floor_div, "tessel_floor_div({0}, {1})", "tessel::floor_div({0}, {1})", cost=8),
    op("trunc_div", _trunc_div, "tessel_trunc_div({0}, {1})", "tessel::trunc_div({0}, {1})", cost=8),
    op(
        "fmod",
        torch.fmod,
        "tessel_fmod({0}, {1})",
        "tessel::fmod({0}, {1})",
        cost=20,
        doc="sign of the dividend",
    ),
    op("remainder", torch.remainder, "tessel_remainder({0}, {1})", "tessel::remainder({0}, {1})", cost=20),
    replace(op("pow", torch.pow, "tessel_pow({0}, {1})", "tessel::pow({0}, {1})", cost=20), ref=_pow_ref),
    op("neg", torch.neg, "tessel_neg({0})", "(-{0})"),
    op("abs", torch.abs, "tl.abs({0})", "tessel::abs({0})"),
    op("sign", torch.sign, "tessel_sign({0})", "tessel::sign({0})"),
    op("maximum", torch.maximum, "tessel_maximum({0}, {1})", "tessel::maximum({0}, {1})", doc="NaN wins"),
    op("minimum", torch.minimum, "tessel_minimum({0}, {1})", "tessel::minimum({0}, {1})", doc="NaN wins"),
    op("relu", torch.relu, "tl.where({0} < 0, 0, {0})", "tessel::relu({0})"),
)

_FUNCTIONS = (
    _unary("exp", "tl.exp({0})"),
    _unary("exp2", "tl.exp2({0})"),
    _unary("expm1", "tessel_expm1({0})"),
    _unary("log", "tl.log({0})"),
    _unary("log2", "tl.log2({0})"),
    _unary("log10", "tessel_log10({0})"),
    _unary("log1p", "tessel_log1p({0})"),
    _unary("sqrt", "tessel_sqrt({0})", cost=4),
    _unary("rsqrt", "tl.math.rsqrt({0})", "(1 / tessel::sqrt({0}))", cost=4),
    _unary("reciprocal", "tessel_reciprocal({0})", "(1 / {0})", cost=4),
    _unary("sin", "tl.sin({0})"),
    _unary("cos", "tl.cos({0})"),
    _unary("tan", "tessel_tan({0})"),
    _unary("asin", "tessel_asin({0})"),
    _unary("acos", "tessel_acos({0})"),
    _unary("atan", "tessel_atan({0})"),
    _unary("sinh", "tessel_sinh({0})"),
    _unary("cosh", "tessel_cosh({0})"),
    _unary("tanh", "tessel_tanh({0})"),
    _unary("asinh", "tessel_asinh({0})"),
    _unary("acosh", "tessel_acosh({0})"),
    _unary("atanh", "tessel_atanh({0})"),
    _unary("erf", "tl.math.erf({0})"),
    _unary("erfc", "tessel_erfc({0})", cost=20),
    _unary("sigmoid", "tessel_sigmoid({0})", "tessel::sigmoid({0})"),
    _unary("floor", "tl.floor({0})", cost=1),
    _unary("ceil", "tl.ceil({0})", cost=1),
    _unary("round", "tessel_round({0})", "tessel::round({0})", cost=2),
    _unary("trunc", "tessel_trunc({0})", cost=1),
    op("atan2", torch.atan2, "tessel_atan2({0}, {1})", "tessel::atan2({0}, {1})", "float", cost=20),
    op("hypot", torch.hypot, "tessel_hypot({0}, {1})", "tessel::hypot({0}, {1})", "float", cost=8),
    op("copysign", torch.copysign, "tessel_copysign({0}, {1})", "tessel::copysign({0}, {1})", "float", cost=2),
)

_LOGIC = (
    op("eq", torch.eq, "({0} == {1})", "({0} == {1})", to_bool=True),
    op("ne", torch.ne, "({0} != {1})", "({0} != {1})", to_bool=True),
    op("lt", torch.lt, "({0} < {1})", "({0} < {1})", to_bool=True),
    op("le", torch.le, "({0} <= {1})", "({0} <= {1})", to_bool=True),
    op("gt", torch.gt, "({0} > {1})", "({0} > {1})", to_bool=True),
    op("ge", torch.ge, "({0} >= {1})", "({0} >= {1})", to_bool=True),
    op(
        "logical_and",
        torch.logical_and,
        "(({0} != 0) & ({1} != 0))",
        "(({0} != 0) & ({1} != 0))",
        to_bool=True,
    ),
    op(
        "logical_or",
        torch.logical_or,
        "(({0} != 0) | ({1} != 0))",
        "(({0} != 0) | ({1} != 0))",
        to_bool=True,
    ),
    op(
        "logical_xor",
        torch.logical_xor,
        "(({0} != 0) ^ ({1} != 0))",
        "(({0} != 0) != ({1} != 0))",
        to_bool=True,
    ),
    op("logical_not", torch.logical_not, "({0} == 0)", "({0} == 0)", to_bool=True),
    op("isnan", torch.isnan, "({0} != {0})", "({0} != {0})", to_bool=True),
    op("isinf", torch.isinf, "tessel_isinf({0})", "tessel::isinf({0})", to_bool=True),
    op("bitwise_and", torch.bitwise_and, "({0} & {1})", "({0} & {1})", "int"),
    op("bitwise_or", torch.bitwise_or, "({0} | {1})", "({0} | {1})", "int"),
    op("bitwise_xor", torch.bitwise_xor, "({0} ^ {1})", "({0} ^ {1})", "int"),
    op("bitwise_not", torch.bitwise_not, "tessel_bitwise_not({0})", "tessel::bitwise_not({0})", "int"),
)

_OTHER = (
    Op(
        "shift_left",
        "pointwise",
        dims=pointwise_dims,
        ref=lifted(torch.bitwise_left_shift),
        infer=_shift(torch.bitwise_left_shift, "shift_left"),
        code={"triton": "({0} << {1})", "cpp": "tessel::shift_left({0}, {1})"},
    ),
    Op(
        "shift_right",
        "pointwise",
        dims=pointwise_dims,
        ref=lifted(torch.bitwise_right_shift),
        infer=_shift(torch.bitwise_right_shift, "shift_right"),
        code={"triton": "({0} >> {1})", "cpp": "tessel::shift_right({0}, {1})"},
        doc="arithmetic for signed integers",
    ),
    Op(
        "where",
        "pointwise",
        dims=pointwise_dims,
        ref=_where_ref,
        infer=_where_infer,
        code={"triton": "tl.where({0}, {1}, {2})", "cpp": "({0} ? {1} : {2})"},
        doc="where(condition b1, a, b)",
    ),
    Op(
        "cast",
        "pointwise",
        dims=pointwise_dims,
        ref=lambda x, dtype: x.to(dtype),
        infer=_cast_infer,
        code={"triton": "{0}.to({dtype})", "cpp": "static_cast<{dtype}>({0})"},
        doc="cast(x, dtype=); code strings take {dtype} too",
    ),
    op("copy", torch.clone, "{0}", "{0}", doc="the same elements in storage of their own"),
)

ELEMENTWISE = table(_ARITHMETIC, _FUNCTIONS, _LOGIC, _OTHER)
