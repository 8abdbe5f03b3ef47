"""Reading a build: the folder that ``tessel.build`` wrote becomes a model that can be called.

    fn = tessel.load("build/", weights=model.state_dict())

Nothing in the folder is run. Files are compared with their digests, graph and tiles are checked, and the programs are
made from them again.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .config import Options
from .driver import Session, compile_graph
from .errors import TesselError, check
from .frontend.capture import GraphInfo
from .frontend.compat import pytree
from .frontend.importer import Imported
from .ir.node import Graph, Node
from .ir.parse import parse_graph
from .ir.types import TensorType
from .ops import OPS
from .place import place_for, resolve_target
from .report import Report
from .targets import get_target

__all__ = ["FORMAT", "GRAPH", "MANIFEST", "WEIGHTS", "Loaded", "digest", "load"]

FORMAT = 1
MANIFEST, GRAPH, WEIGHTS = "manifest.json", "graph.tir", "weights.pt"
_MANIFEST_BYTES = 2**26


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Loaded:
    """A model read from a build: called as the model was, with inputs of the same sizes and dtypes.

    Attributes:
        report: what was compiled, as of ``tessel.explain``.
        weights: parameters and buffers by name, on the device; changing one in place changes the model.
        device: where inputs must be.
    """

    def __init__(
        self, run: Callable[[list[Any]], list[Any]], graph: Graph, weights: dict[str, torch.Tensor], report: Report,
        device: torch.device, specs: Sequence[Any],
    ) -> None:  # fmt: skip
        self.report, self.weights, self.device = report, weights, device
        self._run, self._specs = run, specs
        self._inputs = [n for n in graph.inputs if n.attrs.get("role", "input") != "constant"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, without gradients.

        Raises:
            TesselError: arguments of another structure, size, dtype or device than those it was built with.
        """
        wanted, results = self._specs
        kwargs = {k: kwargs[k] for k in wanted.child(1).context if k in kwargs} | kwargs
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != wanted:
            raise TesselError(f"{self.report.name}: called with {_shape(spec)}, built for {_shape(wanted)}")
        given = iter(flat)
        operands = []
        for node in self._inputs:
            role = node.attrs.get("role", "input")
            operands.append(self._checked(node, next(given)) if role == "input" else self.weights[node.attrs["name"]])
        with torch.no_grad():
            return pytree.tree_unflatten(self._run(operands), results)

    def _checked(self, node: Node, x: Any) -> Any:
        t, name = node.types[0], node.attrs["name"]
        if not isinstance(t, TensorType):
            return x
        check(isinstance(x, torch.Tensor), lambda: f"{self.report.name}: {name}: expected a tensor, got {x!r}")
        for what, got, want in (
            ("dtype", x.dtype, t.dtype),
            ("shape", tuple(x.shape), tuple(int(d) if d.is_number else int(s) for d, s in _sized(t, x))),
            ("device", x.device.type, self.device.type),
        ):
            if got != want:
                raise TesselError(f"{self.report.name}: {name}: {what} {got}, built for {want}")
        return x


def _sized(t: TensorType, x: torch.Tensor) -> list[tuple[Any, int]]:
    import sympy

    check(len(t.shape) == x.dim(), lambda: f"a tensor of {x.dim()} dimensions where {len(t.shape)} were built for")
    return [(sympy.sympify(d), s) for d, s in zip(t.shape, x.shape, strict=True)]


def _shape(spec: Any) -> str:
    args, kwargs = spec.children() if hasattr(spec, "children") and callable(spec.children) else spec.children_specs
    names = ", ".join(map(str, kwargs.context))
    return f"{args.num_children} positional arguments" + (f" and {names} by name" if names else "")


def load(folder: str | Path, weights: Mapping[str, torch.Tensor] | None = None, device: str | None = None) -> Loaded:
    """The model of a build, ready to be called; GPU kernels are compiled at their first launch.

    Args:
        folder: what ``tessel compile --out`` or ``tessel.build.build`` wrote.
        weights: parameters and buffers by name (a ``state_dict``), moved to the device; they go before those in the
            folder, and must be there if it has none.
        device: where it runs; the target's own kind by default.

    Raises:
        TesselError: the folder is no build, is damaged or of a newer version; the device is not that of the
            target; weights are missing or of other sizes.
    """
    path = Path(folder)
    manifest = _manifest(path)
    record = get_target(resolve_target(manifest["target"]))
    where = torch.device(device or ("cuda" if record.gpu_target else "cpu"))
    check(
        where.type != "cuda" or torch.cuda.is_available(),
        lambda: f"{path} was built for {record.name}, and torch finds no GPU here",
    )
    place = place_for(record.name, str(where))
    graph = parse_graph((path / GRAPH).read_text(), OPS)
    stored: dict[str, torch.Tensor] = {}
    if (path / WEIGHTS).exists():
        stored = torch.load(path / WEIGHTS, map_location=where, weights_only=True, mmap=where.type == "cpu")
    constants = {n: stored.pop(f"constant {n}") for n in manifest["constants"]}
    held = _matched(graph, {**stored, **(weights or {})}, where, path)
    session = Session(record.name, Options(), Report(manifest["name"], record.name))
    tiles: Mapping[str, Mapping[str, int]] = manifest["tiles"]
    run = compile_graph(
        Imported(graph, constants, (), manifest["hints"], str(where)),
        GraphInfo("inference"),
        session,
        place=place,
        optimized=True,
        pick=lambda kernel: tiles.get(kernel.name),
    )
    specs = [_spec(text) for text in manifest["calls"]]
    return Loaded(run, graph, held, session.report, where, specs)


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, if every file that it lists is what it says."""
    file = path / MANIFEST
    check(file.is_file(), lambda: f"{path} is no build of Tessel: it has no {MANIFEST}")
    check(file.stat().st_size <= _MANIFEST_BYTES, lambda: f"{file} is too large to be one of Tessel's")
    try:
        found = json.loads(file.read_bytes())
        version, digests = found["format"], dict(found["sha256"])
        needed = [found[k] for k in ("target", "name", "hints", "calls", "tiles", "constants")]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise TesselError(f"{file} is damaged: {e}; build again") from e
    check(version == FORMAT, lambda: f"{path} has format {version}, this Tessel reads {FORMAT}; build again")
    assert len(needed) == 6
    for name, expected in digests.items():
        part = path / name
        check(
            path.resolve() in part.resolve().parents and part.is_file(),
            lambda name=name: f"{path}: {name} is missing; build again",  # type: ignore[misc]
        )
        check(digest(part) == expected, lambda name=name: f"{path}: {name} was changed or is damaged; build again")  # type: ignore[misc]
    check(GRAPH in digests, lambda: f"{path}: {GRAPH} is missing; build again")
    return found  # type: ignore[no-any-return]


def _matched(graph: Graph, given: Mapping[str, torch.Tensor], where: torch.device, path: Path) -> dict[str, Any]:
    """Parameters and buffers on the device, each as the graph wants it."""
    held: dict[str, torch.Tensor] = {}
    nodes = [n for n in graph.inputs if n.attrs.get("role", "input") in ("param", "buffer")]
    missing = [n.attrs["name"] for n in nodes if n.attrs["name"] not in given]
    check(
        not missing,
        lambda: f"{path} holds no weights for {missing[0]} ({len(missing)} in all): load(..., weights=state_dict)",
    )
    for node in nodes:
        name, t = node.attrs["name"], node.types[0]
        x = given[name]
        assert isinstance(t, TensorType)
        want = tuple(map(int, t.shape))
        check(
            tuple(x.shape) == want and x.dtype == t.dtype,
            lambda n=name, x=x, w=want, t=t: f"weights: {n} is {x.dtype} {tuple(x.shape)}, built for {t.dtype} {w}",  # type: ignore[misc]
        )
        held[name] = x.detach().to(where)
    return held


def _spec(text: str) -> Any:
    """A tree of arguments or results. Only classes of torch, transformers and Python's own are looked for."""
    for node in _types(json.loads(text)):
        package = node.split(".")[0]
        if package == "transformers":
            importlib.import_module(node.rpartition(".")[0])
    try:
        return pytree.treespec_loads(text)
    except (NotImplementedError, ValueError, KeyError) as e:
        raise TesselError(f"load: the results are of a class that is not known here: {e}. Import it first") from e


def _types(tree: Any) -> list[str]:
    found, todo = [], [tree]
    while todo:
        x = todo.pop()
        if isinstance(x, dict):
            if isinstance(x.get("type"), str):
                found.append(x["type"])
            todo += x.values()
        elif isinstance(x, list):
            todo += x
    return found
