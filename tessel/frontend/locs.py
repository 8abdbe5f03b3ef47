"""Source locations: from the ``stack_trace`` and ``nn_module_stack`` of an fx node to ``Loc``.

A location points at the line a person would look at: the innermost frame that is not torch's or
Tessel's own. A model library (transformers, say) counts as the user's code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..ir.types import NOWHERE, Loc

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_ROOT = re.compile(r"^[LG](\['[^']*'\]|\.\w+)?")
_STEP = re.compile(r"\._modules\['([^']*)'\]|\['([^']*)'\]|\.(\w+)|\[(\d+)\]")
_TORCH = str(Path(torch.__file__).parent) + "/"
_OWN = str(Path(__file__).parents[1]) + "/"


class Locations:
    """Turns fx metadata into ``Loc``; equal stack traces are parsed once."""

    def __init__(self) -> None:
        self._frames: dict[str, tuple[str, int]] = {}
        self._modules: dict[str, str] = {}

    def of(self, meta: dict[str, Any]) -> Loc:
        """The location of a node with this ``node.meta``."""
        trace = meta.get("stack_trace")
        file, line = self._frame(trace) if trace else ("", 0)
        module = ""
        stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack")
        if stack:
            module = self._module(str(next(reversed(stack.values()))[0]))
        return Loc(file, line, module) if file or module else NOWHERE

    def _frame(self, trace: str) -> tuple[str, int]:
        found = self._frames.get(trace)
        if found is None:
            found = ("", 0)
            for file, line in reversed(_FRAME.findall(trace)):
                if not file.startswith((_TORCH, _OWN, "<")):
                    found = (file, int(line))
                    break
            self._frames[trace] = found
        return found

    def _module(self, path: str) -> str:
        found = self._modules.get(path)
        if found is None:
            found = module_path(path)
            self._modules[path] = found
        return found


def module_path(path: str) -> str:
    """The dotted path of a module from torch's spelling of how it was reached.

    >>> module_path("L['self']._modules['layers']._modules['0'].mlp")
    'layers.0.mlp'
    >>> module_path("layers.0.mlp")
    'layers.0.mlp'
    """
    if not path.startswith(("L[", "G[", "L.", "G.")):
        return path
    steps = _STEP.findall(_ROOT.sub("", path))
    return ".".join(next(filter(None, step), "") for step in steps)


def qualified_name(source: str) -> tuple[str, str] | None:
    """Name and role of a parameter or buffer from the source Dynamo gives; None for anything else.

    >>> qualified_name("L['self']._modules['fc']._parameters['weight']")
    ('fc.weight', 'param')
    >>> qualified_name("L['x']") is None
    True
    """
    for part, role in (("_parameters['", "param"), ("_buffers['", "buffer")):
        head, found, tail = source.rpartition("." + part)
        if found and tail.endswith("']"):
            owner = module_path(head)
            return (f"{owner}.{tail[:-2]}" if owner else tail[:-2]), role
    return None
