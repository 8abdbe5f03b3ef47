"""``tessel plan``, ``lint`` and ``diff``: sharding plans on the command line. ``explain`` reads them too."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..errors import TesselError, check
from ..sharding.plan_file import ShardingPlan, read_plan
from ..sharding.text import diff_text, findings, plan_text
from .model import LIGHT, MODEL_HELP, as_planned

__all__ = ["diff", "lint", "plan", "verify"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FEW = 200  # parameter tensors of a model that is captured whole, and searched as it runs, without being asked


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option("--mesh", required=True, help="Axes and sizes, the slowest first: dp=2,tp=4.")
@click.option("--target", required=True, help="A name from `tessel targets`.")
@click.option("--global-batch", type=click.IntRange(min=1), help="Rows of a step over the whole mesh.")
@click.option("--seq", type=click.IntRange(min=1), help="Tokens in a row.")
@click.option("--dtype", help="float32, bfloat16, float16 or float64 (hf: bfloat16).")
@click.option("--layers", type=click.IntRange(min=1), help="Layers to plan, in place of the model's own.")
@click.option("--memory", help="What a device may hold: 80GiB, 64e9 [what it has].")
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="Ranks that share a node.")
@click.option("--train", is_flag=True, help="Plan a training step: backward, gradients, optimizer.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, sgd or sgd-momentum.")
@click.option("--remat", default="auto", show_default=True, type=click.Choice(["auto", "none", "selective", "full"]))
@click.option("--microbatches", type=click.IntRange(min=1), help="Parts of the batch [1; with stages the best].")
@click.option("--zero", type=click.IntRange(0, 3), help="ZeRO's stage of every parameter [the best for each].")
@click.option(
    "--capacity", type=click.FloatRange(min=0, min_open=True), help="Send tokens to experts: times an even share."
)
@click.option("--bucket", help="What one call of several collectives carries: 25MiB; 0 merges nothing [25MiB].")
@click.option("--in-flight", help="Memory for collectives that begin early: 100MiB; 0 begins none early [100MiB].")
@click.option("--schedule", default="auto", show_default=True, help="Of stages: gpipe, 1f1b, interleaved, zb1p, zbv.")
@click.option("--free-axes", is_flag=True, help="Let every axis split anything, whatever its name.")
@click.option("--annotate", type=click.Path(path_type=Path), help="JSON: name to dims; also inputs[0], output:NAME.")
@click.option(
    "--whole/--no-whole", default=None,
    help="Plan what `tessel run` runs, every layer captured [models of few layers].",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The plan file to write.")
@click.option("--html", type=click.Path(path_type=Path), help="A page about the plan to write.")
def plan(
    model: str, mesh: str, target: str, memory: str | None, annotate: Path | None, out: Path | None, html: Path | None,
    free_axes: bool, bucket: str | None, in_flight: str | None,
    global_batch: int | None, seq: int | None, dtype: str | None, layers: int | None, train: bool,
    microbatches: int | None, whole: bool | None,
    **asked: Any,
) -> None:  # fmt: skip
    """Find the fastest sharding of MODEL on a mesh that fits in memory, and say why; no weights, no devices needed.

    The names of axes say what they split: dp and fsdp the batch, tp all but the batch, sp and cp the sequence (so do
    ring and ulysses, which say how attention copes); other names anything. pp cuts the model into stages.
    """
    from ..sharding.captured import capture_model  # torch with it: only where it is needed
    from ..sharding.planner import Request, check_request, make_plan, make_staged_plan, microbatches_for
    from ..targets.mesh import Mesh

    axes = Mesh.parse(mesh)
    given = {} if annotate is None else read_annotations(annotate)
    calls = (("bucket", bucket), ("in_flight", in_flight))
    asked |= {k: parse_memory(text, k.replace("_", "-")) for k, text in calls if text is not None}
    request = Request(
        train=train, memory=None if memory is None else parse_memory(memory), microbatches=microbatches or 1,
        roles=not free_axes, pinned={n: s for n, s in given.items() if not _of_activations(n)},
        annotations=_annotations({n: s for n, s in given.items() if _of_activations(n)}, annotate), **asked,
    )  # fmt: skip
    check_request(axes, target, request)
    console = Console(stderr=True)
    with console.status("capturing the model") as status:
        started = time.perf_counter()

        def say(what: str) -> None:
            status.update(f"{time.perf_counter() - started:.0f} s: {what}")

        made, why = None, ""
        given = {"batch": global_batch, "seq": seq, "dtype": dtype, "layers": layers}
        given = {k: v for k, v in given.items() if v is not None}
        if model.startswith("hf:"):
            given.setdefault("dtype", "bfloat16")
        if whole or (whole is None and "pp" not in axes):  # stages are cut out of the model where they run
            made, why = _whole(model, axes, target, request, given, bool(whole), say)
        if made is None:
            numbers = microbatches_for(axes, global_batch, microbatches)
            captures = {}
            for m in numbers:
                say(f"capturing the model, {m} microbatches" if len(numbers) > 1 else "capturing the model")
                captures[m] = capture_model(model, **given, train=train, microbatches=m)
            if "pp" in axes:
                made = make_staged_plan(captures, axes, target, request, say)
            else:
                made = make_plan(captures[numbers[0]], axes, target, request, say)
    _tell(_told(made, given, why), model, out, html)


def _told(made: ShardingPlan, given: dict[str, Any], why: str) -> ShardingPlan:
    """A plan that says what the model was asked for with, and why it holds no program."""
    notes = list(made.data["provenance"]["notes"])
    if why:
        notes.append(f"no program is held, which `tessel run` needs: {why[:1000]}")
    data = {**made.data, "model": {**made.data["model"], "given": given}}
    return ShardingPlan({**data, "provenance": {**data["provenance"], "notes": notes}})


def _tell(made: ShardingPlan, model: str, out: Path | None, html: Path | None) -> None:
    click.echo(plan_text(made))
    if out is not None:
        made.write(out)
        click.echo(f"\nwritten: {out}")
        if "program" in made.data or "pipeline" in made.data:
            click.echo(f"to run it: torchrun --nproc-per-node {made.world} -m tessel run {out} {model}")
    if html is not None:
        from ..sharding.html import plan_page

        try:
            html.write_text(plan_page(made), encoding="utf-8")
        except OSError as e:
            raise TesselError(f"--html {str(html)!r}: cannot write: {e.strerror}") from e
        click.echo(f"\nwritten: {html}")


def _whole(
    model: str, mesh: Any, target: str, request: Any, given: dict[str, Any], asked: bool, say: Any
) -> tuple[ShardingPlan | None, str]:
    """A plan with the program that runs; or, where the user did not ask for it, why there is none.

    A type of transformers is the small model that other commands run too.
    """
    import torch  # slow to load: only where it is needed

    from ..models import load_model
    from ..sharding.captured import captures_all
    from ..sharding.planned import plan_model

    named = model.startswith("hf:")
    if not asked and named and not model.endswith(".json"):
        return None, f"{model} names a type, of which a small model is run; --whole plans that one"
    place: dict[str, Any] = {"device": "meta"} if model.endswith(".json") else {}
    module, args, kwargs = load_model(model, **given, **place)
    if not isinstance(module, torch.nn.Module):
        check(not asked, lambda: f"plan: {model} is no nn.Module")
        return None, f"{model} is a function, not a module"
    tensors = sum(1 for _ in module.parameters())
    if not asked and (tensors > _FEW or (named and not captures_all(module, given.get("layers")))):
        return None, f"{model} has many layers ({tensors} parameter tensors); --whole captures them one by one"
    if place and sum(p.numel() for p in module.parameters()) <= LIGHT:
        module, args, kwargs = load_model(model, **given)  # as it runs: some operators of torch refuse meta tensors
        assert isinstance(module, torch.nn.Module)
        assert isinstance(module, torch.nn.Module)
    try:
        made = plan_model(
            module, args, kwargs, mesh=mesh, target=target, request=request, annotations=request.annotations,
            name=model, progress=say,
        )  # fmt: skip
    except TesselError as e:
        if asked:
            raise
        return None, f"as it runs it cannot be planned: {str(e).splitlines()[0]}"
    return made, ""


def _of_activations(name: str) -> bool:
    return name.startswith(("inputs[", "output:"))


def _annotations(given: dict[str, Any], path: Path | None) -> Any:
    """What a file says of inputs and of what modules return."""
    from ..ir.types import Loc
    from ..sharding.annotate import Annotation, Annotations

    def entry(name: str, sharding: Any) -> Annotation:
        kind = "output" if name.startswith("output:") else "tensor"
        return Annotation(kind, name.removeprefix("output:"), sharding, where=Loc(str(path)))

    return Annotations([entry(n, s) for n, s in given.items()])


@click.command(epilog=MODEL_HELP)
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--world", type=click.IntRange(min=1), help="Devices that will run it.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the model [as it was planned].")
@click.option("--dtype", help="Of the model's tensors [as it was planned].")
@click.option("--group-size", type=click.IntRange(min=1), help="Weights that share a scale, in a quantized model.")
def lint(
    plan_file: Path, model: str, world: int | None, layers: int | None, dtype: str | None, group_size: int | None
) -> None:
    """Check a plan against MODEL and against itself; exits with 1 if something is wrong."""
    from ..models import load_model
    from ..sharding.captured import parameters_of

    found: list[str] = []
    try:
        made = read_plan(plan_file)
        made.check_model(world=world)
    except TesselError as e:
        raise click.ClickException(str(e)) from e
    module, _, _ = load_model(model, **as_planned(made, model, meta=True, dtype=dtype, layers=layers))
    config: Any = getattr(module, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    quantized = values.get("quantization_config") or {}
    group = group_size or (quantized.get("group_size") if isinstance(quantized, dict) else None)
    found += findings(made, parameters_of(module), values, group)
    for line in found:
        click.echo(line)
    if found:
        raise click.ClickException(f"{len(found)} findings")
    click.echo("nothing found")


@click.command(epilog=MODEL_HELP)
@click.argument("plan_file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the model [as it was planned].")
@click.option("--dtype", help="Of the model's tensors [as it was planned].")
@click.option("--seconds", type=click.FloatRange(min=0), default=120.0, show_default=True, help="What it may take.")
def verify(plan_file: Path, model: str, layers: int | None, dtype: str | None, seconds: float) -> None:
    """Prove that the programs of all ranks compute what MODEL does on one device; exits with 1 if they do not.

    Every operation and every collective of the forward and the backward, by z3 at the smallest sizes that tell the
    ranks' shares apart, in exact arithmetic; what an operator does is taken from its definition. Of a model in layers
    two are looked at if the plan was made from two.
    """
    import torch  # slow to load: only where it is needed

    from ..frontend.joint import capture_step
    from ..models import load_model
    from ..sharding.captured import parameters_of
    from ..sharding.microbatches import microbatch
    from ..sharding.parts import cut_model
    from ..sharding.verify import lay_out_planned, verify_program
    from ..sharding.verify_stages import verify_stages
    from ..targets.mesh import Mesh

    made = read_plan(plan_file)
    settings, mesh = made.data["settings"], Mesh(made.mesh)
    staged, train = "pipeline" in made.data, bool(settings["train"])
    size = as_planned(made, model, meta=True, dtype=dtype, layers=layers)
    if layers is None and not staged and "program" not in made.data and model.startswith("hf:"):
        size["layers"] = min(2, size.get("layers", 2))  # those that the plan was made from
    module, args, kwargs = load_model(model, **size)
    if not isinstance(module, torch.nn.Module):
        raise TesselError(f"{model} is a function; a plan is of a module")
    if staged or "program" in made.data:
        made.check_model(parameters_of(module))
    if staged:
        cut = cut_model(module, args, kwargs, mesh, plan=made, train=train)
        reports = verify_stages(cut, seconds=seconds)
    else:
        (args, kwargs), _ = microbatch(args, kwargs, settings["microbatches"] if "program" in made.data else 1)
        spmd, note = lay_out_planned(made, module, capture_step(module, args, kwargs, train=train))
        if note:
            click.echo(note)
        programs = spmd.programs()
        reports = [(p.graph.name, verify_program(p, seconds=seconds / len(programs))) for p in programs]
    for name, report in reports:
        click.echo(f"{name}: {report.text()}")
    if not all(report.proved for _, report in reports):
        raise click.ClickException(f"{plan_file}: not proved")
    click.echo(f"proved: {mesh.devices} ranks compute what one device computes")


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def diff(a: Path, b: Path) -> None:
    """What differs between two plans."""
    click.echo(diff_text(read_plan(a), read_plan(b)))


def parse_memory(text: str, option: str = "memory") -> int:
    """Bytes; of other options than ``memory`` none, too.

    >>> parse_memory("80GiB"), parse_memory("64e9"), parse_memory("1.5 GB")
    (85899345920, 64000000000, 1500000000)

    Raises:
        TesselError: no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise TesselError(f"--{option} {text!r}: expected a size such as 80GiB, 80GB or a number of bytes")
    size = int(float(match.group(1)) * unit)
    least = 1 if option == "memory" else 0
    check(least <= size < 10**15, lambda: f"--{option} {text!r}: not from {least} bytes to a petabyte")
    return size


def read_annotations(path: Path) -> dict[str, Any]:
    """Parameters' names, ``*`` for any part, to how they must be kept: ``{"layers.*.up_proj.weight": ["tp", null]}``.

    A dimension is an axis, a list of axes from major to minor, or null. ``inputs[0]`` is an input, ``output:NAME`` what
    modules return.

    Raises:
        TesselError: the file cannot be read or says something else.
    """
    from ..ir.sharding import Sharding

    try:
        check(path.stat().st_size < 2**20, lambda: f"--annotate {path}: more than 1 MiB")
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise TesselError(f"--annotate {path}: cannot read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise TesselError(f"--annotate {path}: no JSON: {e}") from e
    ok = isinstance(given, dict) and all(isinstance(v, list) for v in given.values())
    check(ok, lambda: f"--annotate {path}: expected an object of lists, one entry a dimension")
    found = {}
    for name, dims in given.items():
        axes = [[] if d is None else [d] if isinstance(d, str) else d for d in dims]
        words = all(isinstance(d, list) and all(isinstance(a, str) for a in d) for d in axes)
        check(words, lambda n=name: f"--annotate {path}: {n}: a dimension is an axis, a list of axes or null")  # type: ignore[misc]
        try:
            found[name] = Sharding(tuple(tuple(d) for d in axes))
        except TesselError as e:
            raise TesselError(f"--annotate {path}: {name}: {e}") from e
    return found
