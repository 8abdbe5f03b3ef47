"""The Dynamo backend: ``torch.compile(model, backend="tessel")`` finds it through an entry point.

    torch.compile(model, backend="tessel", options={"target": "triton-interpret", "fusion": False})

Options are the fields of ``tessel.Options`` and ``target``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .config import Options
from .driver import Session, compile_graph
from .errors import TesselError, check
from .frontend import dynamo, library_functions, recorded, scan_trace
from .frontend.capture import GraphInfo, aot
from .frontend.dynamo import current_compilation
from .frontend.importer import Imported
from .place import resolve_target
from .report import Recompile

__all__ = ["Backend", "tessel"]


class Backend:
    """A Dynamo backend that belongs to one compiled function and records into its session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **rest: Any) -> Callable[..., Any]:
        session = self.session
        now = current_compilation()
        before = session.compiled[now.function]
        session.compiled[now.function] += 1
        if before and now.again:
            session.report.recompiles.append(Recompile(now.function, before, now.reason))

        note = recorded.noted(len(example_inputs))

        alone: list[Callable[[list[Any]], list[Any]]] = []

        def compile_one(imported: Imported, info: GraphInfo) -> Callable[[list[Any]], list[Any]]:
            note(imported, info)
            run = compile_graph(imported, info, session)
            if info.is_inference and info.order == tuple(range(len(example_inputs))) and recorded.plain():
                alone.append(run)
            return run

        try:
            on_cpu = all(x.device.type == "cpu" for x in example_inputs if isinstance(x, torch.Tensor))
            made = aot(gm, example_inputs, compile_one, early=on_cpu and session.target in ("auto", "cpu"))
            return _direct(alone[0]) if alone else made
        except TesselError:
            raise
        except Exception as e:
            where = _own_frame(e)
            if where is None:
                raise  # torch's: eager says it better
            raise TesselError(
                f"internal error while capturing {session.report.name or 'a graph'} ({where}): "
                f"{type(e).__name__}: {e}. This is a fault of Tessel: run the function without it for now (call the "
                "original), and report it with the output of TESSEL_DEBUG=3"
            ) from e


def _direct(run: Callable[[list[Any]], list[Any]]) -> Callable[..., Any]:
    """What AOTAutograd makes of an inference graph that needs nothing before and after it, without its three calls."""

    def compiled(*args: Any) -> list[Any]:
        if not torch.is_grad_enabled():
            return run(list(args))
        with torch.no_grad():
            return run(list(args))

    return compiled


def tessel(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Options | None = None,
    **more: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph; what ``torch.compile(..., backend="tessel")`` calls.

    Args:
        gm: the captured graph.
        example_inputs: as Dynamo hands them over.
        mode: ``None`` or ``"default"``: Tessel has no other modes.
        options: fields of ``Options`` and ``target``, as a mapping; or ``Options``.

    Raises:
        TesselError: a mode, an option or a target that does not exist.
    """
    check(
        mode in (None, "default"),
        lambda: (
            f'torch.compile(mode={mode!r}, backend="tessel"): Tessel has no modes. Leave mode out and say what '
            'is wanted by options, for example options={"cuda_graphs": True} for "reduce-overhead"'
        ),
    )
    given: Any = options
    target = "auto"
    if isinstance(options, Mapping):
        given = {**options, **more}
        target = given.pop("target", "auto")
    elif more:
        given = dict(more)
        target = given.pop("target", "auto")
        check(options is None, lambda: f"options given twice: {options!r} and {more!r}")
    session = Session(resolve_target(target), Options.of(given))
    dynamo.at_start(_prepare)
    return Backend(session)(gm, example_inputs)


def _prepare(*_: object) -> None:
    """What Dynamo has to know before it traces."""
    scan_trace.register()
    library_functions.register()
    library_functions.seen_notes()  # of a trace that failed


# Torch imports this module when ``torch.compile`` is asked for the backend, and calls the backend when the first graph
# is traced already.
dynamo.at_start(_prepare)


def _own_frame(e: BaseException) -> str | None:
    """Where in Tessel an exception came through, ``file.py:line``; None if only torch was at work."""
    package = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(package)]
    frames = [f for f in frames if f.filename != __file__ and f.name != "aot"]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None


def name_of(fn: object) -> str:
    """What to call a function or module in reports."""
    if isinstance(fn, torch.nn.Module):
        return type(fn).__name__
    return getattr(fn, "__qualname__", None) or type(fn).__name__
