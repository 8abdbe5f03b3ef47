"""Every private or moving torch name that the frontend needs, in one place.

Supported: torch 2.11 to 2.15. A name that changed between those releases is resolved here once, so
that the rest of the frontend reads as if torch had one stable interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sympy
import torch
import torch._functorch.config
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion
from torch.utils import _pytree as pytree

__all__ = [
    "SCAN_CUTS_CARRY",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "aot_autograd",
    "aot_module_simplified",
    "aot_options",
    "autocast_disabled",
    "autocasts",
    "boxed",
    "compiling_backend",
    "core_decompositions",
    "default_store",
    "detect_fake_mode",
    "dynamo_source",
    "export_decompositions",
    "for_tessel",
    "guarded_equalities",
    "input_index",
    "keeps_graph",
    "make_fx",
    "min_cut_rematerialization_partition",
    "more_decompositions",
    "pytree",
    "size_hints",
    "static_input_indices",
    "unbacked_bindings",
    "without_modes",
]


# ``scan`` of torch 2.11 gives a carry no gradient, in later steps either, if its first value needs none.
SCAN_CUTS_CARRY = TorchVersion(torch.__version__) < "2.13"


def aot_options() -> AbstractContextManager[Any]:
    """The settings of AOTAutograd that the importer relies on: no tokens among inputs and outputs."""
    return torch._functorch.config.patch(unlift_effect_tokens=True)  # type: ignore[no-any-return]


def boxed(fn: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """Mark a callable as taking one list, which it may clear so that inputs are freed early."""
    fn._boxed_call = True  # type: ignore[attr-defined]
    return fn


def compiling_backend() -> Any:
    """The backend that what Dynamo is tracing goes to, without torch's wrappers; None outside a trace."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tx = InstructionTranslator.current_tx()
    found = tx.output.compiler_fn if tx is not None else None
    inner = found
    while inner is not None:
        found = inner
        inner = getattr(found, "_torchdynamo_orig_backend", None) or getattr(found, "compiler_fn", None)
    return found


@torch._dynamo.assume_constant_result
def for_tessel() -> bool:
    """Whether what is being traced goes to Tessel; a constant to Dynamo."""
    return str(getattr(compiling_backend(), "__module__", "")).split(".")[0] == __name__.split(".")[0]


def without_modes() -> AbstractContextManager[Any]:
    """Real tensors and real arithmetic inside, whatever is being traced."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()  # type: ignore[no-any-return]


def core_decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's core decompositions of functional operators that AOTAutograd itself leaves whole."""
    from torch import _decomp

    named = getattr(_decomp, "_core_aten_decompositions_post_autograd", None)
    table = named() if named is not None else _decomp.core_aten_decompositions()
    return dict(table)


def more_decompositions(ops: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """Torch's decompositions of the given operators, where it has any."""
    from torch._decomp import get_decompositions

    return dict(get_decompositions(ops))


def export_decompositions() -> Any:
    """The table that ``ExportedProgram.run_decompositions`` uses by default; entries may be popped."""
    from torch.export import default_decompositions

    return default_decompositions()


def static_input_indices() -> tuple[int, ...]:
    """Positions of the inputs whose storage stays the same from call to call (parameters, buffers).

    Only known while AOTAutograd compiles a forward or inference graph; empty otherwise.
    """
    context = TracingContext.try_get()
    meta = getattr(context, "fw_metadata", None)
    return tuple(getattr(meta, "static_input_indices", None) or ())


def input_index(placeholder: torch.fx.Node) -> int | None:
    """Which argument of the captured graph a placeholder of an AOTAutograd graph stands for."""
    return getattr(placeholder.meta.get("desc"), "idx", None)


def dynamo_source(placeholder: torch.fx.Node) -> str:
    """Where Dynamo read a graph input from, as text like ``L['self']._modules['fc']``; "" if unknown."""
    arg = placeholder.meta.get("grapharg")
    source = getattr(arg, "source", None)
    if source is None:
        source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else str(name)


def unbacked_bindings(node: torch.fx.Node) -> dict[Any, Any]:
    """Symbols that a node introduces, each with the path into its result where the value is read."""
    found = node.meta.get("unbacked_bindings")
    if not found:
        return {}
    # Tracing again makes new symbols, which torch knows to be the old ones.
    env = _shape_env(node.meta.get("val"))
    return dict(symbolic_shapes.resolve_unbacked_bindings(env, found) or {})


def _shape_env(val: Any) -> Any:
    """The shape environment of a symbolic number, of a fake tensor, or of the first in a tuple."""
    stack = [val]
    while stack:
        x = stack.pop()
        if isinstance(x, tuple | list):
            stack.extend(reversed(x))
        elif isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
            return x.node.shape_env
        elif isinstance(x, FakeTensor) and x.fake_mode.shape_env is not None:
            return x.fake_mode.shape_env
    return None


def size_hints(value: Any) -> dict[str, int]:
    """What each symbolic size was in the example inputs, by the symbol's name.

    Args:
        value: a symbolic number, a fake tensor, or a tuple of these.
    """
    env = _shape_env(value)
    if env is None:
        return {}
    # torch 2.13 renamed the table.
    table = getattr(env, "backed_var_to_val", None)
    if table is None:
        table = getattr(env, "var_to_val", {})
    hints = {}
    for sym, value in table.items():
        if getattr(value, "is_Integer", False):
            hints[str(sym)] = int(value)
    return hints


def guarded_equalities(value: Any) -> list[tuple[Any, Any]]:
    """Pairs of size expressions that torch has guarded to be equal, from any symbolic number.

    A graph runs only where its guards hold, so either side may stand for the other.
    """
    env = _shape_env(value)
    pairs = []
    for guard in getattr(env, "guards", ()):
        expr = getattr(guard, "expr", None)
        if isinstance(expr, sympy.Eq):
            pairs.append((expr.lhs, expr.rhs))
    return pairs


@contextmanager
def autocast_disabled() -> Iterator[None]:
    """Skip the autocast dispatch keys: what an autocast kernel wraps around its own redispatch."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        yield


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; of ``meta``, which has none, torch refuses to be asked.

    >>> autocasts("cpu"), autocasts("meta")
    (False, False)
    """
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def keeps_graph() -> bool:
    """Whether the backward that is running keeps what was saved for it (``retain_graph=True``)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())  # type: ignore[attr-defined]


def default_store() -> Any:
    """The key-value store that the processes of torch.distributed's default group share."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
