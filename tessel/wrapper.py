"""What ``tessel.compile`` returns: torch's own compiled module or function, with Tessel's manners around it.

Around every compilation: hooks on submodules are guarded (torch skips those guards by default), and reaching the
recompile limit is said. Around every call: errors are eager's own.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .backend import Backend, name_of
from .capture_cache import Calling, first_call
from .config import Options
from .driver import Session
from .errors import TesselError
from .frontend import dynamo, library_functions, scan_trace
from .frontend.collector import fewer_collections
from .frontend.joint import tensors_of
from .report import Report

__all__ = ["RecompileLimit", "compile_function", "explain_call", "session_of"]


class RecompileLimit(UserWarning):
    """A function was compiled as often as the limit allows; further new shapes run without Tessel."""


def compile_function(
    fn: Callable[..., Any], session: Session, *, dynamic: bool | None, fullgraph: bool
) -> Callable[..., Any]:
    """``torch.compile`` with Tessel's backend, and Tessel's call around it."""
    scan_trace.register()
    compiling = _Compiling(session, fullgraph)
    made = dynamo.optimized(fn, Backend(session), dynamic=dynamic, fullgraph=fullgraph, compiling=compiling)
    if isinstance(made, dynamo.OptimizedModule):
        return CompiledModule(made._orig_mod, made.dynamo_ctx, compiling, dynamic)
    guarded = _guarded(made, fn, compiling)
    return functools.wraps(fn, updated=())(guarded) if hasattr(fn, "__name__") else guarded


def session_of(fn: object) -> Session | None:
    """The session of something that ``tessel.compile`` returned; None for anything else."""
    if isinstance(fn, torch.nn.Module):
        return fn.__dict__.get("_tessel_session")
    return getattr(fn, "_tessel_session", None)


class CompiledModule(dynamo.OptimizedModule):
    """A compiled module: attributes, parameters, ``state_dict`` and modes are those of the module inside,
    as with ``torch.compile``."""

    def __init__(self, module: torch.nn.Module, context: Any, compiling: _Compiling, dynamic: bool | None) -> None:
        # Before the parent's __init__, which passes attributes on to the module inside.
        self.__dict__["_tessel_session"] = compiling.session
        self.__dict__["_tessel_compiling"] = compiling
        self.__dict__["_tessel_dynamic"] = dynamic
        super().__init__(module, context)

    def _initialize(self) -> None:
        super()._initialize()
        self.forward = _guarded(self.forward, self._orig_mod, self.__dict__["_tessel_compiling"])

    def __reduce__(self) -> Any:
        """A copy is compiled anew, and starts its own record."""
        session, fullgraph = self.__dict__["_tessel_session"], self.__dict__["_tessel_compiling"].fullgraph
        return _again, (self._orig_mod, session, self.__dict__["_tessel_dynamic"], fullgraph)


def _again(module: torch.nn.Module, session: Session, dynamic: bool | None, fullgraph: bool) -> Callable[..., Any]:
    return compile_function(module, session, dynamic=dynamic, fullgraph=fullgraph)


class _Compiling:
    """``with compiling():`` around every compilation of a function: configures Dynamo, and listens for its limit.

    Attributes:
        said: warnings that the next call passes on.
    """

    def __init__(self, session: Session, fullgraph: bool) -> None:
        self.session, self.fullgraph = session, fullgraph
        limit = session.options.recompile_limit
        self.patch = dynamo.patcher(**({} if limit is None else {"recompile_limit": limit}))
        self.listening = dynamo.limit_listener(self._limit)
        self.said: list[str] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        library_functions.register()
        library_functions.seen_notes()  # of a trace that failed
        undo = self.patch()
        try:
            with self.listening:
                yield
        finally:
            undo()

    def _limit(self, function: str, name: str, most: int, reason: str) -> None:
        if self.fullgraph:
            return  # an error follows
        self.said.append(
            f"tessel: {function} was compiled {most} times, which is torch's limit ({name}); calls that fit none "
            f"of these run without Tessel. Last reason: {' '.join(reason.split())}. Mark what changes as dynamic "
            "(tessel.compile(dynamic=True)), or allow more: options={'recompile_limit': N}"
        )
        self.session.report.notes.append(self.said[-1])


def _guarded(made: Callable[..., Any], fn: Callable[..., Any], compiling: _Compiling) -> Callable[..., Any]:
    """``made`` with eager's errors; the first call looks for a capture that is kept."""
    session, said = compiling.session, compiling.said
    calling = Calling(session)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if not session.report.compilations:
                with compiling(), calling, fewer_collections():
                    result = first_call(made, fn, session, args, kwargs)
            elif Calling.matters:
                with calling:
                    result = made(*args, **kwargs)
            else:
                result = made(*args, **kwargs)
            if said:
                warnings.warn(said.pop(), RecompileLimit, stacklevel=2)
            return result
        except dynamo.Caught as e:
            failure = e
        # Outside the handler, so that what is raised here does not drag torch's traceback along.
        return _explained(failure, fn, session, args, kwargs)

    call._tessel_session = session  # type: ignore[attr-defined]
    # Inside another compiled function Dynamo goes straight to the original.
    call._torchdynamo_inline = getattr(made, "_torchdynamo_inline", fn)  # type: ignore[attr-defined]
    call._torchdynamo_orig_callable = fn  # type: ignore[attr-defined]
    return call


def _explained(
    e: Exception, fn: Callable[..., Any], session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Raise what the user should see of a failed call, or return eager's result if eager has one.

    Torch fails while it traces, before the traced part has run; what ran eagerly before a graph break
    runs a second time here.
    """
    name = session.report.name
    chain = list(_chain(e))
    found = next((x for x in chain if isinstance(x, TesselError)), None)
    if found is not None:
        raise found.with_traceback(None)
    if isinstance(e, dynamo.LimitReached):
        raise TesselError(
            f"{name}: the recompile limit is reached, and fullgraph=True forbids running without Tessel. "
            "Compile with dynamic=True, or allow more: options={'recompile_limit': N}"
        ) from e
    if isinstance(e, dynamo.NotCaptured):
        raise TesselError(
            f"{name}: fullgraph=True, but torch cannot capture it in one graph: {e}\n"
            "Change that line, or leave fullgraph out: the function is then compiled in pieces"
        ) from None
    result = fn(*args, **kwargs)  # eager's own exception, if it has one
    if any(isinstance(x, RecursionError) for x in chain):
        limit = sys.getrecursionlimit()
        note = (
            f"{name} ran eagerly: its modules or calls are nested too deeply for torch to trace them under Python's "
            f"recursion limit of {limit}. Raise it before the first call (sys.setrecursionlimit({limit * 20})), or "
            "compile the inner modules one by one"
        )
    else:
        note = f"{name} ran eagerly, because torch could not trace this call: {' '.join(str(e).split())[:400]}"
    if note not in session.report.notes:
        session.report.notes.append(note)
    warnings.warn(f"tessel: {note}", stacklevel=4)
    return result


def _chain(e: BaseException) -> Iterator[BaseException]:
    """An exception and everything it wraps."""
    seen: set[int] = set()
    stack: list[BaseException | None] = [e]
    while stack:
        x = stack.pop()
        if isinstance(x, BaseException) and id(x) not in seen:
            seen.add(id(x))
            yield x
            stack += [x.__context__, x.__cause__, getattr(x, "inner_exception", None)]


# ---------------------------------------------------------------- explain


def explain_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    """Compile and call once, leaving buffers, gradients and the random state as they were."""
    own = session_of(fn)
    if own is not None and not args and not kwargs and own.report.compilations:
        return own.report
    if own is None:
        own = Session("auto", Options(), Report(name_of(fn), "auto"))
        compiled = compile_function(fn, own, dynamic=None, fullgraph=False)
    else:
        compiled = fn
    module = fn if isinstance(fn, torch.nn.Module) else None
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()} if module is not None else {}
    with torch.random.fork_rng():
        undo = dynamo.patcher(recompile_limit=1_000_000)()
        try:
            result = compiled(*args, **kwargs)
            _backward(result, module, args, kwargs)
        finally:
            undo()
            if module is not None:
                with torch.no_grad():
                    for n, b in module.named_buffers():
                        if n in buffers and b.shape == buffers[n].shape:
                            b.copy_(buffers[n])
    return own.report


def _backward(result: Any, module: torch.nn.Module | None, args: Any, kwargs: Any) -> None:
    """Run the backward graph too, so that it is compiled and shown; no ``.grad`` is touched."""
    outs = [t for t in tensors_of((result,), {}) if t.requires_grad and t.is_floating_point()]
    leaves = [t for t in tensors_of(args, kwargs) if t.requires_grad]
    if module is not None:
        leaves += [p for p in module.parameters() if p.requires_grad]
    if outs and leaves:
        torch.autograd.grad([o.sum() for o in outs], leaves, allow_unused=True)
