"""The kernels that a model has on a target, without running it or needing the device."""

from __future__ import annotations

import copy
import dataclasses
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..config import Options
from ..errors import TesselError
from ..frontend.capture import GraphInfo, aot, export_program, import_program
from ..frontend.importer import Imported
from ..ir.node import Graph
from ..passes.pipeline import CPU_ONLY, PASSES, run_pipeline
from ..tiles.kernel import Kernel
from ..tiles.lower import lower

__all__ = ["Found", "kernels_of", "with_templates"]


@dataclass(frozen=True)
class Found:
    """A kernel of a model.

    Attributes:
        kernel: the tile program.
        places: the user's lines that it computes, one a launch.
        region: the same as a graph of operators, whose inputs and outputs are the kernel's.
    """

    kernel: Kernel
    places: tuple[str, ...]
    region: Graph


def kernels_of(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> list[Found]:
    """The tile programs of a model's inference graphs, in order, equal launches together.

    The model is traced twice: as ``tessel.compile`` does it, graph by graph, after which it is called eagerly (on meta
    tensors nothing is computed), and as one exported program, as ``tessel compile`` does it. The two differ in a few
    kernels. A model that cannot be exported has those of the first alone.

    Args:
        options: as for ``tessel.compile``; "auto" means templates for products and attention, which can be tuned.

    Raises:
        TesselError: the model cannot be traced or called.
    """
    options = with_templates(options)
    traced: dict[Any, Found] = {}

    def keep(imported: Imported, info: GraphInfo) -> Callable[[list[Any]], list[Any]]:
        _add(imported.graph, options, traced)
        return lambda inputs: inputs  # never called

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        aot(copy.deepcopy(gm), inputs, keep)  # which rewrites it
        return gm.forward

    try:
        with torch.no_grad():
            torch.compile(model, backend=backend, dynamic=False)(*args, **(kwargs or {}))
    except TesselError:
        raise
    except Exception as e:  # whatever a user's code, traced or run, raises
        name = type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", "the model")
        words = next((line for line in str(e).splitlines() if line.strip()), "")
        raise TesselError(f"{name} cannot be traced: {type(e).__name__}: {words[:300]}{_where(e)}") from e
    exported: dict[Any, Found] = {}
    with suppress(TesselError):  # graph breaks, or what the importer does not know: `tessel compile` says so
        _add(import_program(export_program(model, args, kwargs)).graph, options, exported)
    return list({**exported, **traced}.values())


def _add(graph: Graph, options: Options, found: dict[Any, Found]) -> None:
    """The kernels that a graph becomes on a GPU."""
    for node in run_pipeline(graph, options, passes=[p for p in PASSES if p[0] not in CPU_ONLY]).nodes:
        if node.op.kind != "kernel":
            continue
        try:
            kernel = lower(node)
        except TesselError:  # runs operator by operator: there is no tile
            continue
        content = kernel.content()
        known = found.setdefault(content, Found(kernel, (), node.regions[0]))
        found[content] = dataclasses.replace(known, places=(*known.places, node.loc.short))


def with_templates(options: Options | None) -> Options:
    """The options with "auto" as it is for a GPU that is not here: products and attention by templates."""
    options = Options() if options is None else options
    unset = [n for n in ("matmul", "attention") if getattr(options, n) == "auto"]
    return dataclasses.replace(options, **dict.fromkeys(unset, "template"))  # type: ignore[arg-type]


def _where(e: Exception) -> str:
    """The last line of a user's file that an exception, or the note Dynamo adds to it, comes from."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if "site-packages" not in f.filename]
    own = str(Path(__file__).parent.parent)
    frames = [f for f in frames if not f.filename.startswith((own, "<"))]
    noted = _FRAME.findall(str(e))
    if noted:
        return " ({}:{})".format(*noted[-1])
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
