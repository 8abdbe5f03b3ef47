"""What a host program is made of: launches, calls, runs of launches, and where its values live.

Code generation makes these records and the runtime acts on them; ``host`` writes the program that holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir.node import Value
from ..ir.types import Dim, TensorType

__all__ = ["Called", "Launch", "Run", "Storage"]


@dataclass(frozen=True)
class Launch:
    """A generated kernel at one node.

    Attributes:
        name: what the program calls; kernels with the same code share it.
        grid: the number of programs per grid axis, expressions over sizes.
        params: the tensors in the order the kernel takes them: ``("in", operand)`` or ``("out", result)``.
        sizes: the symbols it takes after the tensors.
        first: a kernel that runs before it and fills ``buffer``, which both take as ``("buffer", -1)``.
        buffer: memory that lives between the two.
    """

    name: str
    grid: tuple[Dim, ...]
    params: tuple[tuple[str, int], ...]
    sizes: tuple[str, ...]
    first: Launch | None = None
    buffer: TensorType | None = None


@dataclass(frozen=True)
class Called:
    """A Python callable at one node: ``name(*args, **attrs)``.

    Attributes:
        name: what the program calls it.
        fn: what runs.
        attrs: keyword arguments.
        owned: every tensor it returns is new memory that nothing else refers to.
        names: keywords of the node's last arguments; the others go by position.
        flat: it returns a nest of results, of which the tensors, in order, are the node's.
    """

    name: str
    fn: Callable[..., Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    owned: bool = False
    names: tuple[str, ...] = ()
    flat: bool = False


@dataclass(frozen=True)
class Storage:
    """What buffer planning decided.

    Attributes:
        reuse: a new value -> the dead value whose memory it takes over.
        frees: position of a node -> values whose names are dropped after it.
        places: values that live in one block of memory -> their offsets in bytes; only launches in ``runs`` use them.
        block: the bytes of that block.
        runs: position of the first node -> position after the last of launches that one call makes.
        kept: results whose memory is there from the beginning, perhaps that of an earlier call.
        parts: values that live in the memory of such a result before it is written -> the result, offset in bytes.
    """

    reuse: Mapping[Value, Value] = field(default_factory=dict)
    frees: Mapping[int, tuple[Value, ...]] = field(default_factory=dict)
    places: Mapping[Value, int] = field(default_factory=dict)
    block: int = 0
    runs: Mapping[int, int] = field(default_factory=dict)
    kept: Sequence[Value] = ()
    parts: Mapping[Value, tuple[Value, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Launches that one call makes, one after the other.

    Attributes:
        steps: for each the kernel's name and its arguments: which of the call's tensors, and how many bytes after it.
        tensors: how many tensors the call takes.
    """

    steps: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    tensors: int
