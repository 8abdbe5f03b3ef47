"""The kernels of a graph on the CPU: one C++ file, compiled once."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

from ..codegen.cpp import CppSource, render, translation_unit
from ..errors import TesselError
from ..tiles.kernel import Kernel
from .kernels import Kernels
from .modules import place
from .native import NativeKernel, build
from .sequence import RUNNER

__all__ = ["NativeKernels"]

_warned: set[str] = set()


@dataclass
class NativeKernels(Kernels):
    """As ``Kernels``, in C++. Without a working compiler every kernel runs operator by operator through torch."""

    def render(self, kernel: Kernel) -> Any:
        return render(kernel)

    def grid(self, kernel: Kernel, name: str) -> tuple[Any, ...]:
        return ()

    def load(self) -> None:
        """Compile all kernels as one file."""
        if not self.sources:
            return
        for name, source in self.sources.items():
            more = "".join(f"// {line}\n" for line in self.places(name))
            self.sources[name] = dataclasses.replace(source, header=source.header + more)
        sources: list[CppSource] = list(self.sources.values())  # type: ignore[arg-type]
        text = translation_unit(sources) + RUNNER
        try:
            library, _ = build(text)
        except TesselError as e:
            self._give_up(str(e))
            return
        path = place("kernels", text, self.directory, ".cpp")
        for source in sources:
            self.launchers[source.name] = NativeKernel(source, library, path)

    def _give_up(self, reason: str) -> None:
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"tessel: no compiled kernels, torch runs each operator (slower, the same results): {reason}",
                stacklevel=2,
            )
        self.failed.update(dict.fromkeys(self.at, reason))
        for held in (self.at, self.sources, self.sites, self.launchers):
            held.clear()
