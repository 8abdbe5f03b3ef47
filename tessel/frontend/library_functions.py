"""Functions of libraries that Dynamo traces as the operators that they compute, where both are shown to be equal.

    x = mamba2_chunk_scan(h, dt, A, B, C, ...)     traced as     tessel::linear_attention, see ``library_forms``

A model's own code says what it computes in many operators, written for clarity or for other kernels. For a few
functions of transformers that computation is known: found by name in modules that are loaded, each is run once
beside Tessel's form of it on small random numbers, with gradients, and the form takes its place only if both give the
same. Otherwise it is traced as it is, and a note in the report says why. For every other backend nothing changes, and
neither does a function in whose place the library has put a kernel of its own.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .compat import autocast_disabled, for_tessel, pytree, without_modes
from .library_forms import FUNCTIONS, Sample, experts_samples, grouped_experts

__all__ = ["exporting", "register", "seen_notes"]

_MODULES = "transformers.models."
_FAR = 1e-4  # relative to the largest element; both are float32 in another order of operations
_local = threading.local()
_looked_at: set[str] = set()
_found: list[_Function] = []
_lock = threading.Lock()


def register() -> None:
    """Tell Dynamo of the functions of modules loaded since the last call; for the whole process."""
    with _lock:
        for name, module in list(sys.modules.items()):
            if name.startswith(_MODULES) and ".modeling_" in name and name not in _looked_at:
                _looked_at.add(name)
                for made in (*_functions(module), *_experts(module)):
                    _found.append(made)
                    _substitute(made.original, len(_found) - 1)


def seen_notes() -> list[str]:
    """What was met in the trace that ends now, in words, each once; the next trace starts without."""
    notes, _local.notes = getattr(_local, "notes", []), []
    return list(dict.fromkeys(notes))


@contextmanager
def exporting() -> Iterator[None]:
    """Functions of modules are their forms in the block: for a tracer that runs Python itself, as ``torch.export``
    does."""
    register()
    held: list[tuple[Any, str, Any]] = []
    try:
        for found in _found:
            place: Any = sys.modules.get(found.original.__module__) if found.cell is None else found.cell
            name = found.original.__name__ if found.cell is None else "cell_contents"
            if place is not None:
                held.append((place, name, getattr(place, name)))
                setattr(place, name, _exported(found, held[-1][-1]))
        yield
    finally:
        for place, name, before in held:
            setattr(place, name, before)


def _exported(found: _Function, before: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        packed = any(kwargs.get(name) is not None for name in ("cu_seqlens", "seq_idx"))  # refused by what wraps it
        return (before if packed or _noted(found) else found.form)(*args, **kwargs)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (before if _noted(found, type(self), self.config) else found.form)(self, *args, **kwargs)

    return function if found.cell is None else method


@dataclass
class _Function:
    """A function of a library.

    Attributes:
        original: the function, without what is wrapped around it.
        form: computes the same.
        what: that it is traced as, in words.
        samples: of calls, for a class and the config of its module if it is a method.
        cell: where the ``forward`` that dispatches has a loop over experts; ``None`` for a function of a module.
        verdicts: why the form is not taken, empty if it is; by class.
    """

    original: types.FunctionType
    form: Callable[..., Any]
    what: str
    samples: Callable[..., Iterator[Sample]]
    cell: types.CellType | None = None
    verdicts: dict[Any, str] = field(default_factory=dict)

    def refused(self, *of: Any) -> str:
        """Why the form is not taken, in words; empty if it is."""
        key = of[0] if of else None
        if key not in self.verdicts:
            with without_modes(), torch.inference_mode(False), torch.enable_grad(), autocast_disabled():
                self.verdicts[key] = self._compared(*of)
        return self.verdicts[key]

    def _compared(self, *of: Any) -> str:
        if not of and _parameters(self.original) != _parameters(self.form):
            return "its parameters are not those that are known"
        try:
            for args, kwargs in self.samples(*of):
                want, got = (_run(f, args, kwargs) for f in (self.original, self.form))
                far = max(map(_distance, got, want)) if len(got) == len(want) else float("inf")
                if not far <= _FAR:
                    return f"on a sample its results differ from what it is taken for, by {far:.2g} of the largest"
        except Exception as e:  # whatever a library's code raises: it is then not what is known
            return f"it cannot be tried: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        return ""


def _parameters(fn: Callable[..., Any]) -> list[tuple[Any, ...]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(fn).parameters.values()]


def _run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Results and gradients of all that is differentiable in a call."""
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
    given += [p for x in args if isinstance(x, torch.nn.Module) for p in x.parameters()]
    results = [x for x in pytree.tree_leaves(fn(*args, **kwargs)) if isinstance(x, torch.Tensor)]
    total = torch.stack([(x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in results]).sum()
    return [x.detach() for x in (*results, *torch.autograd.grad(total, given, materialize_grads=True))]


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest element, which is about 1 in samples."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    far = (got - want).abs().max() / want.abs().max().clamp_min(1e-3)
    return float(far) if far == far else float("inf")


# ---------------------------------------------------------------- finding


def _functions(module: types.ModuleType) -> Iterator[_Function]:
    for name, (form, samples) in FUNCTIONS.items():
        original = inspect.unwrap(vars(module).get(name, None))  # type: ignore[arg-type]
        if isinstance(original, types.FunctionType) and original.__module__ == module.__name__:
            yield _Function(original, form, "tessel::linear_attention", samples)


def _experts(module: types.ModuleType) -> Iterator[_Function]:
    """The loops over experts of classes whose ``forward`` transformers dispatches."""
    form = grouped_experts()
    for kind in list(vars(module).values()):
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module) or kind.__module__ != module.__name__:
            continue
        forward = vars(kind).get("forward")
        if form is None or not isinstance(forward, types.FunctionType):
            continue
        cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
        if "experts_interface" in cells:
            original, cell = inspect.unwrap(forward), cells.get("original_forward")
            if isinstance(original, types.FunctionType) and cell is not None:
                yield _Function(original, form, "grouped products of all experts", experts_samples, cell)


# ---------------------------------------------------------------- tracing


@torch._dynamo.assume_constant_result
def _taken(index: int, *of: Any) -> bool:
    """Whether the form of a function is traced in its place."""
    return for_tessel() and not _noted(_found[index], *of)


def _noted(found: _Function, *of: Any) -> str:
    """Why the form of a function is not taken, empty if it is; ``seen_notes`` will say either."""
    refused = found.refused(*of)
    name = f"{found.original.__module__}.{found.original.__qualname__}"
    words = f"is traced as it is: {refused}" if refused else f"is computed as {found.what}: equal on samples"
    _local.notes = [*getattr(_local, "notes", []), f"{name} {words}"]
    return refused


def _substitute(original: types.FunctionType, index: int) -> None:
    # A second function with the same code: the first is what Dynamo replaces.
    plain = types.FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )
    plain.__kwdefaults__ = original.__kwdefaults__
    form = _found[index].form
    names = tuple(inspect.signature(original).parameters)

    def function(*args: Any, **kwargs: Any) -> Any:
        return form(*args, **kwargs) if _taken(index) else plain(*args, **kwargs)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _taken(index, type(self), self.config):
            return form(self, *args, *[kwargs[n] for n in names[1 + len(args) :]])
        return plain(self, *args, **kwargs)

    traced = function if _found[index].cell is None else method
    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(traced)
