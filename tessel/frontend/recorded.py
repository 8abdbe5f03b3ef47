"""A capture of Dynamo written down, and put back in another process without tracing again.

    with recording() as seen:               # around the first call of a compiled module
        result = made(*args)
    data = seen.recorded(module.forward, args, kwargs)      # bytes, or None where any doubt is left
    ...
    put_back(data, module.forward, args, kwargs, make_run, mine)        # in another process, before its first call

What Dynamo's trace read is what it guards, as sources: ``L['self'].config.num_hidden_layers``. With each source a
fingerprint of the value goes into the record, with the whole class of every object on the way. Where all of them are
the same in the new process, the trace would be the same; then Dynamo's own guards are built again, on the objects
of this process, and installed with the bytecode that Dynamo made. From then on its C++ evaluator checks every call,
and a call that fits no longer is traced as usual.

Recorded are only captures without gradients that are one graph of one frame, with fixed sizes, of guard kinds that
can be built again; what the outputs are must need no work after the graph. Private names of torch: one release.
"""

from __future__ import annotations

import functools
import marshal
import pickle
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .capture import GraphInfo
from .fingerprint import Fingerprints
from .importer import Imported
from .trace_state import (
    NoRecord,
    digest,
    digests,
    find_object,
    frame_of,
    importable,
    memory_of,
    need,
    process_state,
    value_at,
)

__all__ = ["Recording", "noted", "plain", "possible", "put_back", "recording"]

RELEASES = ("2.13.",)  # of torch, that this was tested with

# Guards that are built again from a source and plain arguments.
_KINDS = frozenset(
    "BUILTIN_MATCH CLASS_MATCH CLOSURE_MATCH CONSTANT_MATCH DICT_CONTAINS DICT_KEYS_MATCH DICT_NOT_CONTAINS "
    "DUPLICATE_INPUT EMPTY_NN_MODULE_HOOKS_DICT EQUALS_MATCH FUNCTION_MATCH HASATTR ID_MATCH MAPPING_KEYS_CHECK "
    "MODULE_MATCH NN_MODULE NOT_NONE_MATCH NONE_MATCH BOOL_MATCH NOT_PRESENT_IN_GENERIC_DICT SEQUENCE_LENGTH "
    "SET_CONTAINS TENSOR_MATCH TUPLE_ITERATOR_LEN RANGE_ITERATOR_MATCH TYPE_MATCH".split()
)
# Guards of the state of the process: built again as they are, the state itself is compared.
_STATE = frozenset(
    "AUTOGRAD_SAVED_TENSORS_HOOKS DEFAULT_DEVICE DETERMINISTIC_ALGORITHMS GLOBAL_STATE GRAD_MODE TORCH_FUNCTION_STATE "
    "FUNCTORCH_STACK_MATCH DUAL_LEVEL".split()
)
_DROPPED = frozenset({"SHAPE_ENV"})  # nothing in it where all sizes are fixed: TENSOR_MATCH has them

_KEPT = ("guards", "checks", "shared", "files", "state", "process", "imports", "bytecode", "compiled")

Run = Callable[[list[Any]], Sequence[Any]]


def possible() -> bool:
    """Whether this torch is one that captures are recorded with; prepares it."""
    if not str(torch.__version__).startswith(RELEASES):
        return False
    # Dynamo puts methods of its own into nn.Module when it first compiles: before the first fingerprint, then.
    from torch._dynamo.mutation_guard import install_generation_tagging_init

    install_generation_tagging_init()
    return True


@dataclass
class Recording:
    """What was seen of the compilations in a block."""

    graphs: list[tuple[Imported, GraphInfo]] = field(default_factory=list)
    frames: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    def recorded(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
        """The record, if it can be made; else ``why`` says what stood against it."""
        try:
            return self._recorded(fn, args, kwargs)
        except NoRecord as e:
            self.why = str(e)
        except Exception as e:  # of torch's private parts or of pickle: then there is no record
            self.why = f"{type(e).__name__}: {e}"
        return None

    def _recorded(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        need(not self.why, self.why)
        need(self.frames == len(self.graphs) == 1 and "code" in self.notes, f"{self.frames} frames were compiled")
        (imported, info), seen = self.graphs[0], self.notes
        need(info.is_inference and imported.device == "cpu", "no inference graph on the CPU")
        need(not any(n.symbols() for n in (*imported.graph.inputs, *imported.graph.nodes)), "symbolic sizes")
        need(None not in info.order and len(info.order) == seen["arguments"], "inputs in another order")
        need(sum(t.numel() for t in imported.constants.values()) < 1 << 16, "large constants")
        target, scope = frame_of(fn, args, kwargs)
        need(target.__code__ is seen["code"], "not the frame of the function itself")
        theirs = seen["scope"]
        # Tuples and mappings of arguments are made anew for every call.
        need(
            scope.keys() == theirs.keys() and all(_same(scope[k], theirs[k]) for k in scope), "other names in the frame"
        )
        return pickle.dumps(
            {
                **{k: seen[k] for k in _KEPT},
                "graph": str(imported.graph),
                "constants": {k: v.detach().clone() for k, v in imported.constants.items()},
                "fallbacks": imported.fallbacks,
                "static": info.static_inputs,
                "order": info.order,
            }
        )


def _same(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    if type(a) is dict and type(b) is dict:
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    return a is b


# ---------------------------------------------------------------- recording

_current = threading.local()


@contextmanager
def recording() -> Iterator[Recording]:
    """Watch what this thread compiles in the block."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    seen = Recording()
    seen.notes["process"] = process_state()
    before, _current.seen = getattr(_current, "seen", None), seen
    handle = register_bytecode_hook(lambda old, new: _at_the_end(seen, old, new))
    try:
        yield seen
    finally:
        handle.remove()
        _current.seen = before


def noted(arguments: int) -> Callable[[Imported, GraphInfo], None]:
    """To be called inside a backend: what to tell of each graph, and after all of them ``None``.

    Args:
        arguments: of the Dynamo graph.
    """
    seen: Recording | None = getattr(_current, "seen", None)
    if seen is None:
        return lambda imported, info: None
    from torch._dynamo.symbolic_convert import InstructionTranslator

    seen.frames += 1
    seen.notes["output"] = InstructionTranslator.current_tx().output
    seen.notes["arguments"] = arguments

    def graph(imported: Imported, info: GraphInfo) -> None:
        assert seen is not None
        seen.graphs.append((imported, info))
        context = torch._guards.TracingContext.try_get()
        seen.notes["meta"] = getattr(context, "fw_metadata", None)
        seen.notes["traced"] = tuple(getattr(context, "traced_code", None) or ())
        if getattr(getattr(context, "guards_context", None), "aotautograd_guards", None):
            seen.why = "inputs that overlap"

    return graph


def _at_the_end(seen: Recording, old: types.CodeType, new: types.CodeType) -> None:
    """Dynamo's bytecode hook: the trace is done, its guards are complete, nothing has run yet."""
    output = seen.notes.pop("output", None)
    if output is None or seen.why:
        seen.why = seen.why or "a frame without a graph"
        return
    try:
        seen.notes |= {"code": old, **_record(output, seen.notes.pop("meta", None), new, seen.notes.pop("traced", ()))}
    except NoRecord as e:
        seen.why = str(e)
    except Exception as e:  # of torch's private parts: then there is no record
        seen.why = f"{type(e).__name__}: {e}"


def _record(output: Any, meta: Any, new: types.CodeType, traced: Sequence[types.CodeType]) -> dict[str, Any]:
    need(_plain_outputs(meta), "outputs or inputs that need work around the graph")
    env = output.shape_env
    # Dynamo has a symbol for the number in each small integer tensor, used or not.
    symbols = [s for s in env.var_to_range if not _all_items(env.var_to_sources.get(s, ()))]
    need(not symbols and not env.guards and not env.deferred_runtime_asserts, f"symbolic sizes: {symbols}")
    compiled = [n for n in new.co_names if n.startswith("__compiled_fn")]
    need(len(set(compiled)) == 1 and not any(n.startswith("__resume") for n in new.co_names), "more than one graph")
    known = {compiled[0], output.name_of_builtins_dict_key_in_fglobals, *output.import_sources}
    others = {n: importable(n, output.global_scope[n]) for n in set(output.installed_globals) - known}
    state = output.dump_guards_state()
    need(
        not state.torch_function_mode_stack and not state.functorch_layers and state.dual_level < 0,
        f"modes {state.dual_level}",
    )
    need(state.current_device is None and not state._aotautograd_guards and not state.export, "a default device")
    guards = []
    values: dict[Any, Any] = {}  # of the sources of all guards, and of what these go through
    for guard in sorted(output.guards):
        kind = guard.create_fn_name()
        if kind in _DROPPED:
            continue
        need(kind in _KINDS or kind in _STATE, f"a guard of kind {kind}")
        guards.append((guard.originating_source, kind, *_arguments(guard.create_fn)))
        if kind in _KINDS:
            value_at(guard.originating_source, output.global_scope, output.local_scope, values)
    prints = Fingerprints()
    return {
        "guards": guards,
        "checks": [(source, prints.of(value)) for source, value in values.items()],
        "shared": memory_of(values.values()),
        "files": digests(traced),
        "state": (
            set(state.guard_on_key_order),
            dict(state.input_source_to_sizes_strides),
            state.name_of_builtins_dict_key_in_fglobals,
        ),
        "imports": {alias: ("module", module, "") for alias, module in output.import_sources.items()} | others,
        "bytecode": marshal.dumps(new),
        "compiled": compiled[0],
        "scope": dict(output.local_scope),
    }


def _arguments(create: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a guard is made with beside its source. A tensor is taken from the source when the guard is built again."""
    if not isinstance(create, functools.partial):
        return (), {}
    keywords = {k: v for k, v in create.keywords.items() if k != "value" and not k.endswith("hint")}
    if create.func.__name__ == "TENSOR_MATCH":
        return (), keywords
    need("value" not in create.keywords, f"a guard {create.func.__name__} with a value")
    return create.args, keywords


def _all_items(sources: Sequence[Any]) -> bool:
    return bool(sources) and all(source.name.endswith(".item()") for source in sources)


def _plain_outputs(meta: Any) -> bool:
    """Whether AOTAutograd does nothing before and after the graph."""
    if meta is None:
        return False
    plain = not meta.mutated_inp_runtime_indices and not meta.num_intermediate_bases and not meta.tokens
    plain = plain and not meta.num_graphsafe_rng_states and meta.grad_enabled_mutation is None
    plain = plain and not meta.is_rng_op_functionalized and not torch._C._is_any_autocast_enabled()
    plain = plain and all(o.output_type.name == "non_alias" for o in meta.output_info)
    plain = plain and all(issubclass(o.raw_type, torch.Tensor) for o in meta.output_info)
    kinds = {type(m).__name__ for m in (*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta)}
    return plain and kinds <= {"PlainTensorMeta"}


def plain() -> bool:
    """Whether AOTAutograd does nothing before and after the graph it is compiling; asked inside a backend."""
    return _plain_outputs(getattr(torch._guards.TracingContext.try_get(), "fw_metadata", None))


# ---------------------------------------------------------------- putting back


def put_back(
    data: bytes,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    make_run: Callable[[str, dict[str, Any]], Run],
    mine: Callable[[], bool],
) -> str:
    """Install a record for the calls that fit it, so that Dynamo need not trace the function.

    Args:
        data: what ``Recording.recorded`` gave, from a place that nobody else can write to: it is unpickled.
        fn: the function or bound method that the record is of.
        args, kwargs: of the call that comes; it must fit.
        make_run: from the graph's text and the rest of the record to what runs it.
        mine: whether a call is one that the record was made for (others compile the same code for themselves).

    Returns:
        "" if it is installed, else why not; then nothing has changed.
    """
    try:
        _put_back(pickle.loads(data), fn, args, kwargs, make_run, mine)
        return ""
    except NoRecord as e:
        return str(e)


def _put_back(
    held: dict[str, Any],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    make_run: Callable[[str, dict[str, Any]], Run],
    mine: Callable[[], bool],
) -> None:
    from torch._C._dynamo.eval_frame import _load_precompile_entry
    from torch._dynamo.guards import CheckFunctionManager, GuardBuilder
    from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState, get_builtins_dict
    from torch._guards import Guard, GuardsSet
    from torch.utils._ordered_set import OrderedSet

    now = process_state()
    other = [name for name, value in held["process"].items() if now[name] != value]
    need(not other, f"another state of the process: {', '.join(other)}")
    need(all(digest(name) == known for name, known in held["files"].items()), "other sources")
    target, scope = frame_of(fn, args, kwargs)
    space = target.__globals__
    key_order, sizes, builtins = held["state"]
    names: dict[str, Any] = {alias: find_object(*what) for alias, what in held["imports"].items()}
    if builtins:
        names[builtins] = get_builtins_dict(space)
    names[held["compiled"]] = None
    need(all(n not in space or (space[n] is not None and space[n] is v) for n, v in names.items()), "names in use")
    values: dict[Any, Any] = {}
    prints = Fingerprints()
    globals_then = {**space, **names}
    for source, wanted in held["checks"]:
        try:
            found = prints.of(value_at(source, globals_then, scope, values))
        except Exception as e:  # an attribute or a key that is not there
            raise NoRecord(f"{source.name}: {type(e).__name__}") from e
        need(found == wanted, f"{source.name} is another")
    shared = memory_of([values[source] for source, _ in held["checks"]])
    need(shared == held["shared"], "other tensors share their memory")
    guards = OrderedSet(
        [
            Guard(source, functools.partial(getattr(GuardBuilder, kind), *more, **keywords))
            if more or keywords
            else Guard(source, getattr(GuardBuilder, kind))
            for source, kind, more, keywords in held["guards"]
        ]
    )
    state = OutputGraphGuardsState(
        local_scope=scope,
        global_scope=space,
        torch_function_mode_stack=[],
        guard_on_key_order=key_order,
        input_source_to_sizes_strides=sizes,
        dual_level=-1,
        functorch_layers=[],
        current_device=None,
        global_state_guard=torch._C._dynamo.guards.GlobalStateGuard(),
        _guards=GuardsSet(guards),
        _aotautograd_guards=[],
        name_of_builtins_dict_key_in_fglobals=builtins,
        skip_guards_check=True,  # which would want Dynamo to be tracing; done below
    )
    run, order = make_run(held["graph"], held), held["order"]
    new = marshal.loads(held["bytecode"])

    def compiled(*given: Any) -> Any:
        return run([given[i] for i in order])

    names[held["compiled"]] = torch._dynamo.disable(compiled, reason="a compiled graph")
    fresh = [n for n in names if n not in space]
    space.update(names)
    try:
        manager = CheckFunctionManager(target.__code__, OutputGraphCommon(state)).guard_manager
        manager.root.add_lambda_guard(lambda _: mine(), ["compiled for this function"], None)
        need(manager.check(scope), "a guard does not hold")
        _load_precompile_entry(target.__code__, manager, new)
    except BaseException:
        for name in fresh:
            del space[name]
        raise
    _use_up(fresh)


def _use_up(names: Sequence[str]) -> None:
    """Dynamo numbers the global names it makes: let it make none of these again."""
    from torch._dynamo import bytecode_transformation, convert_frame

    most = max((int(n.rpartition("_")[2]) for n in names if n.rpartition("_")[2].isdigit()), default=-1)
    while int(bytecode_transformation.unique_id("_").rpartition("_")[2]) < min(most, 1 << 20):
        pass
    convert_frame.FRAME_COUNTER += 1  # names by identity end in the number of the frame
