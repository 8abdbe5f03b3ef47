"""Shards of parameters made where they are held: from files by slices, or by drawing what one device would draw.

No tensor as large as a whole parameter is made (but where it is smaller than ``SLAB`` elements). What a model's own
initialisation does to its parameters is written down on the meta device; then each draw is repeated in slabs of rows,
from the generator that one device would use, and a rank keeps the rows that are its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TesselError, check, did_you_mean
from ..frontend.compat import FakeTensorMode
from ..ir.sharding import Sharding
from ..targets.mesh import Mesh

__all__ = ["SLAB", "Drawn", "Files", "drawn", "region"]

SLAB = 1 << 20
"""Elements drawn at once."""
_VECTOR = 16  # torch's normal_ on a CPU fills blocks of 16; slabs that are multiples of it continue its stream
_DRAWS = frozenset({"uniform_", "normal_", "exponential_", "log_normal_", "bernoulli_", "random_", "cauchy_"})
_POINTWISE = frozenset(
    {"add_", "mul_", "sub_", "div_", "neg_", "erfinv_", "clamp_", "clamp_min_", "clamp_max_", "abs_"}
)
_FILLS = frozenset({"fill_", "zero_"})


def region(shape: Sequence[int], sharding: Sharding | None, mesh: Mesh, rank: int) -> tuple[slice, ...]:
    """The part of a tensor that a rank holds, a slice a dimension.

    Raises:
        TesselError: a dimension does not divide.
    """
    if sharding is None:
        return tuple(slice(0, n) for n in shape)
    sharding.check(tuple(shape), mesh)
    found = []
    for n, axes in zip(shape, sharding.dims, strict=True):
        size = n // prod(mesh[a] for a in axes)
        start = mesh.index(rank, axes) * size if axes else 0
        found.append(slice(start, start + size))
    return tuple(found)


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Act:
    """One in-place operator on a tensor: all of it, or some of its rows."""

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: tuple[int, int] | None = None


class _Recorder(TorchDispatchMode):
    """Writes down what is done to tensors, by their memory."""

    def __init__(self, names: Mapping[int, tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self.names = names
        self.acts: list[tuple[str, _Act]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        known = self.names.get(x.untyped_storage()._cdata) if x is not None else None
        if known is None and name in _DRAWS:
            raise TesselError(
                f"init calls {name} on a tensor of its own, as truncated normals by rejection do: what it makes of it "
                "cannot be drawn by shards; give weights"
            )
        if known is not None and x is not None and name.endswith("_"):
            self.acts.append((known[0], self.act(*known, name, func, x, args[1:], kwargs)))
        return func(*args, **kwargs)

    def act(
        self, of: str, whole: torch.Tensor, name: str, func: Any, x: torch.Tensor, args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> _Act:  # fmt: skip
        if any(isinstance(a, torch.Tensor) for a in args):
            raise TesselError(f"{of}: its initialisation calls {name} with another tensor; give weights instead")
        known = name in _DRAWS | _POINTWISE | _FILLS
        check(known, lambda: f"{of}: its initialisation calls {name}, which cannot be done by shards; give weights")
        if x.shape == whole.shape:
            return _Act(name, func, args, kwargs)
        width = prod(whole.shape[1:])
        rows, rest = divmod(x.numel(), width)
        start, off = divmod(int(x.storage_offset()), width)
        if name not in _FILLS or rest or off or not x.is_contiguous():
            raise TesselError(f"{of}: its initialisation calls {name} on a part of it that is no row; give weights")
        return _Act(name, func, args, kwargs, (start, start + rows))


@dataclass
class Drawn:
    """What an initialisation does to a model's tensors, in order.

    ``shards(...)`` repeats it for the shards of one rank.
    """

    acts: list[tuple[str, _Act]]
    tensors: dict[str, torch.Tensor]

    def shards(self, shardings: Mapping[str, Sharding], mesh: Mesh, rank: int) -> dict[str, torch.Tensor]:
        """This rank's part of every tensor that the initialisation wrote, from torch's generator."""
        parts: dict[str, torch.Tensor] = {}
        places: dict[str, tuple[slice, ...]] = {}
        for name, act in self.acts:
            whole = self.tensors[name]
            if name not in parts:
                places[name] = region(whole.shape, shardings.get(name), mesh, rank)
                parts[name] = torch.empty([s.stop - s.start for s in places[name]], dtype=whole.dtype)
            if act.name in _DRAWS:
                self._draw(act, tuple(whole.shape), parts[name], places[name])
            elif act.rows is None:
                act.op(parts[name], *act.args, **act.kwargs)
            else:
                mine = places[name][0]
                lo, hi = max(mine.start, act.rows[0]), min(mine.stop, act.rows[1])
                if lo < hi:
                    act.op(parts[name][lo - mine.start : hi - mine.start], *act.args, **act.kwargs)
        return parts

    @staticmethod
    def _draw(act: _Act, shape: tuple[int, ...], part: torch.Tensor, place: tuple[slice, ...]) -> None:
        if not shape:
            act.op(part, *act.args, **act.kwargs)
            return
        width = prod(shape[1:])
        unit = _VECTOR // gcd(max(width, 1), _VECTOR)
        rows = max(SLAB // max(width, 1) // unit, 1) * unit
        starts = list(range(0, shape[0], rows)) or [0]
        if len(starts) > 1 and (shape[0] - starts[-1]) * width < _VECTOR:
            starts.pop()  # fewer than a block are drawn one by one: not the stream of one draw
        for start, stop in zip(starts, [*starts[1:], shape[0]], strict=True):
            slab = torch.empty((stop - start, *shape[1:]), dtype=part.dtype)
            act.op(slab, *act.args, **act.kwargs)
            lo, hi = max(start, place[0].start), min(stop, place[0].stop)
            if lo < hi:
                part[lo - place[0].start : hi - place[0].start] = slab[(slice(lo - start, hi - start), *place[1:])]


def drawn(model: torch.nn.Module, init: Callable[[torch.nn.Module], Any], wanted: Sequence[str]) -> Drawn:
    """What ``init(model)`` does to the parameters and buffers of a model on the meta device.

    Args:
        wanted: names that it has to write.

    Raises:
        TesselError: a tensor is not on the meta device, is never written, or something is done to it that cannot be
            done shard by shard.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    real = [n for n, x in tensors.items() if not x.is_meta]
    check(
        not real, lambda: f"init would write to {real[0]}, which is not on the meta device; make all of the model there"
    )
    # torch's initialisations skip meta tensors; fake ones are written, and refuse what depends on the values drawn
    with FakeTensorMode() as mode:
        fakes = {n: torch.empty(x.shape, dtype=x.dtype) for n, x in tensors.items()}
    recorder = _Recorder({x.untyped_storage()._cdata: (n, x) for n, x in fakes.items()})
    with _holding(model, {id(x): fakes[n] for n, x in tensors.items()}), torch.no_grad(), mode, recorder:
        try:
            init(model)
        except TesselError:
            raise
        except Exception as e:  # whatever the user's function, or torch on fake tensors, raises
            raise TesselError(f"init cannot be done by shards; give weights. It raised {type(e).__name__}: {e}") from e
    written = {name for name, _ in recorder.acts}
    missing = [n for n in wanted if n not in written]
    check(not missing, lambda: f"init writes nothing to {', '.join(missing[:5])}; give their values")
    return Drawn(recorder.acts, tensors)


@contextmanager
def _holding(model: torch.nn.Module, others: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """The model with other tensors in the place of its own, by identity."""
    kept = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    made = {i: torch.nn.Parameter(x, requires_grad=x.is_floating_point()) for i, x in others.items()}
    try:
        for m, params, buffers in kept:
            m._parameters.update({n: made[id(p)] for n, p in params.items() if p is not None})
            m._buffers.update({n: others[id(b)] for n, b in buffers.items() if b is not None})
        yield
    finally:
        for m, params, buffers in kept:
            m._parameters.update(params)
            m._buffers.update(buffers)


# ---------------------------------------------------------------- files


class Files:
    """Weights in safetensors files, read by slices.

    Args:
        path: a file, an index (``model.safetensors.index.json``), or a folder with either.

    Raises:
        TesselError: there is no such file, or the package is missing.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError as e:
            raise TesselError("weights from files need safetensors: pip install safetensors") from e
        self._open = safe_open
        where = Path(path)
        self.files: dict[str, Path] = {}
        if where.is_dir():
            index = where / "model.safetensors.index.json"
            where = index if index.is_file() else where / "model.safetensors"
        check(where.is_file(), lambda: f"weights: {str(where)!r} does not exist")
        if where.suffix == ".json":
            try:
                found = json.loads(where.read_text(encoding="utf-8"))["weight_map"]
                self.files = {str(n): where.parent / Path(str(f)).name for n, f in found.items()}
            except (ValueError, KeyError, AttributeError) as e:
                raise TesselError(f"weights: {str(where)!r} is no index of safetensors files: {e}") from e
        else:
            with self._read(where) as f:
                self.files = dict.fromkeys(f.keys(), where)

    def _read(self, path: Path) -> Any:
        try:
            return self._open(str(path), framework="pt")
        except Exception as e:  # the package raises a class of its own
            raise TesselError(f"weights: cannot read {str(path)!r}: {e}") from e

    def part(self, name: str, x: torch.Tensor, place: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor.

        Raises:
            TesselError: it is not there, or has another shape than ``x``; both are named.
        """
        check(name in self.files, lambda: f"weights: there is no {name!r}; {did_you_mean(name, self.files)[:300]}")
        with self._read(self.files[name]) as f:
            found = f.get_slice(name)
            shape = tuple(found.get_shape())
            check(
                shape == tuple(x.shape),
                lambda: f"weights: {name} is {list(shape)} in the file and {list(x.shape)} in the model",
            )
            part = found[place] if shape else f.get_tensor(name)
            # a copy: the slice may be a view of the mapped file, which would stay open as long as the shard lives
            return part.to(x.dtype, copy=True)  # type: ignore[no-any-return]
