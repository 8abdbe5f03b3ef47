"""``tessel run``: one step of a plan on the processes that torchrun started, timed, counted and, if asked, checked."""

from __future__ import annotations

import copy
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import click
from rich.console import Console
from rich.table import Table

from ..config import world_size
from ..errors import TesselError, check
from ..sharding.plan_file import ShardingPlan, read_plan
from .model import MODEL_HELP, as_planned

if TYPE_CHECKING:
    import torch

    from ..sharding.distributed import Distributed
    from ..sharding.staged import Staged

__all__ = ["run"]

Placed: TypeAlias = "Distributed | Staged"

# How much further from float64 than one device may a distributed run be: sums in another order, of more terms.
_FURTHER = 8.0


@click.command(epilog=MODEL_HELP)
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--check", "checked", is_flag=True, help="Compare results and gradients with one device.")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(min=1), help="Steps to time.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the model [as it was planned].")
@click.option("--dtype", help="Of the model's tensors [as it was planned].")
@click.option("--lr", default=1e-3, show_default=True, type=float, help="The optimizer's rate.")
@click.option(
    "--timeout", default=300.0, show_default=True, type=click.FloatRange(min=1, max=86400),
    help="Seconds to wait for another rank.",
)  # fmt: skip
def run(
    plan_file: Path, model: str, checked: bool, steps: int, layers: int | None, dtype: str | None, lr: float,
    timeout: float,
) -> None:  # fmt: skip
    """Run a plan of MODEL: torchrun --nproc-per-node N -m tessel run plan.json MODEL.

    A step is a forward and, if the plan is for training, a loss, the backward and the optimizer; of a plan with
    microbatches or stages, those of all microbatches. When a rank fails, all stop, and name the collective and the
    source line.
    """
    import torch.distributed as dist

    if world_size() is None:
        world = read_plan(plan_file).world
        raise TesselError(
            f"run: no other processes; start it as: torchrun --nproc-per-node {world} -m tessel run {plan_file} {model}"
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        plan = read_plan(plan_file)
        plan.check_model(world=dist.get_world_size())
        lines = _run(plan, model, checked, steps, layers, dtype, lr, timeout)
    except Exception as e:
        _stop(_words(e))
    if dist.get_rank() == 0:
        console = Console(file=sys.stdout, highlight=False)
        console.width = max(console.width, 100)
        for line in lines:
            console.print(line)
    dist.destroy_process_group()


def _words(e: Exception) -> str:
    """What an exception says to a user."""
    if isinstance(e, TesselError):
        return str(e)
    gone = isinstance(e, RuntimeError) and "onnection" in str(e)
    return f"a rank is gone ({str(e).splitlines()[0][:200]})" if gone else f"{type(e).__name__}: {e}"


def _stop(why: str) -> NoReturn:
    """End this rank with what went wrong; of ranks that fail alike, the first one says it."""
    import torch.distributed as dist

    from ..frontend.compat import default_store

    rank, first = dist.get_rank(), ""
    try:
        first = default_store().compare_set("tessel run stopped", "", f"{rank} {why}").decode()
    except RuntimeError:  # whoever keeps the store is gone: say it oneself
        first = f"{rank} {why}"
    teller, _, said = first.partition(" ")
    if int(teller) == rank or said != why:
        sys.stderr.write(f"Error: rank {rank}: {why}\n")
        sys.stderr.flush()
    # the closed connection tells whoever waits for this rank; an orderly end could wait for those that are gone
    os._exit(2)


def _run(
    plan: ShardingPlan, model: str, checked: bool, steps: int, layers: int | None, dtype: str | None, lr: float,
    timeout: float,
) -> list[Any]:  # fmt: skip
    import torch

    from ..models import load_model
    from ..sharding.staged import distribute_model

    settings = plan.data["settings"]
    torch.manual_seed(0)
    module, args, kwargs = load_model(model, **as_planned(plan, model, dtype=dtype, layers=layers))
    if not isinstance(module, torch.nn.Module):
        raise TesselError(f"run: {model} is a function; a plan is of a module")
    _check_size(plan, model, module)
    train = bool(settings["train"])
    by_steps = "pipeline" in plan.data or settings["microbatches"] > 1
    placed = distribute_model(
        module, plan, args=args, kwargs=kwargs, loss=_loss if train and by_steps else None, seconds=timeout
    )
    work = _Work(tuple(args), dict(kwargs), _target(args, kwargs), train)
    lines: list[Any] = []
    if checked:
        lines.append(_check(placed, module, work))
    optimizer = _optimizer(settings["optimizer"], placed, lr) if train else None
    took, before = [], (0, copy.copy(placed.by.sent.bytes), copy.copy(placed.by.sent.calls))
    for _ in range(steps + 1):
        before = placed.sent, copy.copy(placed.by.sent.bytes), copy.copy(placed.by.sent.calls)
        start = time.perf_counter()
        if optimizer is not None:
            optimizer.zero_grad()
        work.on(placed)
        if optimizer is not None:
            optimizer.step()
        took.append(time.perf_counter() - start)
    total = placed.sent - before[0]
    if total != placed.planned:
        raise TesselError(f"{total} bytes were sent in a step, the plan's programs send {placed.planned}")
    sent, calls = placed.by.sent.bytes - before[1], placed.by.sent.calls - before[2]
    return [*lines, _table(plan, placed, optimizer, took, sent, calls, total)]


def _check_size(plan: ShardingPlan, model: str, module: torch.nn.Module) -> None:
    """Refuse a model that is small because only its type was named, where the plan is for one of full size."""
    from ..sharding.captured import parameters_of

    if not model.startswith("hf:") or model.endswith(".json"):
        return
    own, said = sum(prod(shape) for _, shape, _ in parameters_of(module)), plan.data["model"]["parameters"]
    check(
        own == said,
        lambda: (
            f"run: {model} names a type, of which a small model is run, {own:,} parameters; the plan is for {said:,}. "
            "Plan with --whole (and the same --layers) to run that small one, or name a config file: hf:FILE.json"
        ),
    )


def _optimizer(name: str, placed: Placed, lr: float) -> torch.optim.Optimizer:
    import torch

    if name == "adamw":
        return torch.optim.AdamW(placed.parameters(), lr=lr)
    return torch.optim.SGD(placed.parameters(), lr=lr, momentum=0.9 if name == "sgd-momentum" else 0.0)


@dataclass(frozen=True)
class _Work:
    """What a step is given; ``target`` is what the loss is told of the rows."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: torch.Tensor
    train: bool

    def on(self, model: torch.nn.Module) -> Any:
        """Run a step without an optimizer: gradients add up. The results, None on ranks whose stage has none."""
        import torch

        from ..sharding.accumulate import Accumulating
        from ..sharding.staged import Staged

        if isinstance(model, Accumulating | Staged):
            got = model.step(*self.args, target=self.target if self.train else None, **self.kwargs)
            return None if got is None else got[0]
        with torch.set_grad_enabled(self.train):
            result = model(*self.args, **self.kwargs)
            if self.train:
                _loss(result, self.target).backward()
        return result

    def wide(self) -> _Work:
        """In float64."""
        import torch

        from ..frontend.compat import pytree

        def one(x: Any) -> Any:
            return x.double() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point else x

        args, kwargs, target = pytree.tree_map(one, (self.args, dict(self.kwargs), self.target))
        return _Work(args, kwargs, target, self.train)


def _tensors(result: Any) -> list[torch.Tensor]:
    import torch

    from ..frontend.compat import pytree

    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]


def _target(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a loss is told of the rows: their tokens, if there are some, else the model's first tensor."""
    import torch

    from ..frontend.joint import tensors_of

    given = tensors_of(args, kwargs)
    check(bool(given), lambda: "run: the model takes no tensors: there is nothing to split")
    return next((x for x in given if x.dtype == torch.int64 and x.dim() == 2), given[0])


def _loss(result: Any, target: torch.Tensor) -> torch.Tensor:
    """The model's own loss if it returns one, the next token's cross-entropy of logits, or the mean of squares."""
    import torch

    found = _tensors(result)
    check(bool(found), lambda: "run: the model returns no tensor to train on")
    own = next((x for x in found if x.dim() == 0), None)
    if own is not None:
        return own
    logits = found[0]
    if target.dtype == torch.int64 and logits.dim() == 3 and logits.shape[:2] == target.shape:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten())
    return torch.stack([x.double().square().mean() for x in found]).sum()


# ---------------------------------------------------------------- the check


def _parts(placed: Placed) -> Iterator[Distributed]:
    """The modules that hold this rank's shards."""
    from ..sharding.staged import Staged

    if isinstance(placed, Staged):
        yield from placed.parts.values()  # type: ignore[misc]
    else:
        yield placed


def _check(placed: Placed, module: torch.nn.Module, work: _Work) -> str:
    """Compare a step with one device's, both with float64, on every rank.

    Raises:
        TesselError: a result or a gradient is further from float64 than one device's by a factor; it is named.
    """
    import torch
    import torch.distributed as dist

    from ..runtime.shares import share

    exact = copy.deepcopy(module).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # type: ignore[operator] # grouped products of float64 are not in torch
    state = torch.get_rng_state()
    runs = []
    for model, given in ((exact, work.wide()), (module, work), (placed, work)):
        torch.set_rng_state(state)
        model.zero_grad()
        runs.append([x.detach() for x in _tensors(given.on(model))])
    results = len(runs[2])  # none where another stage has them
    names = [f"result {i}" for i in range(results)]
    triples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = list(zip(*(r[:results] for r in runs)))
    whole = [dict(m.named_parameters(remove_duplicate=False)) for m in (exact, module)]
    for part in _parts(placed) if work.train else ():
        for name, p in part.module.named_parameters():
            want, single = (m[name].grad for m in whole)
            if want is None or single is None:
                continue
            lies, mesh = part.shardings.get(name), part.spmd.mesh
            want, single = (x if lies is None else share(x, lies, mesh, placed.by.rank) for x in (want, single))
            names.append(f"the gradient of {name}")
            triples.append((want, single, p.grad))
    worst = max((_further(*x) for x in zip(names, triples, strict=True)), default=0.0)
    for model in (module, placed):
        model.zero_grad()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (len(names), worst))
    what = "results and gradients" if work.train else "results"
    count, worst = sum(n for n, _ in found), max(w for _, w in found)
    return f"check: {count} {what} of {len(found)} ranks are one device's; at most {worst:.0%} of the error allowed"


def _further(name: str, of: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> float:
    """How far something is from float64, as a part of what is allowed.

    Args:
        of: it in float64, of one device, and of this rank.

    Raises:
        TesselError: further than allowed, or it is not there.
    """
    import torch

    want, single, got = of
    if got is None:
        raise TesselError(f"check: {name} is missing; one device has it")
    if not want.numel():
        return 0.0
    floor = torch.finfo(single.dtype).eps * float(want.abs().max())
    ours, theirs = (float((x.double() - want).abs().max()) for x in (got, single))
    allowed = _FURTHER * max(theirs, floor)
    if not ours <= allowed:
        raise TesselError(
            f"check: {name} is {ours:.3g} from float64, one device's {theirs:.3g}; {allowed:.3g} would be allowed"
        )
    return ours / allowed if allowed else ours


# ---------------------------------------------------------------- the report


def _table(
    plan: ShardingPlan, placed: Placed, optimizer: torch.optim.Optimizer | None, took: Sequence[float],
    sent: Mapping[str, int], calls: Mapping[str, int], total: int,
) -> Table:  # fmt: skip
    table = Table(box=None, pad_edge=False, show_header=False)
    axes = ", ".join(f"{a}={n}" for a, n in plan.mesh.items())
    table.add_row("model", f"{plan.data['model']['name']} on {axes}")
    first, rest = took[0], took[1:]
    table.add_row("step", f"{statistics.median(rest) * 1e3:.2f} ms, the first {first:.2f} s (kernels are compiled)")
    for kind in sorted(sent, key=lambda k: -sent[k]):
        table.add_row(kind, f"{calls[kind]} calls, {sent[kind]:,} bytes")
    handed = total - sum(sent.values())
    if handed:
        table.add_row("to other stages", f"{handed:,} bytes")
    table.add_row("sent in a step", f"{total:,} bytes by rank 0, as the plan's program says")
    params = sum(p.numel() * p.element_size() for p in placed.parameters())
    table.add_row("parameters", f"{params:,} bytes on rank 0")
    if optimizer is not None:
        grads = sum(p.grad.numel() * p.grad.element_size() for p in placed.parameters() if p.grad is not None)
        state = sum(
            x.numel() * x.element_size() for v in optimizer.state.values() for x in v.values() if hasattr(x, "numel")
        )
        table.add_row("gradients", f"{grads:,} bytes on rank 0")
        table.add_row("optimizer", f"{state:,} bytes on rank 0")
    for stage, ranks, params, sends in _stages(placed, total):
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        table.add_row(f"stage {stage}", f"{who}: {params:,} bytes of parameters each, {sends:,} sent in a step at most")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    table.add_row("peak memory", f"{peak / 2**20:.0f} MiB of the process of rank 0, Python and torch included")
    return table


def _stages(placed: Placed, total: int) -> list[tuple[int, list[int], int, int]]:
    """For each stage its ranks, and of one of them the most bytes of parameters and of what is sent; none without."""
    import torch.distributed as dist

    from ..sharding.staged import Staged

    if not isinstance(placed, Staged):
        return []
    params = sum(p.numel() * p.element_size() for p in placed.parameters())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (placed.stage, placed.by.rank, params, total))
    out = []
    for stage in sorted({s for s, _, _, _ in found}):
        own = [x for x in found if x[0] == stage]
        out.append((stage, [x[1] for x in own], max(x[2] for x in own), max(x[3] for x in own)))
    return out
