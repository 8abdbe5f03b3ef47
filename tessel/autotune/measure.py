"""Tiles of a kernel run on the device, in turns: right or not, and how long a launch takes.

Each tile is compiled in a process of its own first, since an unlucky one may abort the compiler. Then it runs once on
outputs full of NaN and is compared with the operators in float64; only tiles within the bound are timed. They take
turns, so that clocks and heat hit all alike, with the L2 cache as the last launch left it and after it was cleared.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..codegen.source import Source
from ..codegen.triton import render
from ..errors import TesselError, check
from ..ir.interp import interpret
from ..ir.node import Graph
from ..ir.types import TensorType
from ..runtime.launch import load as make_callable
from ..targets import Target, match_device
from ..tiles.kernel import Check, Kernel
from .entry import Fact, Times
from .kernels import Found
from .known import driver_version
from .settle import compile_all
from .tune import DeviceLost, Measured

__all__ = ["ROUNDS", "Bench", "GpuMeasurer", "arguments", "error_of"]

ROUNDS = 21
_WARM_S = 1e-3  # seconds that one figure of a warm launch is the mean of
_LIMITS = {torch.float64: (3.0, 1e-13), torch.float32: (3.0, 2e-6)}
_NARROW = (2.0, 1e-3)
_LAUNCHES = 50  # most of them in one figure: the host queues them during the head start
_HEAD_START = 2_000_000  # clock cycles, about a millisecond
_CLEAR = 4  # times the L2 cache is written to clear it


def arguments(graph: Graph, kernel: Kernel, device: str, seed: int = 0) -> list[torch.Tensor]:
    """Inputs for one launch: normal numbers, and 0 or 1 for whole ones, in range where they index.

    Raises:
        TesselError: a size is known at run time only.
    """
    generator = torch.Generator(device).manual_seed(seed)
    highs = [s.high for s in kernel.statements() if isinstance(s, Check)]
    high = min([2, *(h for h in highs if isinstance(h, int))])
    out = []
    for node in graph.inputs:
        t = node.types[0]
        sizes = (*t.shape, *t.strides) if isinstance(t, TensorType) else (None,)
        check(
            all(isinstance(n, int) for n in sizes),
            lambda: f"{kernel.name}: a size is known at run time only: it can be predicted, not measured",
        )
        assert isinstance(t, TensorType)
        shape, strides = (tuple(map(int, x)) for x in (t.shape, t.strides))
        count = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if 0 not in shape else 0
        if t.dtype.is_complex:
            raise TesselError(f"{kernel.name}: complex inputs are not measured")
        if t.dtype.is_floating_point:
            x = torch.randn(count, generator=generator, device=device).to(t.dtype)
        else:
            x = torch.randint(0, max(high, 1), (count,), generator=generator, device=device).to(t.dtype)
        out.append(x.as_strided(shape, strides))
    return out


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error; infinite where one is NaN or infinite and the other is not the same."""
    want = want.to(got.device)
    if not got.dtype.is_floating_point:
        return 0.0 if torch.equal(got, want.to(got.dtype)) else float("inf")
    got, want = got.double(), want.double()
    odd = ~torch.isfinite(want)
    same = (got == want) | (got.isnan() & want.isnan())
    if bool((odd & ~same).any()) or bool((~odd & ~torch.isfinite(got)).any()):
        return float("inf")
    off = torch.where(odd, 0.0, got - want).norm()
    size = torch.where(odd, 0.0, want).norm()
    return float(off / size) if float(size) else (0.0 if float(off) == 0 else float("inf"))


class Bench(ABC):
    """Checks and times tiles of kernels on one device.

    Args:
        target: what kernels are rendered for.
        device: where tensors live.
        directory: where kernels' text goes.
        rounds: figures of each tile and mode.

    A subclass says how a launch is timed, and what clears the cache.
    """

    def __init__(self, target: Target, device: str, directory: Path, rounds: int = ROUNDS) -> None:
        self.target, self.device, self.directory, self.rounds = target, device, directory, rounds

    @abstractmethod
    def seconds(self, call: Callable[[], None], count: int) -> float:
        """Seconds of one of ``count`` launches in a row."""

    @abstractmethod
    def clear(self) -> None:
        """Leave nothing of the kernel's tensors in the L2 cache."""

    def refused(self, sources: Sequence[Source]) -> list[str]:
        """Why the compiler does not take each source, or nothing."""
        return ["" for _ in sources]

    def measure(self, found: Found, tiles: Sequence[Mapping[str, int]]) -> list[Measured]:
        """Check all tiles, time those that are right; a result for each, in order.

        Raises:
            TesselError: the kernel cannot be run on made-up inputs.
        DeviceLost: a tile broke the device.
        """
        kernel, region = found.kernel, found.region
        inputs = arguments(region, kernel, self.device)
        with torch.no_grad():
            exact = interpret(region, inputs, precise=True)
            plain = interpret(region, inputs)
        bounds = [_bound(p, e) for p, e in zip(plain, exact)]
        sources = [render(kernel, self.target, knobs) for knobs in tiles]
        results: list[Measured] = []
        calls: dict[int, Callable[[], None]] = {}
        for i, (source, knobs, why) in enumerate(zip(sources, tiles, self.refused(sources), strict=True)):
            error = 0.0
            if not why:
                call, why, error = self._checked(source, inputs, exact, plain, bounds)
                if not why:
                    calls[i] = call
            results.append(Measured(knobs, {}, error, max(bounds, default=0.0), why))
        times = self._timed(calls)
        return [Measured(r.knobs, times.get(i, {}), r.error, r.bound, r.refused) for i, r in enumerate(results)]

    def _checked(
        self, source: Source, inputs: list[torch.Tensor], exact: list[Any], plain: list[Any], bounds: list[float]
    ) -> tuple[Callable[[], None], str, float]:
        """How to launch a source, why it may not win, and its largest error."""
        outs = [_poisoned(p.type, self.device) for p in source.kernel.params if p.out]
        given = iter(outs)
        tensors = [next(given) if p.out else inputs[p.slot] for p in source.kernel.params]
        launcher, grid = make_callable(source, self.directory), source.grid_for({})

        def call() -> None:
            launcher(grid, *tensors)

        try:
            call()
            self.wait()
        except TesselError:
            raise
        except Exception as e:
            self.alive(e)
            return call, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}", 0.0
        slots = [p.slot for p in source.kernel.params if p.out]
        errors = [_error(out, exact[s], plain[s]) for out, s in zip(outs, slots)]
        wrong = next(
            (f"error {e:.1e}, at most {bounds[s]:.1e}" for e, s in zip(errors, slots) if not e <= bounds[s]), ""
        )
        return call, f"wrong result: {wrong}" if wrong else "", max(errors, default=0.0)

    def _timed(self, calls: Mapping[int, Callable[[], None]]) -> dict[int, dict[str, Times]]:
        counts = {}
        for i, call in calls.items():
            self.seconds(call, 3)
            counts[i] = max(1, min(_LAUNCHES, int(_WARM_S / max(self.seconds(call, 3), 1e-7))))
        figures: dict[int, dict[str, list[float]]] = {i: {"warm": [], "cold": []} for i in calls}
        order = list(calls)
        for _ in range(self.rounds):
            for i in order:
                calls[i]()
                figures[i]["warm"].append(self.seconds(calls[i], counts[i]))
                self.clear()
                figures[i]["cold"].append(self.seconds(calls[i], 1))
            order = order[1:] + order[:1]
        return {i: {mode: _times(x) for mode, x in by_mode.items()} for i, by_mode in figures.items()}

    @abstractmethod
    def wait(self) -> None:
        """Wait for the launch; raises what it failed with."""

    @abstractmethod
    def alive(self, failure: Exception) -> None:
        """Raises DeviceLost if the device takes no more work after a failure."""


class GpuMeasurer(Bench):
    """Measures on this machine's GPU.

    Raises:
        TesselError: there is none, or it is not the target.
    """

    def __init__(self, target: Target, rounds: int = ROUNDS) -> None:
        there = torch.cuda.is_available()
        check(there, lambda: "--measure runs kernels, and torch finds no GPU here; without it tiles are predicted")
        name = torch.cuda.get_device_name()
        here = match_device(name)
        check(
            here is not None and here.name == target.name,
            lambda: f"--measure runs kernels on {target.name}, and the GPU here is {name}",
        )
        self._folder = tempfile.TemporaryDirectory(prefix="tessel-tune-")  # goes with the object
        super().__init__(target, "cuda", Path(self._folder.name), rounds)
        l2 = next((level.capacity_bytes for level in target.levels if level.name == "l2"), 64 * 2**20)
        self._junk = torch.empty(_CLEAR * l2, dtype=torch.int8, device="cuda")

    def seconds(self, call: Callable[[], None], count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)  # so that launches queue up, and the host's own time is not counted
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    def clear(self) -> None:
        self._junk.zero_()

    def refused(self, sources: Sequence[Source]) -> list[str]:
        told = compile_all(sources, self.target, os.cpu_count() or 1)
        return ["" if c.ok else f"the compiler: {c.error}" for c in told]

    def facts(self) -> dict[str, Fact]:
        """Driver and clock. The clock is left out where nvidia-smi does not tell it."""
        out: dict[str, Fact] = {"driver": driver_version()}
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", "0"]
            told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            out["clock_hz"] = float(told.split()[0]) * 1e6
        return out

    def wait(self) -> None:
        torch.cuda.synchronize()

    def alive(self, failure: Exception) -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as e:
            raise DeviceLost(
                f"the GPU takes no more work after a kernel failed ({' '.join(str(failure).split())[:200]}); "
                "start again: what was measured is kept"
            ) from e


def _bound(plain: Any, exact: Any) -> float:
    """What a kernel's result may be off: a small multiple of what torch's own operators are in these types."""
    if not isinstance(plain, torch.Tensor) or not plain.dtype.is_floating_point:
        return 0.0
    factor, least = _LIMITS.get(plain.dtype, _NARROW)
    return max(factor * error_of(plain, exact), least)


def _error(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> float:
    """Numbers are compared with the exact result; whole numbers, such as the place of a maximum, with either."""
    error = error_of(got, exact)
    return error if got.dtype.is_floating_point else min(error, error_of(got, plain))


def _poisoned(t: TensorType, device: str) -> torch.Tensor:
    """An output nobody has written yet."""
    shape, strides = (tuple(map(int, x)) for x in (t.shape, t.strides))
    x = torch.empty_strided(shape, strides, dtype=t.dtype, device=device)
    return x.fill_(float("nan")) if t.dtype.is_floating_point else x.fill_(t.dtype == torch.bool or 77)


def _times(figures: list[float]) -> Times:
    low, median, high = statistics.quantiles(figures, n=4) if len(figures) > 1 else figures * 3
    return Times(median, low, high, len(figures))
