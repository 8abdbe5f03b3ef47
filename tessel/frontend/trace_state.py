"""What a trace of Dynamo depends on: the state of the process, the frame, the values of sources, files, global names.

``recorded`` writes it down with a capture, and compares it before the capture is put back.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .fingerprint import Fingerprints

__all__ = [
    "NoRecord",
    "digest",
    "digests",
    "find_object",
    "frame_of",
    "importable",
    "memory_of",
    "need",
    "process_state",
    "value_at",
]


class NoRecord(Exception):
    """A reason not to record or not to put back."""


def need(holds: bool, otherwise: str) -> None:
    """Raise ``NoRecord`` with these words unless something holds."""
    if not holds:
        raise NoRecord(otherwise)


def frame_of(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[types.FunctionType, dict[str, Any]]:
    """The function whose frame Dynamo compiles, and the names in that frame when it starts."""
    own: tuple[Any, ...] = ()
    if isinstance(fn, types.MethodType):
        own, fn = (fn.__self__,), fn.__func__
    need(isinstance(fn, types.FunctionType), "no plain function")
    assert isinstance(fn, types.FunctionType)
    code = fn.__code__
    # Not the signature of what it wraps, and no defaults where the code has none.
    bound = inspect.signature(fn, follow_wrapped=False).bind(*own, *args, **kwargs)
    bound.apply_defaults()
    scope = dict(bound.arguments)
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        scope[name] = cell.cell_contents
    return fn, scope


def importable(name: str, x: Any) -> tuple[str, str, str]:
    """How another process comes by an object that Dynamo made a global name for."""
    if isinstance(x, types.ModuleType):
        found = ("module", x.__name__, "")
    elif isinstance(x, dict):
        found = ("names", str(x.get("__name__")), "")
    else:
        found = ("object", str(getattr(x, "__module__", "")), str(getattr(x, "__qualname__", "")))
    try:
        same = find_object(*found) is x
    except (AttributeError, ImportError, ValueError):
        same = False
    need(same, f"the global name {name} was made for {type(x).__name__}")
    return found


def find_object(kind: str, module: str, path: str) -> Any:
    """What ``importable`` said where to find."""
    x: Any = importlib.import_module(module)
    if kind == "names":
        return x.__dict__
    for part in path.split(".") if kind == "object" else ():
        x = getattr(x, part)
    return x


def value_at(source: Any, global_scope: dict[str, Any], local_scope: dict[str, Any], values: dict[Any, Any]) -> Any:
    """The value of one of Dynamo's sources, with those it goes through in ``values``."""
    return source.get_value({"G": global_scope, "L": local_scope, **_words()}, {}, values)


@functools.cache
def _words() -> dict[str, Any]:
    from torch._dynamo.guards import _get_closure_vars

    return dict(_get_closure_vars())


def memory_of(values: Iterable[Any]) -> list[tuple[int, int]]:
    """Which tensors are one, and which lie in one memory, each as the place of the first such value."""
    objects: dict[int, int] = {}
    memory: dict[int, int] = {}
    out = []
    for i, x in enumerate(values):
        if isinstance(x, torch.Tensor):
            lies = x.untyped_storage()._cdata if x.layout == torch.strided else -id(x)
            out.append((objects.setdefault(id(x), i), memory.setdefault(lies, i)))
    return out


def digests(traced: Sequence[types.CodeType]) -> dict[str, str]:
    """Digests of the files that traced code is from, torch's own left out: its release is part of the key."""
    need(bool(traced), "torch does not say what it traced")
    # Frozen modules are of the Python release. Text given to exec (the methods of dataclasses) has no file: classes
    # and functions are named by their bytecode as well.
    known = (os.path.dirname(torch.__file__) + os.sep, "<frozen ", "<string>")
    return {name: digest(name) for name in sorted({c.co_filename for c in traced}) if not name.startswith(known)}


def digest(name: str) -> str:
    """Of a file's bytes."""
    try:
        with open(name, "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()
    except OSError as e:
        raise NoRecord(f"the source {name} cannot be read") from e


def process_state() -> dict[str, Any]:
    """The state of the process that a trace depends on and no source names."""
    state = torch._C._dynamo.guards.GlobalStateGuard()
    return {
        "state": state.__getstate__(),  # gradients, autocast, threads, deterministic algorithms, default type
        "hooks": torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        "device": str(torch.utils._device.CURRENT_DEVICE),
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "inference": torch.is_inference_mode_enabled(),
        "forward": torch.autograd.forward_ad._current_level,
        "anomaly": torch.is_anomaly_enabled(),
        "dynamo": _hash_of(torch._dynamo.config),
        "aot": _hash_of(torch._functorch.config),
    }


def _hash_of(config: Any) -> str:
    return Fingerprints().of(dict(config.get_serializable_config_copy()))
