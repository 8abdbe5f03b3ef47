"""``tessel run``: one step of a plan on the processes that torchrun started, timed, counted and, if asked, checked."""

from __future__ import annotations

import copy
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from ..config import world_size
from ..errors import TesselError, check
from ..sharding.plan_file import ShardingPlan, read_plan
from .model import MODEL_HELP

if TYPE_CHECKING:
    import torch

    from ..sharding.distributed import Distributed

__all__ = ["run"]

# How much further from float64 than one device may a distributed run be: sums in another order, of more terms.
_FURTHER = 8.0


@click.command(epilog=MODEL_HELP)
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--check", "checked", is_flag=True, help="Compare results and gradients with one device.")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(min=1), help="Steps to time.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the model, as it was planned.")
@click.option("--dtype", help="As it was planned (hf: bfloat16).")
@click.option("--lr", default=1e-3, show_default=True, type=float, help="The optimizer's rate.")
@click.option("--timeout", default=300.0, show_default=True, type=float, help="Seconds to wait for another rank.")
def run(
    plan_file: Path, model: str, checked: bool, steps: int, layers: int | None, dtype: str | None, lr: float,
    timeout: float,
) -> None:  # fmt: skip
    """Run a plan of MODEL: torchrun --nproc-per-node N -m tessel run plan.json MODEL.

    A step is a forward and, if the plan is for training, a loss, the backward and the optimizer. When a rank fails, all
    stop, and name the collective and the source line.
    """
    import torch.distributed as dist

    plan = read_plan(plan_file)
    world = world_size()
    if world is None:
        raise TesselError(
            "run: no other processes; start it as: "
            f"torchrun --nproc-per-node {plan.world} -m tessel run {plan_file} {model}"
        )
    plan.check_model(world=world)
    dist.init_process_group("gloo")
    try:
        lines = _run(plan, model, checked, steps, layers, dtype, lr, timeout)
    except Exception as e:
        # the closed connection tells whoever waits for this rank; an orderly end could wait for those that are gone
        sys.stderr.write(f"rank {dist.get_rank()}: {e if isinstance(e, TesselError) else repr(e)}\n")
        sys.stderr.flush()
        os._exit(2)
    if dist.get_rank() == 0:
        console = Console(file=sys.stdout, highlight=False)
        console.width = max(console.width, 100)
        for line in lines:
            console.print(line)
    dist.destroy_process_group()


def _run(
    plan: ShardingPlan, model: str, checked: bool, steps: int, layers: int | None, dtype: str | None, lr: float,
    timeout: float,
) -> list[Any]:  # fmt: skip
    import torch

    from ..models import load_model
    from ..sharding.distributed import distribute

    settings = plan.data["settings"]
    seq = settings["seq"] if plan.data["inputs"] and _has_tokens(plan) else None
    kind = dtype or ("bfloat16" if model.startswith("hf:") else None)
    size: dict[str, Any] = {"batch": settings["global_batch"], "seq": seq, "dtype": kind, "layers": layers}
    if not model.startswith("hf:"):
        size = {}  # a function says itself what its tensors are
    torch.manual_seed(0)
    module, args, kwargs = load_model(model, **size)
    check(isinstance(module, torch.nn.Module), lambda: f"run: {model} is no nn.Module")
    assert isinstance(module, torch.nn.Module)
    placed = distribute(module, plan, args=args, kwargs=kwargs, seconds=timeout)
    train = bool(settings["train"])
    lines: list[Any] = []
    if checked:
        lines.append(_check(placed, module, args, kwargs, train))
    optimizer = _optimizer(settings["optimizer"], placed, lr) if train else None
    took = []
    for _ in range(steps + 1):
        before = copy.copy(placed.by.sent.bytes), copy.copy(placed.by.sent.calls)
        start = time.perf_counter()
        _step(placed, args, kwargs, optimizer)
        took.append(time.perf_counter() - start)
    sent, calls = placed.by.sent.bytes - before[0], placed.by.sent.calls - before[1]
    planned = int(plan.data["program"]["bytes"])
    total = sum(sent.values())
    check(total == planned, lambda: f"rank {placed.by.rank} sent {total} bytes in a step, the plan says {planned}")
    return [*lines, _table(plan, placed, optimizer, took, sent, calls)]


def _has_tokens(plan: ShardingPlan) -> bool:
    return any(x["dtype"].startswith("i") for x in plan.data["inputs"].values())


def _optimizer(name: str, placed: Distributed, lr: float) -> torch.optim.Optimizer:
    import torch

    if name == "adamw":
        return torch.optim.AdamW(placed.parameters(), lr=lr)
    return torch.optim.SGD(placed.parameters(), lr=lr, momentum=0.9 if name == "sgd-momentum" else 0.0)


def _step(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], optimizer: torch.optim.Optimizer | None
) -> None:
    import torch

    if optimizer is None:
        with torch.no_grad():
            model(*args, **kwargs)
        return
    optimizer.zero_grad()
    _loss(model(*args, **kwargs), args, kwargs).backward()
    optimizer.step()


def _tensors(result: Any) -> list[torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]


def _loss(result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The model's own loss if it returns one, the next token's cross-entropy of logits, or the mean of squares."""
    import torch

    from ..frontend.joint import tensors_of

    found = _tensors(result)
    check(bool(found), lambda: "run: the model returns no tensor to train on")
    own = next((x for x in found if x.dim() == 0), None)
    if own is not None:
        return own
    ids = next((x for x in tensors_of(args, kwargs) if x.dtype == torch.int64 and x.dim() == 2), None)
    logits = found[0]
    if ids is not None and logits.dim() == 3 and logits.shape[:2] == ids.shape:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return torch.stack([x.double().square().mean() for x in found]).sum()


# ---------------------------------------------------------------- the check


def _check(
    placed: Distributed, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: bool
) -> str:
    """Compare a step with one device's, both with float64.

    Raises:
        TesselError: a result or a gradient is further from float64 than one device's by a factor; it is named.
    """
    import torch
    from torch.utils import _pytree as pytree

    from ..runtime.shares import share

    exact = copy.deepcopy(module).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # type: ignore[operator] # grouped products of float64 are not in torch

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point else x

    wide_args, wide_kwargs = pytree.tree_map(wide, (tuple(args), dict(kwargs)))
    state = torch.get_rng_state()
    runs = []
    for model, a, k in ((exact, wide_args, wide_kwargs), (module, args, kwargs), (placed, args, kwargs)):
        torch.set_rng_state(state)
        with torch.set_grad_enabled(train):
            result = model(*a, **k)
            if train:
                model.zero_grad()
                _loss(result, a, k).backward()
        runs.append([x.detach() for x in _tensors(result)])
    names = [f"result {i}" for i in range(len(runs[0]))]
    triples = list(zip(*runs, strict=True))
    mine = dict(placed.module.named_parameters())
    for name, p in module.named_parameters() if train else ():
        if p.grad is None:
            continue
        whole = dict(exact.named_parameters())[name].grad
        assert whole is not None
        lies, mesh = placed.shardings.get(name), placed.spmd.mesh
        parts = [x if lies is None else share(x, lies, mesh, placed.by.rank) for x in (whole, p.grad)]
        names.append(f"the gradient of {name}")
        triples.append((*parts, mine[name].grad))
    worst = 0.0
    for name, (want, single, got) in zip(names, triples, strict=True):
        scale = float(want.abs().max()) if want.numel() else 0.0
        floor = torch.finfo(single.dtype).eps * scale
        ours, theirs = (float((x.double() - want).abs().max()) if want.numel() else 0.0 for x in (got, single))
        allowed = _FURTHER * max(theirs, floor)
        worst = max(worst, ours / allowed if allowed else ours)
        if not ours <= allowed:
            raise TesselError(
                f"check: {name} is {ours:.3g} from float64, one device's {theirs:.3g}; {allowed:.3g} would be allowed"
            )
    for model in (module, placed):
        model.zero_grad()
    what = "results and gradients" if train else "results"
    return f"check: {len(names)} {what} as one device's; at most {worst:.0%} of the error that is allowed"


# ---------------------------------------------------------------- the report


def _table(
    plan: ShardingPlan, placed: Distributed, optimizer: torch.optim.Optimizer | None, took: Sequence[float],
    sent: Mapping[str, int], calls: Mapping[str, int],
) -> Table:  # fmt: skip
    table = Table(box=None, pad_edge=False, show_header=False)
    axes = ", ".join(f"{a}={n}" for a, n in plan.mesh.items())
    table.add_row("model", f"{plan.data['model']['name']} on {axes}")
    first, rest = took[0], took[1:]
    table.add_row("step", f"{statistics.median(rest) * 1e3:.2f} ms, the first {first:.2f} s (kernels are compiled)")
    for kind in sorted(sent, key=lambda k: -sent[k]):
        table.add_row(kind, f"{calls[kind]} calls, {sent[kind]:,} bytes")
    table.add_row("sent in a step", f"{sum(sent.values()):,} bytes, as the plan says")
    params = sum(p.numel() * p.element_size() for p in placed.parameters())
    table.add_row("parameters", f"{params:,} bytes on rank 0")
    if optimizer is not None:
        grads = sum(p.grad.numel() * p.grad.element_size() for p in placed.parameters() if p.grad is not None)
        state = sum(
            x.numel() * x.element_size() for v in optimizer.state.values() for x in v.values() if hasattr(x, "numel")
        )
        table.add_row("gradients", f"{grads:,} bytes on rank 0")
        table.add_row("optimizer", f"{state:,} bytes on rank 0")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    table.add_row("peak memory", f"{peak / 2**20:.0f} MiB of the process of rank 0, Python and torch included")
    return table
