"""A compiled model as a folder: made on any machine, loaded on one that has the device.

    tessel compile hf:llama --target h100 --out build/       # no GPU needed
    fn = tessel.load("build/", weights=model.state_dict())   # where the H100 is

    build/
      manifest.json     what it is, for what, inputs and results, tiles; a digest of every other file
      graph.tir         the graph after all passes: what ``load`` makes the program from
      kernels/          each kernel as text and as machine code
      host.py           the host program, to be read
      report.txt .html  as ``tessel.explain``
      weights.pt        parameters and buffers; not there if the model had none (meta tensors)

No code in the folder is run: ``load`` reads the graph and the tiles, checks both, and makes the same text again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .autotune.settle import Settled, settle
from .codegen.compile_job import BINARY
from .codegen.source import Source
from .config import Options
from .driver import Session, compile_graph
from .errors import TesselError, check
from .frontend.capture import GraphInfo, export_program, import_program
from .frontend.compat import pytree
from .frontend.importer import Imported
from .ir.node import Graph, Node
from .ir.text import print_graph
from .ir.types import TensorType
from .loaded import FORMAT, GRAPH, MANIFEST, WEIGHTS, digest
from .place import Place, resolve_target
from .report import Kernel, Report, Resource
from .runtime.kernels import Pick
from .solve import tile
from .targets import Target, get_target
from .tiles import default

__all__ = ["Build", "build", "plan"]


@dataclass(frozen=True)
class Build:
    """What ``build`` wrote, and the report; ``faults`` says of each kernel that the device will not run, why."""

    folder: Path
    report: Report

    @property
    def faults(self) -> dict[str, str]:
        return {k.name: k.fault for k in self.report.kernels if k.fault}


def build(
    module: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str,
    out: str | Path,
    options: Options | None = None,
    pick: Pick | None = None,
    jobs: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Build:
    """Compile a model for a device that need not be here, into a folder.

    Args:
        module: an ``nn.Module`` or a function; parameters and inputs may be meta tensors.
        args, kwargs: one call's inputs: their sizes and dtypes are those that the build serves.
        target: a name that ``tessel targets`` lists.
        out: the folder; it must not be there, be empty, or be an earlier build, which is replaced whole.
        options: as for ``tessel.compile``; on a GPU "auto" means templates for products and attention.
        pick: the tile of a kernel; the default tile where it gives none.
        jobs: GPU kernels that are compiled at the same time, each in a process of its own.
        progress: called with how many kernels are compiled, and of how many.

    Raises:
        TesselError: the model cannot be captured as one graph, holds what a file cannot (a Python function), or the
            folder is something else. Nothing is written then.
    """
    folder = Path(out)
    _check_free(folder)
    record, chosen = _resolved(target, options)
    program = export_program(module, args, kwargs)
    imported = import_program(program)
    report = _compile(imported, record, chosen, _name(module), pick)
    settled: dict[str, Settled] = {}
    sources = [k.rendered for k in report.kernels if isinstance(k.rendered, Source)]
    if record.gpu_target is not None and sources:
        got = settle(sources, record, chosen, hints=imported.hints, jobs=jobs, progress=progress)
        settled = {s.name: item for s, item in zip(sources, got, strict=True)}
        if any(item.source is not s for s, item in zip(sources, got, strict=True)):  # other tiles: other text and grid
            tiles = {name: default.Choice(item.source.knobs, _words(item)) for name, item in settled.items()}
            splits = report.compilations[0].splits
            tiles |= {name: default.Choice({"SPLIT": parts}, "") for name, parts in splits.items()}
            report = _compile(imported, record, chosen, report.name, lambda kernel: tiles.get(kernel.name))
    done = report.compilations[0]
    graph = done.passes[-1].graph
    assert graph is not None
    _check_saveable(graph)
    for k in done.kernels:
        if k.name in settled:
            _judge(k, settled[k.name], record, chosen, imported.hints)
    weights = _weights(program)

    files: dict[str, bytes] = {GRAPH: print_graph(graph).encode(), "host.py": done.host.encode()}
    done.host_file = str(folder / "host.py")
    for k in done.kernels:
        file = f"kernels/{k.name}.{'py' if k.language == 'triton' else k.language}"
        files[file] = k.source.encode()
        k.file = str(folder / file)
        item = settled.get(k.name)
        if item is not None and item.compiled.ok and record.gpu_target is not None:
            files[f"kernels/{k.name}.{BINARY[record.gpu_target[0]]}"] = item.compiled.binary
    files["report.txt"] = str(report).encode()
    files["report.html"] = report.html().encode()
    manifest = {
        "format": FORMAT,
        "target": target,
        "name": report.name,
        "torch": torch.__version__,
        "hints": imported.hints,
        "inputs": [_input(n) for n in graph.inputs],
        "calls": [pytree.treespec_dumps(s) for s in (program.call_spec.in_spec, program.call_spec.out_spec)],
        "tiles": {k.name: k.knobs for k in done.kernels if k.knobs} | {n: {"SPLIT": p} for n, p in done.splits.items()},
        "weights": sorted(weights),
        "constants": sorted(imported.constants),
    }
    _write(folder, files, manifest, {**weights, **{f"constant {n}": t for n, t in imported.constants.items()}})
    return Build(folder, report)


def plan(
    module: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str,
    options: Options | None = None,
    pick: Pick | None = None,
) -> Report:
    """What ``build`` would make, without compiling a kernel or writing a file; arguments as there.

    Raises:
        TesselError: as ``build``.
    """
    record, chosen = _resolved(target, options)
    return _compile(import_program(export_program(module, args, kwargs)), record, chosen, _name(module), pick)


def _resolved(target: str, options: Options | None) -> tuple[Target, Options]:
    """The device and what "auto" means on it."""
    check(target not in ("auto", "cuda"), lambda: f"build: target {target!r}: name the device, see `tessel targets`")
    record = get_target(resolve_target(target))
    chosen = dataclasses.replace(options or Options(), cuda_graphs=False)
    if record.gpu_target is not None:  # what a library would do there is not known here
        unset = [n for n in ("matmul", "attention") if getattr(chosen, n) == "auto"]
        chosen = dataclasses.replace(chosen, **dict.fromkeys(unset, "template"))  # type: ignore[arg-type]
    return record, chosen


def _compile(imported: Imported, record: Target, options: Options, name: str, pick: Pick | None) -> Report:
    """Everything but the kernels' machine code."""
    session = Session(record.name, options, Report(name, record.name))
    compile_graph(imported, GraphInfo("inference"), session, place=_place(record), pick=pick)
    return session.report


def _words(item: Settled) -> str:
    """Why a kernel has its tile, for its header."""
    return f"compiled; not before: {'; '.join(r.why for r in item.refused)}" if item.refused else "compiled"


def _name(module: object) -> str:
    return type(module).__name__ if isinstance(module, torch.nn.Module) else getattr(module, "__name__", "function")


def _place(record: Target) -> Place:
    how = {"cpu": "native", "triton-interpret": "interpret"}.get(record.name, "launch")
    return Place(record, how)


def _check_saveable(graph: Graph) -> None:
    for node in _all_nodes(graph):
        if hasattr(node.attrs.get("target"), "fn"):
            raise TesselError(
                f"build: {node.attrs['target']} at {node.loc} is a Python function of this process, which no file can "
                "hold. Compile in the process that runs the model (tessel.compile), or leave that part out"
            )


def _all_nodes(graph: Graph) -> list[Node]:
    found: list[Node] = []
    todo = [graph]
    while todo:
        nodes = todo.pop().nodes
        found += nodes
        todo += [r for n in nodes for r in n.regions]
    return found


def _judge(kernel: Kernel, item: Settled, record: Target, options: Options, hints: Mapping[str, int]) -> None:
    """Put what the compiler said beside what was predicted."""
    kernel.fault = item.fault
    if not item.compiled.ok:
        return
    guess = tile(item.source.kernel, record, options, hints=hints, given=item.source.knobs).resources
    (shared,) = kernel.resources
    shared.compiled = item.compiled.shared_bytes
    kernel.resources += [
        Resource("registers", round(min(guess.registers, guess.register_limit)), item.compiled.registers,
                 guess.register_limit),
        Resource("spills", None if guess.spills else 0, item.compiled.spills),
    ]  # fmt: skip


def _weights(program: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers that have data, by name."""
    held = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)}}
    wanted = {s.target for s in program.graph_signature.input_specs if s.kind.name in ("PARAMETER", "BUFFER")}
    return {k: v.detach() for k, v in held.items() if k in wanted and v.device.type != "meta"}


def _input(node: Node) -> dict[str, Any]:
    t = node.types[0]
    shape = [str(d) for d in t.shape] if isinstance(t, TensorType) else None
    dtype = str(t.dtype) if isinstance(t, TensorType) else None
    return {"name": node.attrs["name"], "role": node.attrs.get("role", "input"), "shape": shape, "dtype": dtype}


# ---------------------------------------------------------------- files


def _check_free(folder: Path) -> None:
    """Refuse to replace anything but an earlier build."""
    if not folder.exists() and not folder.is_symlink():
        return
    check(folder.is_dir() and not folder.is_symlink(), lambda: f"build: {folder} is there and is no folder")
    names = sorted(p.name for p in folder.iterdir())
    if not names:
        return
    try:
        ours = "format" in json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        ours = False
    check(ours, lambda: f"build: {folder} holds {names[0]!r} and is no build of Tessel: name an empty or a new folder")


def _write(
    folder: Path, files: Mapping[str, bytes], manifest: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write the folder beside its place and move it there: it is there whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = temporary / "old"
    new = temporary / "new"
    try:
        for name, data in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if tensors:
            torch.save(dict(tensors), new / WEIGHTS)
        manifest["sha256"] = {str(p.relative_to(new)): digest(p) for p in sorted(new.rglob("*")) if p.is_file()}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError as e:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise TesselError(f"build: cannot write {folder}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
