"""Which ATen operators AOTAutograd and ``torch.export`` open before the importer sees them.

Torch's core decompositions, less what the importer turns into IR itself (it is faster, and composites
stay whole) and less what is better as one opaque call than as many small operators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from .aten import TABLE
from .compat import core_decompositions, export_decompositions, more_decompositions

# Whole, as opaque calls: random draws keep eager's generator state, forward and backward of fused
# attention must agree, and one library call beats a dozen gathers for resampling.
_OPAQUE = frozenset(
    "bernoulli native_dropout rand_like randn_like randint_like embedding_dense_backward "
    "_scaled_dot_product_flash_attention_for_cpu scaled_dot_product_attention grid_sampler_2d "
    "upsample_bilinear2d upsample_nearest2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d "
    "upsample_nearest1d upsample_nearest3d multi_margin_loss _weight_norm_interface im2col col2im "
    "max_unpool2d max_unpool3d renorm".split()
)

# Beyond the core set: forward forms that only some graphs hold.
_MORE = (
    "_adaptive_avg_pool2d_backward addmv adaptive_max_pool2d batch_norm_backward dist elu_backward lcm "
    "native_batch_norm rrelu_with_noise_backward tril_indices triu_indices hann_window permute_copy unbind_copy "
    "as_strided_copy"
).split()


def keeps_whole(name: str) -> bool:
    """Whether ``aten.<name>.<overload>`` reaches the importer as it is.

    >>> keeps_whole("aten.gelu.default"), keeps_whole("aten.huber_loss.default")
    (True, False)
    """
    return name in TABLE or name.split(".")[1] in _OPAQUE


@lru_cache(maxsize=1)
def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for AOTAutograd."""
    packets = [getattr(torch.ops.aten, n) for n in _MORE if hasattr(torch.ops.aten, n)]
    table = {**core_decompositions(), **more_decompositions(packets)}
    return {op: fn for op, fn in table.items() if not _kept(op)} | _copies()


def _copies() -> dict[Any, Callable[..., Any]]:
    """Copying forms of views that torch has no decomposition for; functionalized steps of loops hold them."""
    aten = torch.ops.aten
    views = {aten.slice_copy.Tensor: aten.slice.Tensor, aten.select_copy.int: aten.select.int}
    views |= {aten.split_copy.Tensor: aten.split.Tensor, aten._reshape_alias_copy.default: aten._reshape_alias.default}
    return {copy: _copied(view) for copy, view in views.items()}


def _copied(view: Callable[..., Any]) -> Callable[..., Any]:
    def copy(*args: Any, **kwargs: Any) -> Any:
        got = view(*args, **kwargs)
        if isinstance(got, torch.Tensor):
            return got.clone(memory_format=torch.contiguous_format)
        return [x.clone(memory_format=torch.contiguous_format) for x in got]

    return copy


def for_export() -> Any:
    """The table for ``ExportedProgram.run_decompositions`` (a fresh one: torch changes it)."""
    table = export_decompositions()
    for op in list(table):
        if _kept(op):
            table.pop(op)
    return table


def _kept(op: Any) -> bool:
    return getattr(op, "namespace", "") == "aten" and keeps_whole(str(op))
