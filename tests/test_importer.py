"""Every ATen target on small tensors: traced, imported, evaluated, and equal to torch."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate import run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tessel.frontend.aten import TABLE
from tessel.frontend.importer import Imported, import_graph
from tessel.frontend.special import SPECIAL
from tessel.ops.library import torch_op

DATA = Path(__file__).parent / "data" / "aten_ops.json"
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
i64, i32, b1 = torch.int64, torch.int32, torch.bool


def T(*shape: int, dtype: torch.dtype = f32, low: float = -2.0) -> torch.Tensor:
    """A small random tensor; positive from ``low`` on for floats."""
    g = torch.Generator().manual_seed(sum(shape) + 7)
    if dtype == b1:
        return torch.rand(shape, generator=g) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(int(low), 5, shape, generator=g, dtype=dtype)
    return (torch.rand(shape, generator=g, dtype=f64) * 3 + low).to(dtype)


def P(*shape: int, **kw: Any) -> torch.Tensor:
    return T(*shape, low=0.25, **kw)


def J(*shape: int, n: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, n, shape, generator=g)


CPU = torch.device("cpu")
_LN = (T(2, 3, 4), [4], T(4), T(4))
_LN_STATS = (torch.zeros(2, 3, 1), torch.ones(2, 3, 1))
_BN = (T(4, 3, 2), T(3), T(3))

# target, arguments. Whatever is a tensor is an input of the traced graph.
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []


def case(target: str, *args: Any, **kwargs: Any) -> None:
    CASES.append((target, args, kwargs))


for _n in (
    "abs neg sign exp exp2 expm1 sin cos tan atan sinh tanh asinh erf erfc sigmoid relu silu mish hardswish "
    "hardsigmoid floor ceil round trunc isnan isinf square logical_not positive relu6"
).split():
    case(f"aten.{_n}.default", T(2, 3))
for _n in "log log2 log10 log1p sqrt rsqrt reciprocal cosh acosh".split():
    case(f"aten.{_n}.default", T(2, 3, low=1.1))
for _n in "asin acos atanh".split():
    case(f"aten.{_n}.default", torch.tensor([-0.5, 0.0, 0.9]))
for _n in "exp sqrt floor abs neg relu sign sigmoid square".split():
    case(f"aten.{_n}.default", J(2, 3))
for _n in ("add", "sub", "rsub"):
    case(f"aten.{_n}.Tensor", T(2, 3), T(3), alpha=2)
    case(f"aten.{_n}.Scalar", T(2, 3), 2.5)
    case(f"aten.{_n}.Tensor", J(2, 3), T(3))
case("aten.add.Tensor", T(3, dtype=b1), T(3, dtype=b1).logical_not())
case("aten.add.Tensor", T(2, 3, dtype=bf16), T(3, dtype=bf16), alpha=0.3)
for _n in ("mul", "div", "fmod", "remainder"):
    case(f"aten.{_n}.Tensor", T(2, 3), P(3))
    case(f"aten.{_n}.Scalar", T(2, 3), 1.5)
case("aten.div.Tensor", J(2, 3), J(3) + 1)
case("aten.fmod.Scalar", T(3, dtype=i64), 3)
case("aten.remainder.Scalar", T(3, dtype=i64), 3)
for _m in (None, "floor", "trunc"):
    case("aten.div.Tensor_mode", T(5), P(5), rounding_mode=_m)
    case("aten.div.Tensor_mode", T(5, dtype=i64), J(5) + 1, rounding_mode=_m)
    case("aten.div.Scalar_mode", T(5, dtype=i64), 2, rounding_mode=_m)
case("aten.floor_divide.default", T(5, dtype=i64), J(5) + 1)
for _e in (0, 1, 2, 3, 0.5, -0.5, -1, 2.5):
    case("aten.pow.Tensor_Scalar", P(2, 3), _e)
case("aten.pow.Tensor_Scalar", J(3), 3)
case("aten.pow.Tensor_Scalar", J(3), 2.0)
case("aten.pow.Scalar", 2.0, T(3))
case("aten.pow.Tensor_Tensor", P(3), T(3))
for _n in ("eq", "ne", "lt", "le", "gt", "ge"):
    case(f"aten.{_n}.Tensor", J(4), J(4).flip(0))
    case(f"aten.{_n}.Tensor", J(4), T(4))
    case(f"aten.{_n}.Scalar", J(4), 1.5)
    case(f"aten.{_n}.Scalar", T(4, dtype=b1), True)
for _n in ("maximum", "minimum", "atan2", "hypot", "copysign"):
    target = "aten.copysign.Tensor" if _n == "copysign" else f"aten.{_n}.default"
    case(target, T(2, 3), T(3))
for _n in ("and", "or", "xor"):
    case(f"aten.logical_{_n}.default", T(3), J(3))
    case(f"aten.bitwise_{_n}.Tensor", J(4), J(4).flip(0))
    case(f"aten.bitwise_{_n}.Scalar", J(4), 3)
case("aten.bitwise_not.default", J(4))
case("aten.bitwise_not.default", T(4, dtype=b1))
case("aten.bitwise_left_shift.Tensor", J(4), J(4))
case("aten.__rshift__.Scalar", J(4) + 8, 1)
case("aten.bitwise_left_shift.Scalar_Tensor", 3, J(4))
case("aten.bitwise_right_shift.Scalar_Tensor", 9, J(4).int())
case("aten.bitwise_left_shift.Tensor_Scalar", J(4), 2)
case("aten.where.self", T(2, 3, dtype=b1), T(2, 3), T(3))
case("aten.where.self", T(2, 3, dtype=b1), T(2, 3), J(3))
case("aten.masked_fill.Scalar", T(2, 3), T(3, dtype=b1), -1.0)
case("aten.masked_fill.Tensor", T(2, 3), T(3, dtype=b1), torch.tensor(2.0))
case("aten.clamp.default", T(4), -0.5, 0.5)
case("aten.clamp.default", T(4), None, 0.5)
case("aten.clamp.default", J(4), 0.5)
case("aten.clamp.Tensor", T(4), T(4) - 1, T(4))
case("aten.clamp_min.default", T(4), 0)
case("aten.clamp_max.default", T(4), 0)
case("aten.addcmul.default", T(4), T(4), P(4), value=0.5)
case("aten.addcdiv.default", T(4), T(4), P(4), value=0.5)
case("aten.gelu.default", T(4))
case("aten.gelu.default", T(4), approximate="tanh")
case("aten.leaky_relu.default", T(4), 0.2)
case("aten.hardtanh.default", T(4), -0.5, 0.5)
case("aten.elu.default", T(4), 1.5)
case("aten.elu.default", T(4), 1.6, 1.1, 0.9)
case("aten.softplus.default", T(4), 2.0, 1.0)
case("aten.threshold.default", T(4), 0.1, 3.0)
case("aten.glu.default", T(2, 6), -1)
case("aten._prelu_kernel.default", T(4), torch.tensor(0.25))

for _d in (f32, bf16):
    case("aten.threshold_backward.default", T(4, dtype=_d), T(4, dtype=_d).flip(0), 0)
    case("aten.sigmoid_backward.default", T(4, dtype=_d), P(4, dtype=_d))
    case("aten.tanh_backward.default", T(4, dtype=_d), P(4, dtype=_d))
    case("aten.silu_backward.default", T(4, dtype=_d), T(4, dtype=_d).flip(0))
    case("aten.gelu_backward.default", T(4, dtype=_d), T(4, dtype=_d).flip(0))
    case("aten.gelu_backward.default", T(4, dtype=_d), T(4, dtype=_d).flip(0), approximate="tanh")
    case("aten._softmax_backward_data.default", T(2, 3, dtype=_d), P(2, 3, dtype=_d), 1, _d)
    case("aten._log_softmax_backward_data.default", T(2, 3, dtype=_d), T(2, 3, dtype=_d), 0, _d)
    case("aten.native_layer_norm.default", T(2, 3, 4, dtype=_d), [4], T(4, dtype=_d), T(4, dtype=_d), 1e-5)
case("aten.native_dropout_backward.default", T(4), T(4, dtype=b1), 2.0)

case("aten._softmax.default", T(2, 3), -1, False)
case("aten._softmax.default", torch.tensor(2.0), 0, False)
case("aten._softmax.default", T(0, 3), 0, False)
case("aten._log_softmax.default", T(2, 3), 0, False)
case("aten.native_layer_norm.default", T(2, 3, 4), [3, 4], None, None, 1e-5)
for _p in (_LN[2:], (None, None)):
    _wanted = [True, _p[0] is not None, _p[0] is not None]
    case("aten.native_layer_norm_backward.default", T(2, 3, 4), *_LN[:2], *_LN_STATS, *_p, _wanted)
case("aten._fused_rms_norm.default", T(2, 3, 4), [4], T(4), 1e-6)
case("aten._fused_rms_norm.default", T(2, 3, 4), [4], None, None)
case("aten.native_group_norm.default", T(2, 4, 3), T(4), T(4), 2, 4, 3, 2, 1e-5)
case("aten._native_batch_norm_legit_no_training.default", *_BN, T(3), P(3), 0.1, 1e-5)
case("aten._native_batch_norm_legit_functional.default", *_BN, T(3), P(3), True, 0.1, 1e-5)
case("aten._native_batch_norm_legit_functional.default", *_BN, T(3), P(3), False, 0.1, 1e-5)
case("aten._native_batch_norm_legit.no_stats", *_BN, True, 0.1, 1e-5)
for _r in (0, 1, 2):
    for _w in (None, P(5)):
        _x, _t = T(4, 5), torch.tensor([1, -100, 4, 0])
        case("aten.nll_loss_forward.default", _x, _t, _w, _r, -100)
        _g = T(4) if _r == 0 else torch.tensor(0.5)
        case("aten.nll_loss_backward.default", _g, _x, _t, _w, _r, -100, torch.tensor(3.0))
case("aten.nll_loss_forward.default", T(5), torch.tensor(2), None, 1, -100)
case("aten.nll_loss2d_forward.default", T(2, 5, 2, 3), J(2, 2, 3), P(5), 1, 2)
_x, _t = T(2, 5, 2, 3), J(2, 2, 3)
case("aten.nll_loss2d_backward.default", torch.tensor(1.0), _x, _t, None, 1, 2, torch.tensor(9.0))

case("aten.alias.default", T(2, 3))
case("aten.detach.default", T(2, 3))
case("aten.clone.default", T(2, 3))
case("aten.clone.default", T(3, 2).t(), memory_format=torch.contiguous_format)
case("aten._to_copy.default", T(2, 3), dtype=i64)
case("aten._to_copy.default", T(3, dtype=b1), dtype=f16)
case("aten._to_copy.default", T(2, 3))
case("aten.copy.default", T(2, 3), J(3))
case("aten.lift_fresh_copy.default", T(3))
case("aten.view.default", T(2, 6), [3, -1])
case("aten._unsafe_view.default", T(2, 6), [12])
case("aten.unsqueeze.default", T(2, 3), -1)
case("aten.squeeze.dims", T(1, 3, 1), [0, 2])
case("aten.squeeze.dim", T(1, 3, 1), 0)
case("aten.squeeze.default", T(1, 3, 1))
case("aten.permute.default", T(2, 3, 4), [2, 0, -2])
case("aten.t.default", T(2, 3))
case("aten.t.default", T(2))
case("aten.transpose.int", T(2, 3, 4), 0, -1)
case("aten.expand.default", T(3, 1), [2, -1, 4])
case("aten.flip.default", T(2, 3), [0, -1])
case("aten.repeat.default", T(2, 3), [2, 1, 3])
for _a in ((0, 1, 3), (1, -3, -1), (1, 1, 2**63 - 1, 2), (0, 3, 1), (-1, None, 2), (0, 10, 20)):
    case("aten.slice.Tensor", T(4, 5), *_a)
case("aten.select.int", T(4, 5), 1, -2)
case("aten.split_with_sizes.default", T(5, 2), [2, 3], 0)
case("aten.split.Tensor", T(5, 2), 2)
case("aten.unbind.int", T(3, 2), 1)
case("aten.slice_scatter.default", T(4, 5), T(4, 2), 1, 1, 5, 2)
case("aten.slice_scatter.default", T(4, 5), T(2, 5), 0, -2)
case("aten.select_scatter.default", T(4, 5), T(5), 0, -1)
case("aten.slice_backward.default", T(4, 2), [4, 5], 1, 1, 3, 1)
case("aten.slice_backward.default", T(4, 2), [4, 5], 1, 1, 5, 2)
case("aten.select_backward.default", T(5), [4, 5], 0, 2)
case("aten.cat.default", [T(2, 3), T(2, 1)], 1)
case("aten.cat.default", [J(2, 3), T(2, 3), torch.zeros(0)], -2)
case("aten.cat.default", [T(2, 3)], 0)
case("aten.stack.default", [T(2, 3), T(2, 3)], -1)
case("aten.constant_pad_nd.default", T(2, 3), [1, 2, 0, 1], 0.5)
case("aten.constant_pad_nd.default", T(2, 5), [-1, 2], 0)
case("aten.tril.default", T(2, 3, 4), 1)
case("aten.triu.default", T(4, 3), -1)
case("aten.full.default", [2, 3], 1.5, dtype=f32, device=CPU, pin_memory=False)
case("aten.full.default", [], 3, dtype=i64, device=CPU)
case("aten.full_like.default", T(2, 3), 2, dtype=b1)
case("aten.new_full.default", T(2, 3), [4], 2.0)
case("aten.zeros.default", [2], device=CPU)
case("aten.ones_like.default", T(2, 3))
case("aten.new_zeros.default", T(2), [0, 3])
case("aten.fill.Scalar", T(2), 4.0)
case("aten.scalar_tensor.default", 2.5, dtype=f32, device=CPU)
case("aten.scalar_tensor.default", True, dtype=b1, device=CPU)
case("aten.arange.start_step", 1, 8, 3, dtype=i64, device=CPU)
case("aten.arange.start_step", 0.0, 1.0, 0.3, dtype=f32, device=CPU)
case("aten.arange.default", 5, device=CPU)

case("aten.sum.dim_IntList", T(2, 3, 4), [0, -1], True)
case("aten.sum.dim_IntList", T(2, 3), None)
case("aten.sum.dim_IntList", T(2, 3, dtype=b1), [1])
case("aten.sum.dim_IntList", T(2, 3, dtype=bf16), [1], dtype=f32)
case("aten.sum.default", torch.tensor(2.0))
case("aten.prod.dim_int", T(2, 3), 1)
case("aten.prod.default", J(3) + 1)
case("aten.mean.dim", T(2, 3, 4), [1], True)
case("aten.mean.default", T(2, 3))
case("aten.mean.dim", J(2, 3), [0], dtype=f32)
case("aten.var.correction", T(2, 5), [1], correction=0)
case("aten.var.correction", T(2, 5), None, keepdim=True)
case("aten.std.correction", T(2, 5), [0], correction=1)
case("aten.var_mean.correction", T(2, 5), [1], correction=1, keepdim=True)
case("aten.logsumexp.default", T(2, 3), [1])
for _o in (2, 1, 0, 3, float("inf"), -float("inf")):
    case("aten.linalg_vector_norm.default", T(2, 3), _o, [1], True)
case("aten.linalg_vector_norm.default", T(2, 3))
case("aten.amax.default", T(2, 3), [1], True)
case("aten.amin.default", T(2, 3))
case("aten.max.dim", T(2, 3), 1)
case("aten.min.dim", J(2, 3), 0, True)
case("aten.max.dim", torch.tensor(2.0), 0)
case("aten.max.default", T(2, 3))
case("aten.min.default", J(4))
case("aten.argmax.default", T(2, 3))
case("aten.argmax.default", T(2, 3), None, True)
case("aten.argmin.default", T(2, 3), -1, True)
for _n in ("any", "all"):
    case(f"aten.{_n}.default", T(2, 3))
    case(f"aten.{_n}.dim", T(2, 3, dtype=b1), 1)
    case(f"aten.{_n}.dims", J(2, 3), [0, 1], True)
case("aten._is_all_true.default", T(3, dtype=b1))

case("aten.mm.default", T(2, 3), T(3, 4))
case("aten.bmm.default", T(2, 3, 4), T(2, 4, 5))
case("aten.addmm.default", T(4), T(2, 3), T(3, 4), beta=0.5, alpha=2)
case("aten.addmm.default", T(2, 4), T(2, 3), T(3, 4))
case("aten.baddbmm.default", T(2, 1, 5), T(2, 3, 4), T(2, 4, 5), beta=0)
case("aten.linear.default", T(2, 3, 4), T(5, 4), T(5))
case("aten.mv.default", T(2, 3), T(3))
case("aten.dot.default", T(3), P(3))
_ROWS = T(5, 3), T(4, 3, 2), T(5, 2)
case("aten._trilinear.default", *_ROWS, [1, 3], [0], [1, 2], [2, 3])
case("aten._trilinear.default", T(5, 4), *_ROWS[1:], [2, 3], [0], [1, 2], [1, 3])
case("aten._trilinear.default", _ROWS[0], T(5, 4), _ROWS[2], [1, 3], [2, 3], [1, 2], [0])
case("aten._trilinear.default", T(5, 3), T(5, 3), T(5, 3), [], [], [], [1])  # no matrix
case("aten.mm.default", J(2, 3), J(3, 2))
_Q, _KV = T(2, 4, 3, 8), T(2, 2, 5, 8)
case("tessel.attention.default", _Q, _KV, P(2, 2, 5, 6), T(3, 5, dtype=b1), False, 0.3)
case("tessel.attention.default", _Q, _KV, P(2, 2, 5, 6), None, True, 0.3, T(4), 2, 3, 0.7)
case("aten.scaled_dot_product_attention.default", _Q, T(2, 4, 5, 8), P(2, 4, 5, 8), T(2, 1, 3, 5))
case("aten.scaled_dot_product_attention.default", T(2, 3, 8), T(2, 3, 8), P(2, 3, 8), is_causal=True)
case("aten.scaled_dot_product_attention.default", _Q, _KV, _KV, enable_gqa=True)

case("aten.embedding.default", T(7, 3), J(2, 4))
case("aten.embedding_dense_backward.default", T(2, 4, 3), J(2, 4), 7, -1, False)
case("aten.gather.default", T(3, 4), 1, J(2, 3))
case("aten.gather.default", torch.tensor(2.0), 0, torch.tensor(0))
case("aten.index_select.default", T(3, 4), -1, J(5))
case("aten.index_select.default", T(3, 4), 0, torch.tensor(1))
case("aten.index.Tensor", T(3, 4, 5), [None, J(2, 2), J(2)])
case("aten.index.Tensor", T(3, 4, 5), [J(2), None, J(2)])
case("aten.index.Tensor", T(3, 4), [J(2).to(i32)])
case("aten.index.Tensor", T(3, 4), [T(3, dtype=b1)])
case("aten.index_put.default", T(3, 4), [J(2), None], T(2, 4))
case("aten.index_put.default", T(3, 4), [None, J(6)], T(3, 6), True)
case("aten.index_put.default", T(3, 4), [T(3, 4, dtype=b1)], torch.tensor(1.0))
case("aten.scatter.value", T(3, 4), 1, J(3, 2), 2.0)
case("aten.scatter.src", T(3, 4), 0, J(2, 4), T(2, 4))
case("aten.scatter_add.default", T(3, 4), 1, J(3, 6), T(3, 6))
case("aten.scatter_reduce.two", T(3, 4), 1, J(3, 6), T(3, 6), "amax")
case("aten.sort.default", T(3, 4), -1, True)
case("aten.sort.stable", J(8), stable=True, dim=0, descending=False)
case("aten.topk.default", T(3, 6), 2)
case("aten.cumsum.default", J(3, 4), 1)
case("aten.cumsum.default", T(3, 4), 0, dtype=f64)
case("aten.histc.default", T(9), 4, -2, 2)
case("aten.convolution.default", T(1, 2, 5, 5), T(3, 2, 3, 3), T(3), [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
case("aten.convolution.default", T(1, 4, 7), T(4, 2, 3), None, [2], [0], [1], False, [0], 2)
for _bias, _wanted in (([3], [True, True, True]), (None, [False, True, False])):
    _maps = T(1, 3, 5, 5), T(1, 2, 5, 5), T(3, 2, 3, 3)
    _how = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    case("aten.convolution_backward.default", *_maps, _bias, *_how, _wanted)
case("aten.avg_pool2d.default", T(1, 2, 6, 6), [2, 2], [2, 2])
case("aten.max_pool2d_with_indices.default", T(1, 2, 6, 6), [3, 3], [2, 2], [1, 1])
case("aten.upsample_bilinear2d.vec", T(1, 2, 4, 4), [8, 8], False, None)
case("aten.upsample_nearest2d.vec", T(1, 2, 4, 4), None, [2.0, 2.0])
case("aten.grid_sampler_2d.default", T(1, 2, 4, 4), T(1, 3, 3, 2) / 2, 0, 0, False)
case("aten._fft_c2c.default", torch.view_as_complex(T(3, 4, 2)), [1], 0, True)
case("aten.view_as_real.default", torch.view_as_complex(T(3, 4, 2)))
case("aten.view_as_complex.default", T(3, 4, 2))
case("aten.as_strided.default", T(12), [2, 3], [4, 1], 1)
case("aten.rand.default", [2, 3], device=CPU, pin_memory=False)
case("aten.randn.default", [2, 3], device=CPU)
case("aten.rand_like.default", T(2, 3))
case("aten.randn_like.default", T(2, 3))
case("aten.randint.low", 0, 5, [4], device=CPU)
case("aten.bernoulli.p", T(2, 3), 0.5)
case("aten.native_dropout.default", T(2, 3), 0.5, True)
_ends = torch.tensor([2, 5], dtype=i32)
case("aten._grouped_mm.default", T(5, 8, dtype=bf16), T(2, 8, 16, dtype=bf16), _ends)

# What becomes an opaque call.
case("aten.mul.Tensor", torch.view_as_complex(T(3, 2)), torch.view_as_complex(T(3, 2)))
case("aten._to_copy.default", T(3), dtype=torch.float8_e4m3fn)
case("aten.diagonal.default", T(3, 4), 1)
case("aten.unfold.default", T(8), 0, 3, 2)
case("aten.median.dim", T(3, 5), 1)
case("aten.linalg_inv_ex.default", T(2, 2) + 3 * torch.eye(2))
case("aten._pdist_forward.default", T(3, 2))


def flat_tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in flat_tensors(y)] if isinstance(x, list | tuple) else []


def caller(target: str, args: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """A function of the tensors among the arguments alone, and those tensors."""
    op = torch_op(target)
    tensors = flat_tensors([*args])

    def fill(a: Any, left: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return next(left)
        return [fill(x, left) for x in a] if isinstance(a, list | tuple) else a

    def call(*given: torch.Tensor) -> Any:
        left = iter(given)
        got = op(*(fill(a, left) for a in args), **kwargs)
        return tuple(flat_tensors(got))

    return call, tensors


def assert_same(got: Any, want: Any, tol: float = 1e-5) -> None:
    for g, w in zip(got, want, strict=True):
        if w.dtype in (f16, bf16):
            torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2, equal_nan=True)
        elif w.dtype == torch.float8_e4m3fn:
            assert torch.equal(g.to(f32), w.to(f32))
        else:
            torch.testing.assert_close(g, w, rtol=tol, atol=tol, equal_nan=True)


def round_trip_import(fn: Callable[..., Any], inputs: list[Any], mode: str = "fake") -> Imported:
    """Trace and import."""
    gm = make_fx(fn, tracing_mode=mode)(*inputs)
    gm.graph.eliminate_dead_code()
    return import_graph(gm)


def round_trip(fn: Callable[..., Any], inputs: list[Any], mode: str) -> Any:
    """Trace, import, evaluate; the import and the outputs."""
    imported = round_trip_import(fn, inputs, mode)
    return imported, run(imported, inputs, strides=True)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i][0]}")
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_target(index: int, mode: str) -> None:
    target, args, kwargs = CASES[index]
    call, tensors = caller(target, args, kwargs)
    if mode == "symbolic" and not tensors:
        pytest.skip("nothing symbolic")
    torch.manual_seed(0)
    want = call(*tensors)
    torch.manual_seed(0)
    imported, got = round_trip(call, tensors, mode)
    assert_same(got, want)
    if mode == "fake":
        assert [g.stride() for g in got] == [w.stride() for w in want]
    assert str(imported.graph)


def test_a_target_that_is_no_class() -> None:
    x, bad = T(3, 4), torch.tensor([1, 4, -100])

    def loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.nll_loss_forward.default(x, target, None, 1, -100)[0]

    imported, _ = round_trip(loss, [x, torch.tensor([1, 3, -100])], "fake")
    assert any(n.op.name == "call_random" for n in imported.graph.live().nodes)
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        run(imported, [x, bad])
    with torch.device("meta"):
        elsewhere = round_trip_import(loss, [T(3, 4).to("meta"), bad.to("meta")])
    (got,) = run(elsewhere, [x, bad])
    assert got.isnan()
    assert_same(run(elsewhere, [x, bad.clamp(max=3)]), [loss(x, bad.clamp(max=3))])


def test_fused_rms_norm() -> None:
    """On the CPU torch opens this operator itself: the graph is written by hand, as a GPU has it."""
    aten = torch.ops.aten
    x, w, grad = T(2, 3, 4), T(4), P(2, 3, 4)
    graph = torch.fx.Graph()
    with FakeTensorMode() as mode:
        held = [graph.placeholder(n) for n in ("x", "w", "grad")]
        for node, real in zip(held, (x, w, grad), strict=True):
            node.meta["val"] = mode.from_tensor(real)

        def add(target: Any, *args: Any) -> torch.fx.Node:
            node = graph.call_function(target, args)
            given = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in args]
            node.meta["val"] = target(*given)
            return node

        norm = add(aten._fused_rms_norm.default, held[0], [4], held[1], 1e-6)
        y, rstd = add(operator.getitem, norm, 0), add(operator.getitem, norm, 1)
        rstd.meta["val"] = rstd.meta["val"].new_empty((2, 3, 1))
        norm.meta["val"] = (y.meta["val"], rstd.meta["val"])
        back = add(aten._fused_rms_norm_backward.default, held[2], held[0], [4], rstd, held[1], [True, True])
        graph.output((y, add(operator.getitem, back, 0), add(operator.getitem, back, 1)))
    imported = import_graph(torch.fx.GraphModule({}, graph))
    assert not imported.fallbacks
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    want = torch.nn.functional.rms_norm(leaves[0], [4], leaves[1], 1e-6)
    want.backward(grad)
    assert_same(run(imported, [x, w, grad]), [want.detach(), leaves[0].grad, leaves[1].grad])


def test_every_known_target_has_an_entry() -> None:
    rows = json.loads(DATA.read_text())["rows"]
    missing = []
    for target, _, _ in rows:
        on_sizes = target.startswith(("_operator.", "torch.sym_", "aten.sym_"))
        if target not in TABLE and target not in SPECIAL and not on_sizes:
            missing.append(target)
    assert missing == []


def test_every_entry_names_an_operator() -> None:
    import tessel.frontend.attention_op  # noqa: F401

    gone = []
    for target in TABLE:
        namespace, name, overload = target.split(".")
        if namespace not in ("aten", "tessel", "prims"):
            continue
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is None or overload not in packet.overloads():
            gone.append(target)
    assert gone == []
