"""Fingerprints of Python objects: equal in two processes only where a trace of them would be.

    Fingerprints().of(model.forward)        # names the code, its constants, defaults and what it closes over

A value is named by type and content, a function by its bytecode, a class by the bytecode of its methods and those
of its bases, a tensor by everything but its numbers. Objects of other classes are named by their class alone:
whoever reads an attribute of one has to take the fingerprint of that attribute as well.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Fingerprints"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_DEEP, _LONG = 6, 10_000
_NO_CONTENT = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl", "__abstractmethods__"})
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, so that its attributes can be set
_MARKS = ("_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices", "_dynamo_unbacked_indices")


class Fingerprints:
    """Fingerprints taken at one moment; each function and class is looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}
        self._held: list[Any] = []  # so that no id is used again

    def of(self, x: Any, depth: int = 0) -> str:
        """The fingerprint of any object, at most some hundred characters."""
        text = self._text(x, depth)
        return text if len(text) < 200 else _digest(text)

    def _text(self, x: Any, depth: int) -> str:
        kind = type(x)
        if kind in _PLAIN or kind in _TORCH:
            return f"{kind.__name__} {x!r}"
        if isinstance(x, torch.Tensor):
            return self._tensor(x)
        if isinstance(x, type):
            return self._once(x, self._class, depth)
        if isinstance(x, types.FunctionType):
            return self._once(x, self._function, depth)
        if isinstance(x, types.CodeType):
            return f"code {_code(x)}"
        if isinstance(x, types.MethodType):
            return f"method {self.of(x.__func__, depth)} of {self.of(type(x.__self__), depth)}"
        if isinstance(x, types.ModuleType):
            return f"module {x.__name__}"
        if isinstance(x, types.BuiltinFunctionType | types.WrapperDescriptorType | types.MethodDescriptorType):
            return f"builtin {getattr(x, '__module__', '')} {x.__qualname__}"
        own = self.of(kind, depth) if kind.__flags__ & _HEAP_TYPE else kind.__qualname__
        if isinstance(x, enum.Enum):
            return f"{own} {x.name}"
        if isinstance(x, staticmethod | classmethod):
            return f"{own} {self.of(x.__func__, depth)}"
        if isinstance(x, property):
            return f"{own} {[self.of(f, depth) for f in (x.fget, x.fset, x.fdel)]}"
        if isinstance(x, functools.partial):
            return f"{own} {self._inner([x.func, x.args, x.keywords], depth)}"
        if isinstance(x, torch.nn.Module):
            names = [list(held) for held in (x._parameters, x._buffers, x._modules)]
            return f"{own} training={x.training} {names} {sorted(x.__dict__)}"
        if isinstance(x, Mapping):
            if kind.__module__ not in ("builtins", "collections"):
                return f"{own} of {len(x)}"
            return f"{own} {[self._inner(i, depth) for i in x.items()] if len(x) < _LONG else len(x)}"
        if kind in (list, tuple):
            return f"{own} {[self._inner(i, depth) for i in x] if len(x) < _LONG else len(x)}"
        if kind in (set, frozenset):
            return f"{own} {sorted(self._inner(i, depth) for i in x)}"
        wrapped = getattr(x, "__dict__", {}).get("__wrapped__")  # a cache around a function
        return f"an {own} {self._inner(wrapped, depth) if wrapped is not None else ''}"

    def _inner(self, x: Any, depth: int) -> str:
        """What lies in a container: its values and functions, not objects in objects in objects."""
        return self.of(x, depth + 1) if depth < _DEEP else type(x).__qualname__

    def _once(self, x: Any, look: Any, depth: int) -> str:
        found = self._known.get(id(x))
        if found is None:
            self._held.append(x)
            self._known[id(x)] = f"{x.__module__}.{x.__qualname__}"  # met again inside itself
            found = self._known[id(x)] = look(x, depth)
        return found

    def _function(self, x: types.FunctionType, depth: int) -> str:
        cells = [c.cell_contents for c in x.__closure__ or () if _filled(c)]
        rest = _digest(f"{self._inner([x.__defaults__, x.__kwdefaults__], depth)}{self._inner(cells, depth)}")
        return f"function {x.__module__}.{x.__qualname__} {_code(x.__code__)} {rest}"

    def _class(self, x: type, depth: int) -> str:
        if not x.__flags__ & _HEAP_TYPE:
            return f"class {x.__module__}.{x.__qualname__}"
        content = [f"{k} {self._inner(v, 1)}" for k, v in vars(x).items() if k not in _NO_CONTENT]
        bases = [self._once(b, self._class, depth) for b in x.__mro__[1:]]
        return f"class {x.__module__}.{x.__qualname__} {_digest(repr((sorted(content), bases)))}"

    def _tensor(self, x: torch.Tensor) -> str:
        strides = x.stride() if x.layout == torch.strided else None
        return (
            f"tensor {self.of(type(x))} {x.dtype} {tuple(x.shape)} {strides} {x.device} {x.requires_grad} {x.layout} "
            f"{x.is_leaf} {x.is_inference()} {torch._C._dispatch_keys(x)} {[getattr(x, m, None) for m in _MARKS]}"
        )


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None or True
    except ValueError:
        return False


@functools.lru_cache(8192)
def _code(code: types.CodeType) -> str:
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    signature = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    where = (code.co_filename, code.co_firstlineno, code.co_qualname)
    consts = [_constant(c) for c in code.co_consts]
    return _digest(repr((code.co_code, names, signature, where, consts, code.co_exceptiontable)))


def _constant(x: Any) -> str:
    if isinstance(x, types.CodeType):
        return _code(x)
    if isinstance(x, tuple):
        return f"({', '.join(map(_constant, x))})"
    if isinstance(x, frozenset):  # printed in an order of its own in every process
        return f"frozenset {sorted(map(_constant, x))}"
    return f"{type(x).__name__} {x!r}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]
