"""Triton kernels of losses and experts: products that a host function strings together (``runtime/fused_gpu.py``).

    source = grouped_source("inner", x.dtype, target, {"act": "silu", "interleaved": False, ...})

They are no tile programs: which expert's rows a program has is read on the device, and a row of logits is folded as
it is made. The record is that of the other kernels all the same, so that they are written, launched, interpreted
and compiled for absent GPUs in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import check
from ..ir.types import Dim, TensorType, product, symbol
from ..targets import Target
from ..tiles.header import environment
from ..tiles.kernel import Kernel, Param
from .helpers import helpers_for
from .source import Source

__all__ = ["grouped_source", "loss_source", "packed_source", "packed_tile_of", "source_of", "tile_of"]

_SCRATCH = 2048  # bytes that a program takes beside its tiles: barriers, and sums that warps exchange
SPAN = 8  # blocks of classes that one program folds
_IMPORTS = "import triton\nimport triton.language as tl\n"
_F32, _I32, _I64 = torch.float32, torch.int32, torch.int64
# Offsets into operands and results, as products of sizes: what decides the index type.
_LARGEST = {
    "fold": (("n", "k"), ("v", "k")),
    "gradients": (("n", "k"), ("v", "k"), ("n", "v")),
    **dict.fromkeys(("inner", "product", "back"), (("slots", "k"), ("slots", "n", "two"), ("experts", "b_apart"))),
    "outer": (("slots", "m"), ("slots", "n"), ("experts", "m", "n")),
}


def tile_of(part: str, target: Target, dtype: torch.dtype) -> dict[str, int]:
    """Rows, columns and steps of a tile: what every device's shared memory and registers hold for these kernels.

    ``inner`` sums gate and up at once and ``back`` reads both: half the columns keep that in registers.
    """
    if target.vendor == "interpret":
        return {"BM": 16, "BN": 16, "BK": 16, "num_warps": 1, "num_stages": 1}
    wide = dtype.itemsize == 4
    return {
        "BM": 64,
        "BN": 32 if part in ("inner", "back") else 64,
        "BK": 32 if wide else 64,
        "num_warps": 4,
        "num_stages": 2,
    }


def loss_source(part: str, dtype: torch.dtype, target: Target, attrs: Mapping[str, Any], bias: bool) -> Source:
    """``fold`` or ``gradients`` of ``linear_loss.triton.j2``.

    Args:
        part: the kernel. ``fold`` gives for each span of classes the largest logit, the sum of exponentials less it,
            the plain sum and the picked logit of each token; ``gradients`` gives that of a chunk of logits.
        dtype: of x, weight and bias.
        attrs: of the operator, ``classes`` filled in.
        bias: whether there is one.
    """
    params: list[tuple[str, torch.dtype]] = [("x", dtype), ("weight", dtype), *([("bias", dtype)] if bias else [])]
    params.append(("target", _I64))
    sizes = ["n", "v", "k", "x_step", "w_step"]
    if part == "fold":
        outs = [(name, _F32) for name in ("top", "total", "plain", "picked")]
    else:
        params += [("lse", _F32), ("grad", _F32)]
        sizes.append("first")
        outs = [("d", dtype)]
    smoothing = attrs.get("label_smoothing", 0.0)
    context = {
        "bias": bias,
        "ignore": attrs.get("ignore_index", -100),
        "offset": attrs.get("offset", 0),
        "softcap": attrs.get("softcap", 0.0),
        "even": smoothing / attrs["classes"],
        "own": 1.0 - smoothing,
    }
    more = {"SPAN": SPAN} if part == "fold" else {}
    return _source("linear_loss", part, params, outs, sizes, context, target, dtype, more)


# Of each kernel: what it reads in the dtype of the layer, what else, what it writes, its sizes.
_ROUTE = (("order", _I32), ("bounds", _I32))
_BY_EXPERT = ["experts", "n", "k", "b_apart", "b_column", "b_row", "slots", "choices"]


def grouped_source(part: str, dtype: torch.dtype, target: Target, attrs: Mapping[str, Any]) -> Source:
    """``inner``, ``product``, ``back`` or ``outer`` of ``grouped.triton.j2``.

    Args:
        part: ``inner``: rows of tokens times gate and up, and what becomes of them; ``product``: rows of slots times
            a matrix, in f32; ``back``: the gradient through down and the gate; ``outer``: a gradient of the matrices.
        dtype: of tokens and matrices.
        attrs: ``act``, ``interleaved``, ``alpha``, ``limit``, and the switches ``bias``, ``scaled``, ``keep`` and
            ``gathered`` of the part at hand.
    """
    check(part in ("inner", "product", "back", "outer"), lambda: f"no grouped kernel {part!r}")
    context = {"act": "silu", "interleaved": False, "alpha": 1.0, "limit": 0.0, "bias": False, "scaled": False}
    context |= {"keep": False, "gathered": "", "part": part, "packed": None, **attrs}
    params: list[tuple[str, torch.dtype]] = [("a", dtype), ("b", dtype)]
    sizes = list(_BY_EXPERT)
    if part == "inner":
        params += [("bias", dtype)] if context["bias"] else []
        outs = [("h", dtype), *([("pre", dtype)] if context["keep"] else [])]
    elif part == "product":
        params += [("bias", dtype)] if context["bias"] else []
        params += [("scale", _F32)] if context["scaled"] else []
        outs = [("out", _F32)]
    elif part == "back":
        params += [("pre", dtype), ("scale", _F32)]
        outs = [("dpre", dtype), ("h", dtype), ("parts", _F32)]
    else:
        outs = [("out", dtype)]
        sizes = ["m", "n", "experts", "slots", "choices"]
    return _source("grouped", part, [*params, *_ROUTE], outs, sizes, context, target, dtype, {})


_PACKED_SIZES = ["experts", "n", "k", "row_words", "groups", "slots", "choices"]


def packed_tile_of(part: str, target: Target, dtype: torch.dtype) -> dict[str, int]:
    """``tile_of``, where the matrices' numbers are made in registers, each out of a word, a scale and a zero."""
    knobs = {**tile_of(part, target, dtype), "num_stages": 1}
    return knobs if target.vendor == "interpret" else {**knobs, "BN": 32, "BK": 32}


def packed_source(part: str, dtype: torch.dtype, target: Target, attrs: Mapping[str, Any]) -> Source:
    """``inner`` or ``product`` of ``grouped.triton.j2``, of matrices stored in few bits.

    Args:
        part, dtype: as of ``grouped_source``; dtype is of tokens, and of what ``inner`` gives.
        attrs: as of ``grouped_source``, and ``packed``: ``bits``, and the switches ``zero``, ``table``, ``once`` (a
            step along k meets one group) and ``whole`` (the left operand is int8 with a scale a row).
    """
    check(part in ("inner", "product"), lambda: f"no grouped kernel {part!r} of packed matrices")
    context: dict[str, Any] = {"act": "silu", "interleaved": False, "alpha": 1.0, "limit": 0.0, "bias": False}
    context |= {"scaled": False, "keep": False, "part": part, **attrs}
    packed = context["packed"]
    fits = not packed["whole"] or (packed["once"] and not packed["table"])
    check(fits, lambda: f"grouped kernel {part!r}: whole numbers need a scale a step, and integers")
    params: list[tuple[str, torch.dtype]] = [("a", torch.int8 if packed["whole"] else dtype), ("words", _I32)]
    params += [("scales", _F32), *([("zeros", _F32)] * packed["zero"]), *([("table", _F32)] * packed["table"])]
    params += [("a_scale", _F32)] * packed["whole"] + [("bias", dtype)] * context["bias"]
    params += [("scale", _F32)] * (part == "product")
    outs = [("h", dtype)] if part == "inner" else [("out", _F32)]
    knobs, products = packed_tile_of(part, target, dtype), 2 if part == "inner" else 1
    held = knobs["BK"] * (knobs["BM"] + products * knobs["BN"]) * dtype.itemsize
    smem = max(held, knobs["BM"] * knobs["BN"] * 4) + _SCRATCH
    stack = ("experts", "n", "two")
    names = (("slots", "k"), ("slots", "n", "two"), (*stack, "row_words"), (*stack, "groups"))
    largest = [product(2 if name == "two" else symbol(name) for name in of) for of in names]
    return source_of("grouped", part, [*params, *_ROUTE], outs, _PACKED_SIZES, context, target, knobs, smem, largest)


def _source(
    family: str,
    part: str,
    params: Sequence[tuple[str, torch.dtype]],
    outs: Sequence[tuple[str, torch.dtype]],
    sizes: Sequence[str],
    context: Mapping[str, Any],
    target: Target,
    dtype: torch.dtype,
    more: Mapping[str, int],
) -> Source:
    knobs = {**tile_of(part, target, dtype), **more}
    operands = 3 if part == "inner" else 2  # tiles of the left operand and of one or two right ones
    tile_bytes = max(knobs["BM"], knobs["BN"]) * knobs["BK"] * dtype.itemsize
    smem = max(operands * tile_bytes * knobs["num_stages"], knobs["BM"] * knobs["BN"] * 4) + _SCRATCH
    largest = [product(2 if name == "two" else symbol(name) for name in names) for names in _LARGEST[part]]
    return source_of(family, part, params, outs, sizes, context, target, knobs, smem, largest)


def source_of(
    family: str,
    part: str,
    params: Sequence[tuple[str, torch.dtype]],
    outs: Sequence[tuple[str, torch.dtype]],
    sizes: Sequence[str],
    context: Mapping[str, Any],
    target: Target,
    knobs: Mapping[str, int],
    smem_bytes: int,
    largest: Sequence[Dim],
) -> Source:
    """A kernel that is no tile program: macro ``part`` of ``<family>.triton.j2``, as a record like the others'.

    Args:
        params, outs: names of the tensors that it reads, and writes.
        sizes: names of its integers, in the order that they follow the tensors.
        context: what the template is told beside ``name`` and ``args``.
        knobs: tile sizes, ``num_warps`` and ``num_stages``.
        smem_bytes: shared memory that a program takes at most.
        largest: what offsets may reach, expressions over the sizes.
    """
    name = f"{family}_{part}"
    args = (*(f"{p}_ptr" for p, _ in (*params, *outs)), *sizes)
    module: Any = environment().get_template(f"{family}.triton.j2").module
    text = str(getattr(module, part)({"name": name, "args": args, **context}))
    code = "\n".join(line.rstrip() for line in text.split("\n") if line.strip()) + "\n"
    interpret = target.vendor == "interpret"
    size = TensorType((symbol("numel"),), _F32)
    record = tuple(Param(p, size.with_(dtype=d), i >= len(params), i) for i, (p, d) in enumerate((*params, *outs)))
    return Source(
        name=name,
        header=f"# {part} of {family}\n# tile: {', '.join(f'{n}={v}' for n, v in knobs.items())}\n",
        body="\n\n".join([_IMPORTS, *(h + "\n" for h in helpers_for(code, interpret)), code]),
        args=args,
        sizes=tuple(sizes),
        grid=(),
        constexprs=knobs,
        knobs=knobs,
        smem_bytes=smem_bytes,
        extents=tuple(largest),
        always_wide=False,
        checks=False,
        interpret=interpret,
        kernel=Kernel(name, family, record, (), ()),
    )
