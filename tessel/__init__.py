"""Tessel: PyTorch models to fused Triton kernels, and a record of what was done and why.

import tessel

fast = tessel.compile(model)         # nn.Module or function
y = fast(x)                          # the same result; gradients too
print(tessel.explain(model, x))      # what became of it
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .backend import name_of
from .config import Options
from .driver import Session
from .errors import TesselError
from .frontend.linear_attention_op import linear_attention
from .place import resolve_target
from .report import Report
from .sharding.annotate import Annotations, annotate
from .targets import TARGETS
from .targets.mesh import Mesh
from .wrapper import RecompileLimit, compile_function, explain_call

if TYPE_CHECKING:
    import torch

    from .loaded import Loaded
    from .quant.scheme import Scheme
    from .sharding.distributed import Distributed
    from .sharding.plan_file import ShardingPlan
    from .sharding.staged import Pipeline, Staged

__version__ = "0.1.0"
__all__ = [
    "TARGETS",
    "Annotations",
    "Mesh",
    "Options",
    "RecompileLimit",
    "Report",
    "TesselError",
    "annotate",
    "compile",
    "distribute",
    "explain",
    "linear_attention",
    "load",
    "plan",
    "quantize",
]


def compile(
    fn: Callable[..., Any] | None = None,
    *,
    target: str = "auto",
    dynamic: bool | None = None,
    fullgraph: bool = False,
    quantize: Any = None,
    plan: Any = None,
    options: Options | Mapping[str, Any] | None = None,
) -> Any:
    """Compile a module or a function; without ``fn``, a decorator with these arguments.

    The result is called like the original and gives the same values, gradients and exceptions. Nothing is
    compiled before the first call. Of a module, attributes, parameters, ``state_dict``, ``train`` and ``eval``
    are those of the module inside, as with ``torch.compile``.

    Args:
        fn: an ``nn.Module`` or any callable on tensors.
        target: "auto" follows the inputs' device; "cpu", "cuda", "triton-interpret" (the generated Triton
            kernels on the CPU, slow and exact) or a name that ``tessel targets`` lists.
        dynamic: True keeps sizes symbolic from the first call, so that one compilation serves every size
            from 2 on; False compiles again for every new size; None keeps a size symbolic once it changed.
        fullgraph: raise instead of compiling in pieces where torch cannot capture everything at once.
        quantize: a scheme, as ``tessel.quantize`` takes it: the linear layers of a copy of the module are rounded to
            nearest first.
        plan: must be None; ``distribute`` runs plans.
        options: an ``Options``, or its fields as a mapping.

    Returns:
        The compiled module or function, or the decorator.

    Raises:
        TesselError: an argument that is wrong; the message says what to write instead. A compiled function
            called with tensors on a device it was not compiled for raises it too.
    """
    if plan is not None:
        raise TesselError(f"compile: plan={plan!r}: tessel.distribute(model, plan) runs a plan; leave plan out")
    if quantize is not None:
        from .quant.scheme import Scheme, scheme

        try:
            quantize = quantize if isinstance(quantize, Scheme) else scheme(quantize)
        except (TesselError, TypeError) as e:
            raise TesselError(f"compile: quantize={quantize!r}: {e}") from e
    target = resolve_target(target)
    chosen = Options.of(options)
    for name, flag, allowed in (
        ("dynamic", dynamic, (None, True, False)),
        ("fullgraph", fullgraph, (True, False)),
    ):
        if not any(flag is a for a in allowed):
            raise TesselError(f"compile: {name}={flag!r}: expected {' or '.join(map(str, allowed))}")

    def decorate(f: Callable[..., Any]) -> Any:
        if not callable(f):
            raise TesselError(
                f"compile: expected an nn.Module or a function, got {type(f).__name__}: {f!r}; "
                "arguments other than the function go by name"
            )
        if quantize is not None:
            if not hasattr(f, "named_modules"):
                raise TesselError(f"compile: quantize={quantize!r} needs a module, not {f!r}")
            f = _quantize(cast("torch.nn.Module", f), quantize)
        session = Session(target, chosen, Report(name_of(f), target))
        return compile_function(f, session, dynamic=dynamic, fullgraph=fullgraph)

    return decorate if fn is None else decorate(fn)


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Compile a model, call it once and tell what was done: graphs, kernels, what fused, what fell back.

    Buffers, gradients and the random state are left as they were. If the result depends on parameters, the
    backward is compiled too.

    Args:
        model: an ``nn.Module`` or a function; or what ``compile`` returned, and then the report is the one
            that it has been keeping since, recompiles included. Such a one may be given without arguments.
        args, kwargs: what it is called with.

    Returns:
        A ``Report``: ``str()``, ``.html()``, ``.to_dict()``.

    Raises:
        TesselError: ``model`` is not callable; or an argument that ``compile`` has and the model does not.
    """
    if not callable(model):
        raise TesselError(f"explain: expected an nn.Module or a function, got {type(model).__name__}: {model!r}")
    for name in sorted(inspect.signature(compile).parameters.keys() & kwargs.keys()):
        if not _takes(model, name):
            raise TesselError(
                f"explain: {name_of(model)} takes no {name!r}; arguments of compile go to compile: "
                f"explain(compile(model, {name}=...), ...)"
            )
    return explain_call(model, args, kwargs)


def _takes(model: Callable[..., Any], name: str) -> bool:
    try:
        taken = inspect.signature(getattr(model, "forward", model)).parameters
    except ValueError:  # a function written in C that does not tell
        return True
    return name in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def load(folder: str | Path, weights: Mapping[str, torch.Tensor] | None = None, device: str | None = None) -> Loaded:
    """The model that ``tessel compile MODEL --target NAME --out folder`` built, ready to be called without gradients.

    Args:
        folder: the build.
        weights: parameters and buffers by name (a ``state_dict``); they go before those in the folder, and must be
            there if the build has none.
        device: where it runs, ``"cuda:1"`` for example; the target's own kind by default.

    Returns:
        What is called as the model was, with inputs of the sizes and dtypes that it was built with.

    Raises:
        TesselError: no build, or a damaged one; another device than the target; missing or different weights.
    """
    from .loaded import load as load_build  # what reads builds is not needed for anything else

    return load_build(folder, weights, device)


def plan(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh,
    target: str,
    train: bool | None = None,
    optimizer: str = "adamw",
    memory: int | None = None,
    remat: str = "auto",
    microbatches: int = 1,
    zero: int | None = None,
    capacity: float | None = None,
    bucket: int | None = None,
    in_flight: int | None = None,
    gpus_per_node: int | None = None,
    free_axes: bool = False,
    annotations: Annotations | None = None,
    progress: Callable[[str], None] | None = None,
) -> ShardingPlan:
    """Find the fastest sharding of a model on a mesh that fits in memory. No devices are needed, nor weights.

    What ``annotate`` was told about the model is kept; everything else is chosen. ``distribute`` runs the plan;
    ``plan.write("plan.json")`` keeps it, ``tessel.sharding.text.plan_text(plan)`` prints it.

    Args:
        model: on any device, ``meta`` included.
        args, kwargs: of one step, the whole mesh's batch; sizes are fixed to theirs.
        mesh: axes and sizes, the slowest first, as ``Mesh({"dp": 2, "tp": 4})``. Names say what an axis splits: dp and
            fsdp the batch, tp all but the batch, sp and cp the sequence (ring and ulysses too: they say how attention
            copes); other names anything.
        target: a name from ``TARGETS``.
        train: plan a training step; by default if the model is in training mode.
        optimizer: "adamw", "sgd" or "sgd-momentum".
        memory: bytes that a device may hold; what it has by default.
        remat: "none", "selective" or "full": which activations of a block the backward computes again; "auto" chooses.
        microbatches: parts of the batch that run one after another, their gradients added up.
        zero: the stage (0 to 3) that every parameter has which can be kept apart; the best for each by default.
        capacity: times the even share of tokens that a device may send to the experts of another one; more of them
            end the run. Without it tokens are gathered where experts are split.
        bucket: the most bytes that one call of several collectives carries, 25 MiB by default; 0 merges nothing.
        in_flight: the most memory that collectives take which begin before their results are read, 100 MiB by default;
            0 begins none early. Neither goes beyond what ``memory`` leaves.
        gpus_per_node: ranks that share a node.
        free_axes: every axis may split anything, whatever its name.
        annotations: instead of what ``annotate`` was told about the model.
        progress: is called with a line of words now and then.

    Raises:
        TesselError: an annotation does not fit (its file and line are named), nothing fits in memory (the message
            says what needs how much), or torch cannot capture the model as one graph.
    """
    from .sharding.planned import plan_model  # the search is not needed for anything else
    from .sharding.planner import Request

    calls: dict[str, Any] = {k: n for k, n in (("bucket", bucket), ("in_flight", in_flight)) if n is not None}
    request = Request(
        train=model.training if train is None else train,
        optimizer=optimizer,
        remat=remat,
        memory=memory,
        microbatches=microbatches,
        zero=zero,
        capacity=capacity,
        gpus_per_node=gpus_per_node,
        roles=not free_axes,
        **calls,
    )
    return plan_model(
        model, args, kwargs, mesh=mesh, target=target, request=request, annotations=annotations, progress=progress
    )


def quantize(
    model: torch.nn.Module,
    scheme: str | Scheme | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    method: str = "rtn",
    skip: Sequence[str] = ("lm_head",),
    inplace: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    budget: str | None = None,
    widths: Sequence[int] | None = None,
    shards: int = 1,
    target: str | None = None,
    rows: int = 1,
    work: str | Path | None = None,
) -> torch.nn.Module:
    """The model with its linear layers in few bits; ``.quantization`` of it says what became of each.

    Args:
        model: its layers, inputs and outputs keep their shapes and dtypes.
        scheme: "w8a16", "w4a16-g64", "w8a8", "fp8", "mxfp4", "nf4", ...; see ``tessel.quant.scheme``. With a budget,
            of its weight format only whether it is symmetric counts. "kv4", alone or as in "w4a16-kv4", is about the
            cache of a language model of transformers, which then makes a ``tessel.quant.kv.QuantCache``.
        calibration: what the model is called with, one item a call: a tensor, a tuple of arguments or a mapping.
        method: "rtn", "mse", "gptq" or "turboboa" (how codes are chosen), after "smoothquant", "awq" or "hadamard"
            (what is done to the weight before), joined by +.
        skip: names or patterns of layers that stay whole.
        inplace: change the model itself instead of a copy.
        progress: called with the layer's name, how many are done and how many there are.
        budget: "4.25bits" (stored bits a weight, on average), "30GiB" (of all parameters), "20dB" (of the model's
            result on the calibration data; without any, of the weights) or "250us" (predicted, of all layers on the
            target): bits and group are chosen layer by layer; see ``tessel.quant.bits``.
        widths: the bits that a budget chooses from.
        shards: pieces that every layer's k will be cut in: what a budget chooses allows it, and a layer whose groups
            would not stays whole.
        target: where speed is predicted, for ``rows`` rows of a layer's inputs; a layer that would be slower there than
            it is stays whole.
        work: a folder for finished layers. After an interruption the same call goes on where it was; another one is
            refused.

    Raises:
        TesselError: an unknown scheme or method, no calibration data where it is needed, NaN in weights or data, a
            budget that nothing meets.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> small = quantize(model, "w4a16-g32")
    >>> small.quantization.before, small.quantization.after
    (41344, 6784)
    >>> small(torch.randn(2, 128)).shape
    torch.Size([2, 32])
    """
    from .quant.model import quantize_model  # what it needs is needed for nothing else

    return quantize_model(
        model, scheme, calibration, method=method, skip=skip, inplace=inplace, progress=progress, budget=budget,
        widths=widths, shards=shards, target=target, rows=rows, work=work,
    )  # fmt: skip


_quantize = quantize


def distribute(
    model: torch.nn.Module,
    plan: Any = None,
    *,
    mesh: Mesh | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    annotations: Annotations | None = None,
    train: bool | None = None,
    weights: str | Path | Mapping[str, torch.Tensor] | None = None,
    init: Callable[[torch.nn.Module], Any] | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    pipeline: Pipeline | None = None,
) -> Distributed | Staged:
    """This process's part of a model on a mesh, ready to train or to infer; under torchrun, on every process.

    Called with the whole inputs it gives the model's whole results; its parameters, under the model's names,
    and their gradients are this rank's shards.

    Args:
        model: with its parameters, the same on every process; they are read, not changed. Or on the meta device: then
            only this rank's shards are ever made, by ``weights`` or ``init``.
        plan: what ``plan`` made, or the name of a plan file; what runs is what it says, to the byte.
        mesh: as many devices as there are processes, as ``Mesh({"dp": 2, "tp": 4})``.
        args, kwargs: example arguments; sizes are fixed to theirs.
        annotations: instead of what ``annotate`` was told about the model.
        train: with gradients; by default if the model is in training mode. A plan says it itself.
        weights: for a model on the meta device: safetensors (a file, an index, a folder), or tensors by name.
        init: for a model on the meta device: writes its parameters and buffers in place, as on one device.
        loss: of a mesh with stages (``pp``) that trains: ``loss(result, target)`` of one microbatch. The stages run by
            ``.step(inputs, target=target)``.
        pipeline: where stages begin and their schedule, ``tessel.sharding.staged.Pipeline``, if no plan says it.

    Raises:
        TesselError: torch.distributed is not initialised, the world is not the mesh, an annotation does not fit
            (its file and line are named), or torch cannot capture the model as one graph.
    """
    from .sharding.staged import distribute_model as run  # what talks to other processes is needed only here

    return run(
        model,
        plan,
        mesh=mesh,
        args=args,
        kwargs=kwargs,
        annotations=annotations,
        train=train,
        weights=weights,
        init=init,
        loss=loss,
        pipeline=pipeline,
    )
