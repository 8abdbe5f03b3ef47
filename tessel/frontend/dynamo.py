"""What Dynamo says about its own compilations: recompiles, limits, errors. Private names, as in compat.

Supported: torch 2.11 to 2.15.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc
from torch._dynamo.eval_frame import OptimizedModule
from torch._guards import CompileContext

__all__ = [
    "Caught",
    "Current",
    "LimitReached",
    "NotCaptured",
    "OptimizedModule",
    "at_start",
    "current_compilation",
    "limit_listener",
    "optimized",
    "patcher",
]


@dataclass(frozen=True)
class Current:
    """The compilation that Dynamo is at: of which function, whether not its first, and why again."""

    function: str
    again: bool
    reason: str


def current_compilation() -> Current:
    """To be called inside a backend.

    What follows a graph break is a function of its own. Torch counts compilations of a function whoever
    asked for them, so a first one for some caller may be "again".
    """
    identity = CompileContext.current_compile_id()
    again = bool(getattr(identity, "frame_compile_id", None))
    if not again:
        return Current(_function(), False, "")
    from torch._dynamo.utils import get_metrics_context

    metrics = getattr(get_metrics_context(), "_metrics", {})
    return Current(_function(), True, str(metrics.get("recompile_reason") or "torch gives no reason"))


def _function() -> str:
    """The function being compiled, as Dynamo knows it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code = InstructionTranslator.current_tx().f_code
    except (AttributeError, LookupError):
        return "(function)"
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"


def at_start(prepare: Callable[..., None]) -> None:
    """Call ``prepare`` before torch traces anything, from now on; a second time does nothing.

    It gets what torch says of the compilation. ``torch._dynamo.reset()`` forgets it.
    """
    handler = torch._dynamo.callback_handler
    if prepare not in handler.start_callbacks:
        handler.register_start_callback(prepare)


# Torch leaves out guards on hooks of submodules, and marks graphs for its profiler, which costs two calls a graph.
_CONFIG = {"skip_nnmodule_hook_guards": False, "record_runtime_overhead": False}


def patcher(**changes: Any) -> Callable[[], Callable[[], None]]:
    """Dynamo's configuration for compilations of Tessel, and ``changes``: ``undo = patch(); ...; undo()``."""
    changes = {**{k: v for k, v in _CONFIG.items() if hasattr(dynamo_config, k)}, **changes}
    make = getattr(dynamo_config, "_make_closure_patcher", None)
    if make is not None:
        return make(**changes)  # type: ignore[no-any-return]

    def enter() -> Callable[[], None]:
        context = dynamo_config.patch(**changes)
        context.__enter__()
        return lambda: context.__exit__(None, None, None)

    return enter


def optimized(
    fn: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    dynamic: bool | None,
    fullgraph: bool,
    compiling: Callable[[], AbstractContextManager[None]],
) -> Any:
    """``torch.compile(fn, ...)``, of which every compilation, and no other call, runs in a context.

    Args:
        fn: a module or a function.
        backend: what compiles a graph.
        dynamic, fullgraph: as ``torch.compile`` has them.
        compiling: makes the context.
    """
    context = torch._dynamo.optimize(backend=backend, nopython=fullgraph, dynamic=dynamic)
    convert = getattr(context, "callback", None)
    if convert is not None:  # torch.compile is not switched off

        def inside(*args: Any) -> Any:
            with compiling():
                return convert(*args)

        # What names the backend: torch counts the steps to it, so this one takes the place of the one it goes around.
        inside._torchdynamo_orig_backend = convert._torchdynamo_orig_backend  # type: ignore[attr-defined]
        context.callback = inside  # type: ignore[union-attr]
    return context(fn)


# ---------------------------------------------------------------- the recompile limit

# Told when Dynamo gives up recompiling a function: fn(function, limit name, limit, reason).
Listener = Callable[[str, str, int, str], None]
_listening = threading.local()


class _LimitFilter(logging.Filter):
    """Hands Dynamo's record of a reached limit to whoever runs a compiled function in this thread."""

    def filter(self, record: logging.LogRecord) -> bool:
        stack: list[Listener] = getattr(_listening, "stack", [])
        if stack and "hit config." in str(record.msg) and isinstance(record.args, tuple):
            name, limit, function, reason = record.args[:4]
            stack[-1](str(function), str(name), int(limit), str(reason))  # type: ignore[call-overload]
            return False  # said in our own words
        # An operator that fails on fake tensors: eager's exception follows and says the same, shorter.
        return not (stack and str(record.msg).startswith("failed while attempting to run meta"))


_filter = _LimitFilter()


class limit_listener:
    """Call a listener if a recompile limit is reached inside: ``with limit_listener(fn): ...``."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        for name in ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor"):
            logger = logging.getLogger(name)
            if _filter not in logger.filters:
                logger.addFilter(_filter)

    def __enter__(self) -> None:
        try:
            _listening.stack.append(self.listener)
        except AttributeError:
            _listening.stack = [self.listener]

    def __exit__(self, *_: object) -> None:
        _listening.stack.pop()


# ---------------------------------------------------------------- errors

# Everything that Dynamo raises itself: it could not trace, an operator failed on fake tensors, a backend failed.
DynamoError: type[Exception] = exc.TorchDynamoException
LimitReached: tuple[type[Exception], ...] = tuple(
    t for t in (getattr(exc, "FailOnRecompileLimitHit", None), getattr(exc, "RecompileLimitExceeded", None)) if t
)
# What a call of a compiled function is caught for; anything else is the program's own exception.
Caught: tuple[type[Exception], ...] = (DynamoError, *LimitReached, RecursionError)
# Only raised to the caller with fullgraph=True.
NotCaptured: tuple[type[Exception], ...] = (exc.Unsupported, exc.UserError)
