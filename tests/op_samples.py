"""Arguments on which every operator's dims string is proved: several ranks and attributes, odd sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from prove_dims import Sample

from tessel.ops import OPS
from tessel.ops.collective import CALLS, COLLECTIVE
from tessel.ops.inplace import WRITES

F64 = torch.float64

# What has no sample, and why.
EXEMPT = {
    "item": "gives a host number, no tensor",
    "assert_scalar": "has no tensors",
    "assert_true": "has no results; tested by its error",
    "kernel": "is run through its region",
    "write": "is run through its region",
    "loop": "is run through its region",
    **dict.fromkeys(
        (*COLLECTIVE, *CALLS), "needs several ranks; tests/test_partition.py compares all of them with one device"
    ),
}


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=F64) + 0.25


def unit(*shape: int) -> torch.Tensor:
    """Between -1 and 1."""
    return torch.rand(shape, dtype=F64) * 1.8 - 0.9


def ints(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape)


def flags(*shape: int) -> torch.Tensor:
    return torch.rand(shape) > 0.5


def samples() -> Iterator[Sample]:
    """All samples, the same every time."""
    torch.manual_seed(0)
    for group in (
        pointwise,
        reductions,
        views,
        indexing,
        contractions,
        norms,
        expert_layers,
        packed_layers,
        roundings,
        packed_caches,
        libraries,
        draws,
    ):
        for name, args, attrs in group():
            yield Sample(OPS[name], args, attrs)
            if name in WRITES:  # the same value
                yield Sample(OPS[name + "_"], args, attrs)


Case = tuple[str, tuple[Any, ...], dict[str, Any]]

UNARY_REAL = "neg abs sign exp exp2 expm1 sin cos tan atan sinh cosh tanh asinh erf erfc sigmoid relu floor ceil"
UNARY_REAL += " round trunc isnan isinf logical_not copy gelu silu leaky_relu hardtanh hardsigmoid hardswish elu"
UNARY_REAL += " softplus mish log_sigmoid reciprocal floor_pow2"
BINARY = "add sub mul div floor_div trunc_div maximum minimum fmod remainder atan2 copysign hypot"
BINARY += " eq ne lt le gt ge logical_and logical_or logical_xor"


def pointwise() -> Iterator[Case]:
    for name in UNARY_REAL.split():
        yield name, (real(3, 5),), {}
    for name in "log log2 log10 log1p sqrt rsqrt".split():
        yield name, (positive(5),), {}
    for name in "asin acos atanh".split():
        yield name, (unit(2, 3, 5),), {}
    yield "acosh", (positive(3, 5) + 1,), {}
    yield "exp", (real(),), {}
    yield "exp", (real(1, 3, 1, 5),), {}
    yield "exp", (real(0, 3),), {}
    for name in BINARY.split():
        yield name, (real(3, 5), real(5)), {}
        yield name, (real(3, 1), real(1, 5)), {}
        yield name, (real(3, 5), 1.5), {}
        yield name, (real(), real(3)), {}
    yield "pow", (positive(3, 5), real(5)), {}
    yield "pow", (positive(3, 5), 2.5), {}
    yield "sub", (1.0, real(3)), {}
    for name in "bitwise_and bitwise_or bitwise_xor shift_left shift_right".split():
        yield name, (ints(50, 3, 5), ints(4, 5)), {}
    yield "bitwise_and", (flags(3, 5), flags(3, 1)), {}
    yield "bitwise_not", (ints(50, 3, 5),), {}
    yield "bitwise_not", (flags(3, 5),), {}
    yield "add", (ints(9, 3, 5), 2), {}
    yield "floor_div", (ints(9, 3, 5, low=-9), 2), {}
    yield "where", (flags(3, 1), real(5), 0.0), {}
    yield "where", (flags(5), real(3, 5), real()), {}
    yield "cast", (real(3, 5),), {"dtype": torch.float16}
    yield "cast", (ints(5, 3),), {"dtype": torch.bool}
    yield "gelu", (real(3, 5),), {"approximate": "tanh"}
    yield "elu", (real(3, 5),), {"alpha": 1.67, "scale": 1.05, "input_scale": 0.5}
    yield "leaky_relu", (real(3, 5),), {"slope": 0.3}
    yield "hardtanh", (real(3, 5),), {"low": -0.5, "high": 0.25}
    yield "softplus", (real(3, 5) * 9,), {"beta": 2.0, "threshold": 3.0}
    yield "clamp", (real(3, 5), -0.5, None), {}
    yield "clamp", (real(3, 5), real(5), real(3, 1)), {}
    yield "clamp", (ints(9, 3, 5), 2, 5), {}
    yield "lerp", (real(3, 5), real(5), 0.3), {}
    yield "lerp", (real(3, 5), real(5), 0.75), {}
    yield "lerp", (real(3, 5), real(5), positive(3, 5)), {}
    yield "addcmul", (real(3, 5), real(5), real(3, 1)), {"value": 2.0}
    yield "addcdiv", (real(3, 5), real(5), positive(3, 1)), {}


def reductions() -> Iterator[Case]:
    for name in "sum prod amax amin any all mean logsumexp".split():
        make = flags if name in ("any", "all") else real
        yield name, (make(3, 5, 7),), {"dims": (1,), "keepdim": False}
        yield name, (make(3, 5, 7),), {"dims": (0, 2), "keepdim": True}
        yield name, (make(5),), {"dims": (0,), "keepdim": False}
    yield "sum", (real(3, 5),), {"dims": (), "keepdim": False}
    yield "sum", (flags(3, 5),), {"dims": (-1,), "keepdim": False}
    yield "prod", (ints(4, 3, 5),), {"dims": (1,), "keepdim": False}
    yield "any", (real(3, 5),), {"dims": (1,), "keepdim": True}
    tied = torch.tensor([[1.0, 3, 3, 0, 3], [0, 0, 0, 0, 0], [math.nan, 1, math.nan, 2, 0]], dtype=F64)
    for name in ("argmax", "argmin"):
        yield name, (real(3, 5, 7),), {"dims": (1,), "keepdim": True}
        yield name, (real(7),), {"dims": (0,), "keepdim": False}
        yield name, (tied,), {"dims": (1,), "keepdim": False}
    for name in ("var", "var_mean"):
        yield name, (real(3, 5, 7),), {"dims": (1,), "keepdim": False, "correction": 1}
        yield name, (real(3, 5, 7),), {"dims": (0, 2), "keepdim": True, "correction": 0}
    for p in (2, 1, math.inf, -math.inf, 0, 3):
        yield "vector_norm", (real(3, 5, 7),), {"ord": p, "dims": (0, 2), "keepdim": False}


def views() -> Iterator[Case]:
    for before, after in (
        ((3, 5, 7), (15, 7)),
        ((15, 7), (3, 5, 7)),
        ((6, 35), (2, 15, 7)),
        ((12, 5), (4, 15)),
        ((4, 6), (6, 4)),
        ((3, 5), (3, 1, 5, 1)),
        ((1, 3, 5), (15,)),
        ((1,), ()),
        ((), (1, 1)),
        ((6, 4, 5), (2, 3, 20)),
        ((4, 6, 7), (6, 4, 7)),
    ):
        yield "reshape", (real(*before),), {"shape": after}
    yield "permute", (real(2, 3, 5),), {"dims": (2, 0, 1)}
    yield "permute", (real(3, 5).t(),), {"dims": (1, 0)}
    yield "expand", (real(3, 1),), {"shape": (2, 3, 5)}
    yield "expand", (real(5),), {"shape": (3, 5)}
    yield "expand", (real(),), {"shape": (3,)}
    yield "slice", (real(5, 7),), {"dim": 1, "start": 1, "size": 3, "step": 2}
    yield "slice", (real(5, 7),), {"dim": 0, "start": 0, "size": 5, "step": 1}
    yield "slice", (real(5, 7),), {"dim": 0, "start": 5, "size": 0, "step": 1}
    yield "flip", (real(3, 5, 7),), {"dims": (0, 2)}


def indexing() -> Iterator[Case]:
    yield "cat", ((real(3, 2, 5), real(3, 3, 5), real(3, 1, 5)),), {"dim": 1}
    yield "cat", ((real(3), real(2)),), {"dim": -1}
    yield "pad", (real(3, 5),), {"low": (0, 2), "high": (0, 1), "value": 1.5}
    yield "pad", (flags(3, 5),), {"low": (1, 0), "high": (0, 0), "value": True}
    yield "gather", (real(5, 7), ints(7, 5, 3)), {"dim": 1}
    yield "gather", (real(5, 7), ints(5, 4, 3)), {"dim": 0}
    yield "gather", (real(5), ints(5, 3)), {"dim": 0}
    yield "gather", (real(5, 7), ints(3, 5, 3)), {"dim": 1, "offset": -1}
    yield "embedding", (real(11, 5), ints(11, 3, 7)), {}
    yield "embedding", (real(11, 5), ints(11)), {}
    yield "embedding", (real(11, 5), ints(30, 7)), {"offset": 9}
    yield "index_select", (real(3, 7, 5), ints(7, 4)), {"dim": 1}
    yield "index", (real(5, 7, 3), (ints(5, 4, 1), ints(7, 1, 3))), {}
    yield "index", (real(5, 7, 3), (None, ints(7, 4, 2, low=-7))), {}
    yield "index", (real(5, 7, 3), (ints(5, 4), None, ints(3, 4))), {}
    yield "slice_scatter", (real(5, 7), real(5, 3)), {"dim": 1, "start": 1, "size": 3, "step": 2}
    yield "iota", (), {"shape": (7,), "start": 3, "step": 2, "dtype": torch.int64}
    yield "iota", (), {"shape": (7,), "start": 0.5, "step": 0.25, "dtype": torch.float32}
    yield "full", (), {"shape": (3, 5), "value": 2.5, "dtype": torch.float32}
    yield "full", (), {"shape": (), "value": True, "dtype": torch.bool}


def contractions() -> Iterator[Case]:
    yield "matmul", (real(3, 5), real(5, 7)), {}
    yield "matmul", (real(2, 3, 3, 5), real(2, 3, 5, 7)), {}
    yield "mm", (real(2, 3, 5), real(2, 5, 7)), {}
    yield "addmm", (real(7), real(3, 5), real(5, 7)), {}
    q, k, v = real(2, 6, 5, 4), real(2, 6, 7, 4), real(2, 6, 7, 3)
    yield "attention", (q, k, v), {}
    yield "attention", (q, k, v), {"causal": True, "scale": 0.3}
    yield "attention", (q, k[:, :3], v[:, :3]), {"causal": True}
    yield "attention", (q, k[:, :1], v[:, :1]), {"causal": True, "offset": 2}
    masked = flags(2, 1, 5, 7)
    masked[:, :, 2] = False  # a row that sees nothing
    yield "attention", (q, k[:, :2], v[:, :2], masked), {}
    yield "attention", (q, k[:, :2], v[:, :2], real(5, 7)), {"causal": True}
    yield "attention", (q, k, v, flags(6, 5, 1)), {}
    sink = real(6)
    yield "attention", (q, k, v), {"window": 2}
    yield "attention", (q, k, v, masked), {"causal": True, "window": 3, "offset": 1, "softcap": 0.8}
    yield "attention", (q, k[:, :3], v[:, :3], None, sink), {"causal": True, "offset": -2}
    yield "attention", (q, k[:, :1], v[:, :1], masked, sink), {"window": 3, "offset": 2}
    for heads, mask, given, attrs in (
        (6, None, None, {"causal": True}),
        (3, masked, None, {}),
        (1, real(6, 5, 7), None, {"scale": 0.3}),
        (6, None, None, {"causal": True, "window": 2, "offset": 1, "softcap": 0.7}),
        (3, real(2, 1, 5, 7), None, {"mask_grad": True, "window": 3}),
        (2, real(6, 1, 7), None, {"mask_grad": True}),
        (1, real(5, 7), None, {"mask_grad": True, "softcap": 1.5}),
        (3, masked, sink, {"window": 2}),
        (6, real(2, 6, 5, 7), sink, {"mask_grad": True}),
    ):
        args = (q, k[:, :heads], v[:, :heads], mask, given)
        out, lse = OPS["attention"].ref(*args, **{n: x for n, x in attrs.items() if n != "mask_grad"})
        grad = real(*out.shape)
        yield "attention_backward", (grad, *args, out, lse), attrs
        passes = (grad, *args[:4], (grad * out).sum(-1), lse)
        yield "attention_backward_queries", passes, attrs
        yield "attention_backward_keys", passes, {n: x for n, x in attrs.items() if n != "mask_grad"}
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    yield "grouped_mm", (real(9, 4), real(3, 4, 5), ends), {}
    yield "grouped_mm", (real(3, 6, 4), real(4, 9), ends), {}
    yield "grouped_mm", (real(6, 9), real(9, 5), ends), {}
    yield "grouped_mm", (real(3, 6, 4), real(3, 4, 5)), {}
    yield "grouped_mm", (real(3, 6, 4), real(3, 4, 5), None, real(5)), {}


def norms() -> Iterator[Case]:
    for name in ("softmax", "log_softmax"):
        yield name, (real(3, 5, 7),), {"dim": 1}
        yield name, (real(3, 5) * 400,), {"dim": -1}
        yield name, (real(),), {"dim": -1}
        yield name, (real(3, 0),), {"dim": 1}
    hidden = torch.full((3, 5), -math.inf, dtype=F64)
    hidden[0, 1] = 2.0
    yield "softmax", (hidden,), {"dim": -1}
    yield "logsumexp", (hidden,), {"dims": (1,), "keepdim": True}
    yield "layer_norm", (real(3, 5, 7), real(7), real(7)), {"ndim": 1, "eps": 1e-5}
    yield "layer_norm", (real(3, 5, 7), None, real(5, 7)), {"ndim": 2, "eps": 1e-5}
    yield "layer_norm", (real(5) + 1e4, None, None), {"ndim": 1, "eps": 1e-5}
    yield "rms_norm", (real(3, 5, 7), real(7)), {"ndim": 1, "eps": 1e-6}
    yield "rms_norm", (real(3, 5), None), {"ndim": 1, "eps": 1e-6}
    yield "group_norm", (real(3, 6, 5), real(6), real(6)), {"groups": 3, "eps": 1e-5}
    yield "group_norm", (real(3, 6, 2, 5), None, None), {"groups": 1, "eps": 1e-5}
    yield "batch_norm_inference", (real(3, 5, 7), real(5), real(5), real(5), positive(5)), {"eps": 1e-5}
    yield "batch_norm_inference", (real(3, 5), None, None, real(5), positive(5)), {"eps": 1e-3}
    yield "batch_norm_training", (real(3, 5, 7), real(5), real(5)), {"eps": 1e-5}
    yield "batch_norm_training", (real(7, 5), None, None), {"eps": 1e-5}
    target = ints(5, 7)
    target[2] = -100
    for reduction in ("none", "mean", "sum"):
        yield "cross_entropy", (real(7, 5), target), {"ignore_index": -100, "reduction": reduction}
    for operands, attrs in (
        ((real(7, 4), real(5, 4), None, target), {}),
        ((real(7, 4), real(5, 4), real(5), target), {"label_smoothing": 0.2, "softcap": 2.0, "chunk": 3}),
        ((real(7, 4), real(5, 4), real(5), target.clamp(min=0)), {"ignore_index": 3}),
    ):
        yield "linear_cross_entropy", operands, attrs
        _, lse = OPS["linear_cross_entropy"].ref(*operands, **attrs)
        yield "linear_cross_entropy_backward", (real(7), *operands, lse), attrs
        some = {**attrs, "wanted": (False, True, False)}
        yield "linear_cross_entropy_backward", (real(7), *operands, lse), some
        once = {k: v for k, v in attrs.items() if k != "chunk"}
        yield "linear_cross_entropy_gradients", operands, once
        yield "linear_cross_entropy_gradients", operands, {**once, "wanted": (True, False, True)}
    yield "scaled_gradients", (real(7, 4), real(5, 4), real(5), real()), {}


def expert_layers() -> Iterator[Case]:
    index = ints(3, 5, 2)
    limited = {"act": "limited", "interleaved": True, "turned": True, "alpha": 1.7, "limit": 0.7}
    for operands, attrs in (
        ((real(5, 4), real(3, 6, 4), None, real(3, 5, 3), None, index, real(5, 2)), {}),
        ((real(5, 4), real(3, 4, 6), real(3, 6), real(3, 3, 5), real(3, 5), index + 1, real(5, 2)), limited),
        ((real(5, 4), real(3, 6, 4), None, real(3, 4, 3), real(3, 4), index, real(5, 2)), {"act": "gelu_tanh"}),
    ):
        yield "experts", operands, attrs
        attrs = {**attrs, "keep": True}
        yield "experts", operands, attrs
        out, pre = OPS["experts"].ref(*operands, **attrs)
        del attrs["keep"]
        yield "experts_backward", (real(*out.shape), *operands, pre), attrs
        some = {**attrs, "wanted": (True, False, False)}
        yield "experts_backward", (real(*out.shape), *operands, pre), some
    yield "dispatch", (ints(4, 6, 2),), {"experts": 2, "parts": 2, "room": 6}


def roundings() -> Iterator[Case]:
    e2m1 = {"exponent": 2, "mantissa": 1, "largest": 6.0}
    for group, scale in ((8, "f32"), (8, "e8m0"), (0, "f32"), (-1, "f32"), (4, "e4m3")):
        yield "rounded", (real(3, 5, 16),), {"group": group, **e2m1, "scale": scale}


def packed_layers() -> Iterator[Case]:
    """Groups of whole words and others, words that are not full, a zero point, a bias, a table."""
    for bits, k, groups, more in ((4, 32, 2, "z"), (8, 24, 1, "b"), (8, 16, 4, "zb"), (3, 15, 3, ""), (4, 16, 2, "t")):
        words = ints(2**31, 6, -(-k // (32 // bits)), low=-(2**31)).to(torch.int32)
        zero = ints(2**bits, 6, groups).double() if "z" in more else None
        lut = real(2**bits) if "t" in more else None
        operands = (real(5, k), words, real(6, groups), zero, real(6) if "b" in more else None, lut)
        yield "packed_linear", operands, {"bits": bits}
        if more in ("b", "z"):
            yield "packed_linear", operands, {"bits": bits, "inputs": 8}
    stack, scale, zero = ints(2**31, 3, 8, 2, low=-(2**31)).to(torch.int32), real(3, 8, 2), ints(16, 3, 8, 2).double()
    yield "unpacked", (stack, scale, zero), {"bits": 4, "k": 16, "dtype": torch.float64}
    yield "unpacked", (stack, scale, None, real(16)), {"bits": 4, "k": 16, "dtype": torch.float64}
    down = ints(2**31, 3, 6, 1, low=-(2**31)).to(torch.int32), real(3, 6, 1)
    routed = ints(3, 5, 2), real(5, 2)
    yield "packed_experts", (real(5, 16), stack, scale, zero, None, None, *down, None, None, None, *routed), {"bits": 4}
    whole = (real(5, 16), stack, scale, zero, None, None, *down, None, None, None, *routed)
    yield "packed_experts", whole, {"bits": 4, "inputs": 8}
    for floats in ((4, 4, 3, 448.0, "e8m0"), (4, 2, 1, 6.0, "e4m3")):
        yield "packed_experts", whole, {"bits": 4, "floats": floats}
    biased = (real(5, 16), stack, scale, None, real(3, 8), real(16), *down, None, real(3, 6), real(16), *routed)
    yield "packed_experts", biased, {"bits": 4, "act": "limited", "interleaved": True, "alpha": 1.7, "limit": 7.0}
    two_of_four = torch.tensor([3, 5, 6, 9, 10, 12])[ints(6, 6, 2, 8)] << torch.arange(0, 32, 4)
    mask = two_of_four.sum(-1)
    mask = torch.where(mask >= 2**31, mask - 2**32, mask).to(torch.int32)
    yield "sparse_linear", (real(5, 44), real(6, 22), mask), {}
    yield "sparse_linear", (real(5, 64), real(6, 32), mask, real(6)), {}


def packed_caches() -> Iterator[Case]:
    """Keys with a scale a channel, values with one a token and group of channels; words that are not full."""
    for bits, width, shape, scales, along in (
        (4, 6, (1, 5), (6, 1), "channels"),
        (2, 16, (1, 3), (16, 1), "channels"),
        (8, 6, (3, 6), (2, 12), "tokens"),
        (4, 5, (2, 5), (1, 16), "tokens"),
    ):
        words = ints(2**31, 2, 3, 4, *shape, low=-(2**31)).to(torch.int32)
        attrs = {"bits": bits, "width": width, "along": along, "dtype": F64}
        yield "dequantize_cache", (words, real(2, 3, 4, *scales), real(2, 3, 4, *scales)), attrs


def libraries() -> Iterator[Case]:
    yield "linear_scan", (real(3, 7, 5), real(3, 7, 5)), {"dim": 1}
    yield "linear_scan", (real(6), real(6)), {"dim": -1}
    yield "linear_scan", (real(3, 7, 5), real(3, 7, 5)), {"dim": 1, "reverse": True}
    for fold in ("sum", "prod", "amax", "amin", "logsumexp"):
        yield "running", (real(3, 7, 5),), {"dim": 1, "fold": fold}
    scanned = (real(2, 7, 3), positive(2, 7, 3), -positive(3, 5), real(2, 7, 5), real(2, 7, 5))
    yield "selective_scan", scanned, {}
    yield "selective_scan_backward", (real(2, 7, 3), *scanned), {}
    rules = [(None, False, True), ((2, 3, 5), True, True), ((2, 3, 5, 4), False, False), (None, True, True)]
    for decay, beta, start in rules:
        q, k, v = real(2, 3, 5, 4), real(2, 3, 5, 4), real(2, 3, 5, 7)
        more = (unit(*decay) if decay else None, unit(2, 3, 5) if beta else None, real(2, 3, 4, 7) if start else None)
        yield "linear_attention", (q, k, v, *more), {}
        last = real(2, 3, 4, 7) if start else None
        yield "linear_attention_backward", (real(2, 3, 5, 7), last, q, k, v, *more), {}
    conv = "convolution"
    # x, weight, bias, stride, padding, dilation, transposed, output padding, groups
    yield conv, (real(3, 4, 11), real(5, 4, 3), None, (1,), (0,), (1,), False, (0,), 1), {}
    yield conv, (real(3, 4, 11), real(5, 4, 3), real(5), (2,), (1,), (1,), False, (0,), 1), {}
    yield conv, (real(2, 3, 13, 9), real(5, 3, 3, 2), real(5), (3, 2), (2, 1), (2, 1), False, (0, 0), 1), {}
    yield conv, (real(2, 6, 7, 5), real(9, 2, 3, 3), real(9), (2, 1), (1, 1), (1, 1), False, (0, 0), 3), {}
    yield conv, (real(2, 5, 7, 5), real(5, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), False, (0, 0), 5), {}
    yield (
        conv,
        (real(2, 3, 5, 5, 5), real(4, 3, 2, 2, 2), None, (2,) * 3, (0,) * 3, (1,) * 3, False, (0,) * 3, 1),
        {},
    )
    yield conv, (real(3, 4, 5), real(4, 5, 3), None, (2,), (1,), (1,), True, (1,), 1), {}
    yield conv, (real(3, 6, 5), real(6, 2, 3), real(6), (2,), (1,), (1,), True, (0,), 3), {}
    yield (
        "convolution_backward",
        (
            real(2, 5, 5),
            real(2, 4, 7),
            real(5, 4, 3),
            (5,),
            (1,),
            (0,),
            (1,),
            False,
            (0,),
            1,
            (True, True, True),
        ),
        {},
    )
    yield "avg_pool2d", (real(2, 3, 9, 7), (3, 2), (2, 2)), {}
    yield "avg_pool2d", (real(2, 3, 9, 7), (3, 2), (2, 1), (1, 1)), {}
    yield "avg_pool2d", (real(3, 9, 7), (3, 2), (2, 2), (1, 0), True, False), {}
    yield "max_pool2d_with_indices", (real(2, 3, 9, 7), (3, 2), (2, 2)), {}
    yield (
        "avg_pool2d_backward",
        (real(2, 3, 4, 3), real(2, 3, 9, 7), (3, 2), (2, 2), (0, 0), False, True, None),
        {},
    )
    x = real(2, 3, 9, 7)
    _, at = torch.ops.aten.max_pool2d_with_indices(x, (3, 2), (2, 2))
    yield (
        "max_pool2d_with_indices_backward",
        (real(*at.shape), x, (3, 2), (2, 2), (0, 0), (1, 1), False, at),
        {},
    )
    yield "upsample_bilinear2d", (real(2, 3, 5, 7), None, False, (2.0, 3.0)), {}
    yield "upsample_nearest2d", (real(2, 3, 5, 7), None, (2.0, 3.0)), {}
    yield "grid_sampler_2d", (real(2, 3, 5, 7), unit(2, 4, 5, 2), 0, 0, False), {}
    yield "sort", (real(3, 5, 7), 1, True), {}
    yield "sort", (real(),), {}
    yield "topk", (real(3, 7), 2), {}
    yield "topk", (real(7, 3), 2, 0, False, True), {}
    yield "cumsum", (real(3, 7), 1), {}
    yield "cumsum", (ints(9, 7, 3), 0), {}
    yield "cumprod", (real(3, 7), 1), {}
    yield "logcumsumexp", (real(3, 7), 1), {}
    yield "index_put", (real(7, 5), (ints(7, 4),), real(4, 5), True), {}
    yield "index_put", (real(7, 5), (ints(7, 4),), real(5), True), {}
    yield "index_put", (real(7, 5, 3), (None, torch.tensor([3, 0])), real(7, 2, 3)), {}
    yield "index_put", (real(7, 5), (ints(7, 4, 1), ints(5, 3)), real(4, 1), True), {}
    yield "index_put", (real(7, 5), (flags(7, 5),), real()), {}
    yield "index_add", (real(7, 5), 0, ints(7, 4), real(4, 5)), {}
    yield "index_copy", (real(7, 5), 0, torch.tensor([4, 1, 6]), real(3, 5)), {}
    yield "scatter", (real(7, 5), 1, torch.tensor([[0, 3]] * 7), real(7, 2)), {}
    yield "scatter", (real(7, 5), 1, torch.tensor([[0, 3]] * 7), 2.5), {}
    yield "scatter_add", (real(7, 5), 1, ints(5, 7, 9), real(7, 9)), {}
    yield "scatter_add", (real(7, 5), 0, ints(7, 4, 3), real(6, 5)), {}
    yield "scatter_add", (real(7), 0, ints(7, 9), real(9)), {}
    yield "scatter_reduce", (real(7, 5), 1, ints(5, 7, 9), real(7, 9), "amax"), {}
    yield "embedding_dense_backward", (real(3, 7, 5), ints(11, 3, 7), 11, -1, False), {}
    yield "embedding_dense_backward", (real(7, 5), ints(11, 7), 11, -1, True), {}
    yield "histc", (real(3, 5), 4, -2, 2), {}
    yield "histc", (real(15), 4), {}
    complex_ = torch.complex(real(3, 5), real(3, 5))
    yield "fft_c2c", (complex_, (1,), 0, True), {}
    yield "fft_r2c", (real(3, 5), (1,), 0, True), {}
    yield "fft_c2r", (complex_, (1,), 0, 8), {}
    yield "view_as_real", (complex_,), {}
    yield "view_as_complex", (real(3, 5, 2),), {}
    yield "as_strided", (real(5, 7), (3, 4), (7, 2), 1), {}
    yield "nonzero", (flags(5, 3),), {}
    yield "masked_select", (real(5), flags(5)), {}
    yield "call", (real(3, 5), real(5, 3)), {"target": "aten.mm.default"}
    yield "call", (real(5), 1.5), {"target": "aten.add.Tensor", "kwargs": (("alpha", 2),)}
    yield "call_random", (real(5), 0.3), {"target": "aten.bernoulli.p", "kwargs": ()}


def draws() -> Iterator[Case]:
    yield "rand", ((3, 5),), {"dtype": F64}
    yield "randn", ((3, 5),), {"dtype": F64}
    yield "randint", (0, 9, (3, 5)), {}
    yield "randperm", (7,), {}
    yield "rand_like", (real(3, 5),), {}
    yield "randn_like", (real(3, 5),), {}
    yield "bernoulli", (positive(5) / 2,), {}
    yield "multinomial", (positive(5), 3), {}
    yield "native_dropout", (real(3, 5), 0.5, True), {}
