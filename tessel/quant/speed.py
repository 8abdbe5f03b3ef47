"""How long a linear layer's product is predicted to take, whole and packed, on a device that need not be here.

    seconds(8192, 8192, 1, torch.bfloat16, integers(4, 128), get_target("h100"))

On a GPU the layer goes through the passes that a compiled model's goes through, and the time model of ``solve`` prices
the kernels with the tiles it would choose; a whole product counts as the template's. A CPU's kernels have forms of
their own (``cpu_time.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..config import Options
from ..errors import TesselError, check
from ..ir.node import Builder, Graph, Node, Value, make_input
from ..ir.types import TensorType
from ..ops import OPS
from ..passes.pipeline import CPU_ONLY, PASSES, run_pipeline
from ..solve import Problem, tile, tile_of
from ..targets import Target
from ..tiles.lower import lower
from .cpu_time import Product, of_format
from .cpu_time import seconds as on_cpu
from .formats import Format
from .linear import table_of

__all__ = ["multiplied_as", "packed_graph", "packed_kernels", "seconds", "sparse_seconds", "stored_bytes"]

_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}


def stored_bytes(n: int, k: int, format: Format | None, dtype: torch.dtype) -> int:
    """Bytes of a weight ``[n, k]`` as a layer stores it: words, scales, zeros; ``None``: whole.

    >>> from .formats import integers
    >>> stored_bytes(4096, 4096, integers(4, 128), torch.bfloat16) * 8 / 4096**2
    4.25
    """
    if format is None:
        return n * k * dtype.itemsize
    words = -(-k // (32 // format.bits))
    groups = k // format.group if format.group > 0 else 1
    return 4 * n * (words + groups * (1 if format.symmetric or format.kind != "int" else 2))


def multiplied_as(inputs: Format, dtype: torch.dtype, target: Target | None) -> str:
    """In words, what rounded inputs are multiplied as where that is not what they are rounded to; else empty.

    >>> from .formats import FORMATS
    >>> multiplied_as(FORMATS["nvfp4"], torch.bfloat16, None)
    'inputs are rounded to float4 and multiplied as bfloat16: no kernel multiplies small floats'
    """
    wide = str(dtype).removeprefix("torch.")
    said = f"inputs are rounded to {inputs.kind}{inputs.bits} and multiplied as {wide}"
    if inputs.kind != "int":
        able = target.name if target is not None and inputs.bits == 8 and "f8" in target.flops else ""
        return f"{said}: no kernel multiplies small floats" + f", which {able} could" * bool(able)
    if target is not None and target.gpu_target is not None:
        return f"{said} on {target.name}: no kernel for GPUs multiplies integers, experts' apart"
    return ""


@lru_cache(maxsize=4096)
def seconds(
    n: int,
    k: int,
    rows: int,
    dtype: torch.dtype,
    format: Format | None,
    target: Target,
    inputs: Format | None = None,
) -> float:
    """The time of ``[rows, k] x [n, k]^T``.

    Args:
        format: of the weight; None: whole.
        inputs: what they are rounded to; None: taken as they are.

    Raises:
        TesselError: there is no time model of the target, or the CPU's rates were never measured.
    """
    if target.vendor == "cpu":
        return _on_cpu(of_format(rows, n, k, dtype, format, inputs), target)
    _need_model(target)
    if format is None:
        return tile_of(Problem.product(rows, n, k, _NAMES[dtype]), target).predicted.total
    return _of_kernels(packed_kernels(n, k, rows, dtype, format, inputs), target)


@lru_cache(maxsize=4096)
def sparse_seconds(n: int, k: int, rows: int, dtype: torch.dtype, target: Target) -> float:
    """The same with 2:4 weights."""
    if target.vendor == "cpu":
        return _on_cpu(Product(rows, n, k, dtype, sparse=True), target)
    _need_model(target)
    inputs = [
        make_input("x", TensorType((rows, k), dtype)),
        make_input("values", TensorType((n, k // 2), dtype)),
        make_input("mask", TensorType((n, -(-k // 32)), torch.int32)),
    ]
    builder = Builder(inputs)
    graph = builder.finish((builder.add(OPS["sparse_linear"], *(i.out for i in inputs)),))
    return _of_kernels(_kernels_of(graph, "2:4 products"), target)


def _need_model(target: Target) -> None:
    if target.gpu_target is None:
        raise TesselError(f"{target.name} has no time model; name a GPU, or the CPU")


def _of_kernels(nodes: Sequence[Node], target: Target) -> float:
    return sum(tile(lower(node), target).predicted.total for node in nodes)


def packed_graph(
    n: int, k: int, rows: int, dtype: torch.dtype, format: Format, rounding: Format | None = None
) -> Graph:
    """The layer as a graph of one ``packed_linear``, before any pass; ``rounding``: of its inputs."""
    groups, per = (k // format.group if format.group > 0 else 1), 32 // format.bits
    zero = format.kind == "int" and not format.symmetric
    f32 = torch.float32
    inputs = [
        make_input("x", TensorType((rows, k), dtype)),
        make_input("words", TensorType((n, -(-k // per)), torch.int32)),
        make_input("scale", TensorType((n, groups), f32)),
        make_input("zero", TensorType((n, groups), f32)) if zero else None,
        make_input("table", TensorType((2**format.bits,), f32)) if table_of(format) is not None else None,
    ]
    given: list[Value | None] = [None if i is None else i.out for i in inputs]
    x, words, scale, zeros, table = given
    builder = Builder([i for i in inputs if i is not None])
    whole = rounding is not None and rounding.kind == "int"  # rounded by the product itself
    if rounding is not None and rounding.kind == "float":
        names = ("group", "exponent", "mantissa", "largest", "scale")
        x = builder.add(OPS["rounded"], x, **{name: getattr(rounding, name) for name in names})
    more = {"inputs": rounding.bits} if rounding is not None and whole else {}
    out = builder.add(OPS["packed_linear"], x, words, scale, zeros, None, table, bits=format.bits, **more)
    return builder.finish((out,))


def packed_kernels(
    n: int, k: int, rows: int, dtype: torch.dtype, format: Format, inputs: Format | None = None
) -> list[Node]:
    """The kernel nodes that the layer becomes on a GPU.

    Raises:
        TesselError: something of it is left that no kernel computes.
    """
    return _kernels_of(packed_graph(n, k, rows, dtype, format, inputs), f"packed products of {format.bits} bits")


def _kernels_of(graph: Graph, what: str) -> list[Node]:
    passes = [p for p in PASSES if p[0] not in CPU_ONLY]
    graph = run_pipeline(graph, Options(matmul="template"), passes=passes)
    alone = [node.op.name for node in graph.nodes if node.op.kind not in ("kernel", "view", "input")]
    check(not alone, lambda: f"{what}: {', '.join(alone)} is outside the kernel")
    return [node for node in graph.nodes if node.op.name == "kernel"]


def _on_cpu(product: Product, target: Target) -> float:
    found = on_cpu(product, target)
    if found is None:
        raise TesselError("the rates of this CPU are unknown: `tessel targets --show cpu` measures them once")
    return found
