"""View operators as torch calls, and the strides that torch gives their results."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import TesselError
from ..ir.node import Node
from ..ir.types import Dim, TensorType, contiguous_strides, dim_equal, simplify_dim
from ..ops.view import view_strides
from .sizes import size_text

__all__ = ["reshape_strides", "view_text"]


def view_text(node: Node, x: str) -> tuple[str, tuple[Dim, ...] | None]:
    """The call for a view node on the value called ``x``, and the strides of what it returns.

    The strides are ``None`` where they cannot be told.
    """
    t, out, attrs = node.args[0].type, node.type, node.attrs
    name = node.op.name
    if name == "reshape":
        return f"{x}.reshape({_tuple(out.shape)})", reshape_strides(t, out.shape)
    if name == "permute":
        dims = attrs["dims"]
        return f"{x}.permute({_tuple(dims)})", tuple(t.strides[d] for d in dims)
    if name == "expand":
        new = out.rank - t.rank
        strides: list[Dim] = [0] * new
        for size, stride, want in zip(t.shape, t.strides, out.shape[new:], strict=True):
            strides.append(stride if dim_equal(size, want) else 0)
        return f"{x}.expand({_tuple(out.shape)})", tuple(strides)
    if name == "slice":
        d, start, size = attrs["dim"] % t.rank, attrs["start"], attrs["size"]
        step = attrs.get("step", 1)
        # Torch clips the stop, so a step that does not divide the rest gives the same length.
        stop = simplify_dim(start + size * step)
        part = f"{_size(start)}:{_size(stop)}" + (f":{_size(step)}" if step != 1 else "")
        where = ", ".join([":"] * d + [part])
        kept = list(t.strides)
        kept[d] = simplify_dim(kept[d] * step)
        return f"{x}[{where}]", tuple(kept)
    if name == "flip":
        return f"{x}.flip({_tuple(attrs['dims'])})", None
    raise TesselError(f"no host code for the view {name} at {node.loc}")


def _size(d: Dim) -> str:
    return size_text(d, whole=True)


def _tuple(dims: Sequence[Dim]) -> str:
    return f"({_size(dims[0])},)" if len(dims) == 1 else f"({', '.join(map(_size, dims))})"


def reshape_strides(t: TensorType, shape: Sequence[Dim]) -> tuple[Dim, ...] | None:
    """Strides of torch's ``reshape`` where they can be told: of a view, or of a row-major tensor.

    >>> import torch
    >>> reshape_strides(TensorType((2, 3, 4), torch.float32), (6, 4))
    (4, 1)
    """
    return contiguous_strides(shape) if t.contiguous else view_strides(t, shape)
