"""From a model to imported graphs: through AOTAutograd (a Dynamo backend) or through ``torch.export``.

``aot`` is for a Dynamo backend: it hands every graph (inference, forward, backward), already imported, to
a function that compiles it. ``export_graph`` gives the one inference graph of a model without running it;
meta tensors do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from ..errors import TesselError, check
from . import compat
from .attention_match import join_attention
from .composites import keep_composites
from .decomp import decompositions, for_export
from .early_gradients import make_early
from .experts import join_experts
from .flex import join_flex
from .fx_words import complete_examples
from .importer import Imported, import_graph
from .library_functions import exporting, seen_notes
from .locs import qualified_name
from .loops.roll import roll
from .loops.scans import lower_scans
from .loops.selective import fold_states
from .loops.written import keep_first_factors
from .losses import join_losses
from .recompute import partition
from .sizes import settle


@dataclass(frozen=True)
class GraphInfo:
    """What is known of a captured graph beside its nodes.

    Attributes:
        kind: ``inference``, ``forward`` (it saves tensors for the backward) or ``backward``.
        static_inputs: positions of inputs whose storage stays the same from call to call.
        fake_inputs: the example inputs, fake tensors and symbolic sizes.
        order: for each input, which argument of the Dynamo graph it is; None where that is not known.
        notes: what the rewrites of the Dynamo graph left alone, and why.
    """

    kind: str
    static_inputs: tuple[int, ...] = ()
    fake_inputs: tuple[Any, ...] = ()
    order: tuple[int | None, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_inference(self) -> bool:
        return self.kind == "inference"


# compile_graph(imported, info) -> callable taking one list of inputs and returning a list of outputs.
CompileGraph: TypeAlias = Callable[[Imported, GraphInfo], Callable[[list[Any]], Sequence[Any]]]


def aot(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compile_graph: CompileGraph, early: bool = False
) -> Callable[..., Any]:
    """Compile a Dynamo graph with AOTAutograd.

    Args:
        gm: the graph module a Dynamo backend receives; composites in it are rewritten in place.
        example_inputs: as the backend receives them.
        compile_graph: called once a graph. The callable it returns gets one list, in the order of
            ``imported.graph.inputs`` without those of role ``constant``, and may clear the list.
        early: gradients of losses are made where the losses are (see ``early_gradients``); not for a graph that a
            mesh splits, whose pieces of the vocabulary do not know the whole sum.

    Returns:
        What a Dynamo backend has to return.
    """
    settle(gm)
    if lower_scans(gm) + roll(gm):
        complete_examples(gm)
        fold_states(gm)
        keep_first_factors(gm)
    keep_composites(gm)
    notes = [*seen_notes(), *join_flex(gm)[1], *join_attention(gm)[1], *join_experts(gm)[1], *join_losses(gm)[1]]
    names = _input_names(gm)

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_fx(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            static = _static_positions(graph, kind)
            roles = _roles(graph, names, static)
            imported = import_graph(graph, name=kind, roles=roles)
            order = tuple(_captured_position(n) for n in _placeholders(graph))
            info = GraphInfo(kind, static, tuple(inputs), order, () if kind == "backward" else tuple(notes))
            return compat.boxed(compile_graph(imported, info))

        return compile_fx

    def parted(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        if early:
            make_early(joint)
        return partition(joint, inputs, **options)

    backend = compat.aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=parted,
        decompositions=decompositions(),
        keep_inference_input_mutations=True,
    )
    with compat.aot_options():
        return backend(gm, example_inputs)  # type: ignore[no-any-return]


def _input_names(gm: fx.GraphModule) -> list[tuple[str, str] | None]:
    """Name and role of each input of a Dynamo graph; None for what is no parameter or buffer."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [qualified_name(compat.dynamo_source(n)) for n in placeholders]


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "placeholder"]


def _captured_position(node: fx.Node) -> int | None:
    """Which argument of the Dynamo graph a placeholder of an AOTAutograd graph is."""
    found = compat.input_index(node)
    if found is None and node.name.startswith("primals_"):
        found = int(node.name.removeprefix("primals_")) - 1
    if found is None and node.name.startswith("arg") and node.name.endswith("_1"):
        middle = node.name[3:-2]
        found = int(middle) if middle.isdigit() else None
    return found


def _static_positions(graph: fx.GraphModule, kind: str) -> tuple[int, ...]:
    static = set(compat.static_input_indices())
    if kind != "backward":
        return tuple(sorted(static))
    # Saved parameters keep the number they had in the forward graph.
    found = []
    for i, node in enumerate(_placeholders(graph)):
        if node.name.startswith("primals_") and _captured_position(node) in static:
            found.append(i)
    return tuple(found)


def _roles(
    graph: fx.GraphModule, names: list[tuple[str, str] | None], static: tuple[int, ...]
) -> dict[int, tuple[str, str]]:
    roles: dict[int, tuple[str, str]] = {}
    for i, node in enumerate(_placeholders(graph)):
        at = _captured_position(node)
        known = names[at] if at is not None and at < len(names) else None
        if known is not None and isinstance(node.meta.get("val"), torch.Tensor):
            roles[i] = known
        elif i in static:
            roles[i] = (node.name, "param")
    return roles


# ---------------------------------------------------------------- export


def export_graph(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
) -> Imported:
    """The inference graph of a model, with symbolic sizes where ``dynamic`` says so.

    Args:
        model: a module; its tensors may be on the meta device.
        args: positional example inputs.
        kwargs: keyword example inputs.
        dynamic: ``dynamic_shapes`` as ``torch.export`` takes it; None for fixed sizes.

    Returns:
        The imported graph. Parameters and buffers are inputs with their qualified names and the roles
        ``param`` and ``buffer``; the user's inputs follow, flattened. Buffers and inputs that the model
        writes to are effects.
    """
    kind = type(model).__name__
    check(isinstance(model, torch.nn.Module), lambda: f"export needs an nn.Module, got {kind}")
    return import_program(export_program(model, args, kwargs, dynamic))


def export_program(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, dynamic: Any = None
) -> torch.export.ExportedProgram:
    """What ``import_program`` takes: a module or function exported as one graph, its operators decomposed.

    Raises:
        TesselError: torch cannot export it; the message is torch's.
    """
    module = model if isinstance(model, torch.nn.Module) else _Function(model)
    try:
        with exporting():
            program = torch.export.export(module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic, strict=False)
        seen_notes()  # there is no report of an export
        join_attention(program.graph_module)
        _drop_checks(program.graph_module)
        join_experts(program.graph_module, train=False)
        return program.run_decompositions(for_export())
    except Exception as e:  # export raises everything that the model may raise, and classes of its own
        kept = "".join(f". {note}" for note in seen_notes() if "is traced as it is" in note)
        raise TesselError(f"torch cannot export the model as one graph: {type(e).__name__}: {e}{kept}") from e


def _drop_checks(gm: fx.GraphModule) -> None:
    """Erase what asserts that tensors have the dtypes they were exported with: it reads them, and matters to no one."""
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)


class _Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def import_program(program: torch.export.ExportedProgram) -> Imported:
    """The IR of an exported program whose operators are already decomposed (see ``for_export``)."""
    signature = program.graph_signature
    roles: dict[int, tuple[str, str]] = {}
    constants: dict[str, Any] = {}
    for i, spec in enumerate(signature.input_specs):
        kind, target = spec.kind.name, spec.target
        if kind == "PARAMETER":
            roles[i] = (str(target), "param")
        elif kind == "BUFFER":
            roles[i] = (str(target), "buffer")
        elif kind == "CONSTANT_TENSOR":
            roles[i] = (str(target), "constant")
            constants[str(target)] = program.constants[str(target)]
    imported = import_graph(program.graph_module, name="inference", roles=roles)
    return _with_effects(imported, program, constants)


def _with_effects(imported: Imported, program: torch.export.ExportedProgram, constants: dict[str, Any]) -> Imported:
    """Outputs that stand for mutations become effects; constants get their tensors."""
    graph = imported.graph
    by_name = {n.attrs["name"]: n for n in graph.inputs}
    placeholders = _placeholders(program.graph_module)
    position = {n.name: i for i, n in enumerate(placeholders)}
    outputs: list[Any] = []
    effects = list(graph.effects)
    for value, spec in zip(graph.outputs, program.graph_signature.output_specs, strict=True):
        kind, target = spec.kind.name, spec.target
        if kind == "BUFFER_MUTATION":
            effects.append((by_name[str(target)], value))
        elif kind == "USER_INPUT_MUTATION":
            effects.append((graph.inputs[position[str(target)]], value))
        elif kind != "TOKEN":
            outputs.append(value)
    graph = graph.replace(outputs=tuple(outputs), effects=tuple(effects))
    return Imported(graph, {**imported.constants, **constants}, imported.fallbacks, imported.hints, imported.device)


__all__ = ["CompileGraph", "GraphInfo", "aot", "export_graph", "export_program", "import_program"]
