"""How long a kernel takes with a given tile, term by term.

The grid runs in waves of ``units × resident`` programs. A program walks ``steps`` tiles of its loop, then writes:

    T = Σ over waves [ steps · (max(matrix, L2, memory, shared, latency to cover) + issue) + fill + epilogue ] + launch

with every term for the programs that are resident on one unit together. The form is the pipeline model of
Triton's software pipelining (a roofline alone prefers the largest tile with the fewest stages, since it sees
neither what a step costs to issue nor the latency that stages must cover); that analytical ranking comes close to
an exhaustive search is the finding of Origami (AMD's tritonBLAS) and nvMatmulHeuristics. Terms:

    matrix   2·BM·BN·BK ÷ (rate of a unit × what a long product reaches); mma.sync where a tile is too small for wgmma
    L2       bytes of the step's tiles ÷ the unit's share of L2's bandwidth (64 bytes a clock a unit at most)
    memory   the step's share of the traffic that grouping and L2 leave ÷ the unit's share of memory bandwidth
    shared   the tiles written once, the right one read once for every m rows of the instruction, ÷ 128 bytes a clock
    latency  (latency + arrival of a tile) ÷ (stages − 1): what is asked for must be there when its turn comes
    vector   softmax, a norm's arithmetic: exponentials on the special-function unit, the rest on the lanes
    serial   matrix and vector of one program, where the one waits for the other (attention)
    issue    barriers and loop control, and one instruction a warp for each 512 bytes copied; resident programs share it
    fill     latency and the first tile, before anything can be multiplied
    epilogue what is read for it and written, and the exchange through shared memory
    combine  partial sums of a k in parts, read and added by a second kernel

A program of few warps cannot use all four schedulers of a unit, so matrix and vector take longer until ``resident ×
warps`` reaches four. The first ``stages − 1`` steps find their tiles asked for, and wait for no latency but fill's.
A persistent grid begins and fills once; descriptors take no instructions to copy.

Constants are in ``targets/calibration.py``, each with its source. Everything is computed on numpy arrays, all
tiles at once; ``Time`` is one of them, in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..targets import Calibration, MatrixInstruction, Target, calibration_of
from .problem import Problem

__all__ = ["Time", "predict"]

_PORT = 64  # bytes a clock that L2 gives one SM: NVIDIA H100 white paper, as on A100; assumed for a CU
_SECTOR = 32  # bytes: what memory moves at least
_COPY = 512  # bytes that a warp's instruction of 16 bytes a thread copies
_RUN = 64  # bytes in a row below which loads waste bandwidth: assumed, two sectors
_SCHEDULERS = 4  # of a unit, each with its own matrix unit: NVIDIA since Volta, AMD's four SIMDs
_STEP_CLOCKS = 10  # of a recurrence: a product with a sum (4 clocks) and the choice of the first step: assumed
_SIDE_OPS = 12  # lane operations a place of a scan side by side: assumed, lines of two numbers joined and handed on
_SHUFFLE = 30  # clocks of an exchange inside a warp and the operation on it: assumed, as in a reduction
_SOFTMAX_OPS = 20  # lane operations a score: assumed, 14 (scale, masks, compare, subtract, sum, convert) at 70% issue
_ROW_OPS = 48  # lane operations a row of scores: assumed, two folds across four lanes and the running peak and total


@dataclass(frozen=True)
class Time:
    """A predicted time and what it is made of; ``str`` gives the table.

    Attributes:
        programs, resident, waves: programs in all, on one unit at once, and how often all units are filled.
        steps: tiles of a program's loop; the first ``ahead`` of them have no latency to wait for.
        matrix, l2, memory, shared, vector, serial, latency: seconds of one step of all programs that are resident on a
            unit, the longest of which counts.
        work, issue, fill, epilogue, start, dispatch, combine, launch: seconds over all waves; they add up to ``total``.
    """

    programs: float
    resident: float
    waves: float
    steps: float
    matrix: float
    l2: float
    memory: float
    shared: float
    vector: float
    serial: float
    latency: float
    ahead: float
    work: float
    issue: float
    fill: float
    epilogue: float
    start: float
    dispatch: float
    combine: float
    launch: float
    total: float

    @property
    def bound(self) -> str:
        """The largest term of a step."""
        return max(_STEP, key=lambda n: float(getattr(self, n)))

    @property
    def parts(self) -> dict[str, float]:
        """What adds up to ``total``, in seconds."""
        return {n: getattr(self, n) for n in _PARTS}

    def __str__(self) -> str:
        lines = [
            f"predicted {_show(self.total)}: {self.programs:,.0f} programs, {self.resident:.0f} resident a unit, "
            f"{self.waves:.2f} waves of {self.steps:,.0f} steps"
        ]
        for name, what in _PARTS.items():
            if getattr(self, name) > 0:
                lines.append(f"  {name:<8} {_show(getattr(self, name)):>9}  {what}")
            for term, words in _STEP.items() if name == "work" else ():
                mark = "  <- the most" if term == self.bound else ""
                more = f", after the first {self.ahead:.0f} steps" if term == "latency" and self.ahead else ""
                if getattr(self, term) > 0:
                    lines.append(f"      {term:<8} {_show(getattr(self, term)):>9}  {words}{more}{mark}")
        return "\n".join(lines)


_STEP = {
    "matrix": "multiply",
    "l2": "tiles from L2",
    "memory": "tiles from memory",
    "shared": "shared memory's traffic",
    "vector": "arithmetic outside products",
    "serial": "products, then arithmetic on them",
    "latency": "latency to cover",
}
_PARTS = {
    "work": "all steps; one of all resident programs is as long as the longest of:",
    "issue": "barriers, loop control and the instructions that copy",
    "fill": "latency and the first tile, once a wave",
    "epilogue": "what is read for the output and written, and the exchange through shared memory",
    "start": "programs begin and end",
    "dispatch": "programs are handed out no faster",
    "combine": "partial sums of a split are added by a second kernel",
    "launch": "a launch",
}


def _show(seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3f} ms"
    return f"{seconds * 1e6:.2f} µs" if seconds >= 1e-6 else f"{seconds * 1e9:.1f} ns"


def predict(problem: Problem, target: Target, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``Time`` for tiles whose knobs and resources are in ``values``, an array each."""
    out = getattr(_Model(problem, target, values), problem.family)()
    rows = len(np.atleast_1d(values["num_warps"]))
    return {f.name: np.broadcast_to(np.asarray(out[f.name], dtype=float), (rows,)) for f in fields(Time)}


def row(times: Mapping[str, Any], i: int) -> Time:
    """One tile's ``Time`` out of those of all."""
    return Time(**{f.name: float(times[f.name][i]) for f in fields(Time)})


@dataclass(frozen=True)
class _Step:
    """One step of one program's loop (bytes, seconds on an otherwise idle unit), before sharing."""

    matrix: Any
    vector: Any
    l2_bytes: Any
    memory_bytes: Any
    shared_bytes: Any
    copies: Any
    by_warp: Any  # 1 where each warp multiplies for itself, 0 where the instruction reads shared memory
    overlap: bool  # products and vector work of one program overlap


class _Model:
    """The terms that the families share, on arrays."""

    def __init__(self, problem: Problem, target: Target, v: Mapping[str, Any]) -> None:
        self.p, self.target, self.v = problem, target, v
        self.c: Calibration = calibration_of(target)
        assert target.limits is not None and target.clock_hz is not None
        self.units, self.clock = target.units, target.clock_hz
        self.warp = target.limits.warp_size
        memory = target.level("memory").bandwidth_bytes_per_s
        shared = target.level("shared").bandwidth_bytes_per_s
        assert memory is not None and shared is not None
        self.memory_rate = memory * self.c.memory_efficiency
        self.shared_rate = shared / self.units
        self.l2_size = target.level("l2").capacity_bytes

    # ---------------------------------------------------------------- families

    def matmul(self) -> dict[str, Any]:
        p, v = self.p, self.v
        bm, bn, bk = (_real(v[n]) for n in ("BM", "BN", "BK"))
        tiles_m, tiles_n = _up(p.m, bm), _up(p.n, bn)
        split = _real(v.get("SPLIT", 1))
        programs = p.batch * tiles_m * tiles_n * split
        steps = _up(p.k, bk * split)
        matrix, shared, by_warp = self._product(bm, bn, bk)
        a_run, b_run = (bk if p.a_along_k else bm), (bk if p.b_along_k else bn)
        waste_a = np.maximum(1.0, _RUN / (a_run * p.a_bytes))
        waste_b = np.maximum(1.0, _RUN / (b_run * p.b_bytes))
        loaded = (bm * p.a_bytes * waste_a + bn * p.b_bytes * waste_b) * bk
        traffic = self._traffic(bm, bn, tiles_m, tiles_n, waste_a * p.a_bytes, waste_b * p.b_bytes)
        unpack = (bm * p.a_ops + bn * p.b_ops) * bk / self._lanes()
        step = _Step(
            matrix, unpack, loaded, traffic / (programs * steps), shared + loaded, self._copies(loaded), by_warp, True
        )
        out = p.out_bytes / max(1, p.batch * p.m * p.n)
        written = bm * bn * np.where(split > 1, 4.0, out + p.point_bytes)
        epilogue = written, bm * bn * (2 + p.ops) / self._lanes()
        sums = (split + 1) * 4.0 * p.batch * p.m * p.n / self.memory_rate + self.c.launch_s
        return self._waves(programs, steps, step, epilogue, self._stages(), np.where(split > 1, sums, 0.0))

    def attention(self) -> dict[str, Any]:
        p, v = self.p, self.v
        bm, bn = _real(v["BM"]), _real(v["BN"])
        programs = p.batch * _up(p.m, bm)
        seen = 0.5 + bm / (2.0 * max(p.n, 1)) if p.causal else 1.0
        steps = np.maximum(1, _up(p.n, bn) * np.minimum(seen, 1.0))
        scores, shared_scores, by_warp = self._product(bm, bn, _real(p.d))
        values, shared_values, _ = self._product(bm, _real(p.e), bn, left_in_registers=True)
        lanes = bm * bn * (_SOFTMAX_OPS + p.ops) + bm * (p.e * 2 + _ROW_OPS)
        vector = bm * bn * (1 + p.slow_ops) / (self.c.exps_per_clock * self.clock) + lanes / self._lanes()
        loaded = bn * (p.d + p.e) * p.itemsize + bm * bn * p.point_bytes
        shared = shared_scores + shared_values + loaded
        traffic = p.total_bytes  # keys and values of a head stay in L2 while its queries pass
        step = _Step(
            scores + values, vector, loaded, traffic / (programs * steps), shared, self._copies(loaded), by_warp, False
        )
        epilogue = bm * p.e * p.out_itemsize, bm * p.e * 2 / self._lanes()
        return self._waves(programs, steps, step, epilogue, stages=self._stages())

    def attention_backward(self) -> dict[str, Any]:
        """As the forward, with two products before the softmax's slope and one or two after it."""
        p, v = self.p, self.v
        bm, bn = _real(v["BM"]), _real(v["BN"])
        held, streamed, along, across = (bn, bm, p.n, p.m) if p.by_keys else (bm, bn, p.m, p.n)
        programs = p.batch * _up(along, held)
        seen = 0.5 + held / (2.0 * max(across, 1)) if p.causal else 1.0
        steps = np.maximum(1, _up(across, streamed) * np.minimum(seen, 1.0))
        products = [self._product(bm, bn, _real(w)) for w in (p.d, p.e)]
        products += [self._product(held, _real(w), streamed) for w in ((p.d, p.e) if p.by_keys else (p.d,))]
        matrix, shared, by_warp = sum(x[0] for x in products), sum(x[1] for x in products), products[0][2]
        lanes = bm * bn * (_SOFTMAX_OPS + p.ops + 3)
        vector = bm * bn * (1 + p.slow_ops) / (self.c.exps_per_clock * self.clock) + lanes / self._lanes()
        loaded = streamed * (p.d + p.e) * p.itemsize + bm * bn * p.point_bytes
        traffic = p.total_bytes / (programs * steps)
        step = _Step(matrix, vector, loaded, traffic, shared + loaded, self._copies(loaded), by_warp, False)
        epilogue = held * (p.d + p.e * p.by_keys) * p.out_itemsize, held * p.d * 2 / self._lanes()
        return self._waves(programs, steps, step, epilogue, stages=self._stages())

    def reduction(self) -> dict[str, Any]:
        p, v = self.p, self.v
        xb, rb, warps = _real(v["XB"]), _real(v["RB"]), _real(v["num_warps"])
        programs = _up(p.x, xb)
        looped = (rb < p.r) | (not p.r_known)
        passes = np.where(looped, p.loops, 1)
        steps = _up(p.r, rb) * passes
        run = (np.minimum(xb, p.x) if p.across else np.minimum(rb, p.r)) * max(1, p.itemsize)
        waste = np.maximum(1.0, _SECTOR / run)
        again = np.where(xb * p.r * p.point_bytes * self.units <= self.l2_size / 2, 1, passes)  # a second pass finds L2
        loaded = xb * rb * p.point_bytes * waste
        points = xb * rb
        vector = points * (p.ops + 2 * p.folds) / self._lanes()
        vector = vector + points * p.slow_ops / (self.c.exps_per_clock * self.clock)
        wide = np.minimum(16.0, np.maximum(p.itemsize, points / (warps * self.warp) * p.itemsize))
        copies = loaded / (self.warp * wide)
        traffic = p.total_bytes * waste * again
        vector = vector + copies * self.c.copy_s
        step = _Step(0.0, vector, loaded, traffic / (programs * steps), 0.0, 0.0, 0.0, overlap=True)
        lanes_r = np.minimum(self.warp, rb)  # a fold inside a warp takes log2 shuffles, across warps an exchange
        across = np.where(rb > self.warp * 4, self.c.exchange_s, self.c.exchange_s / 4)
        folds = p.folds * (across * (warps > 1) + np.log2(np.maximum(lanes_r, 2)) * 30 / self.clock)
        written = xb * p.out_bytes / max(1, p.x)
        return self._waves(programs, steps, step, (written, folds), stages=1)

    def scan(self) -> dict[str, Any]:
        """A turn of the loop loads STEPS steps, or SIDE of them that are scanned side by side; nothing runs ahead."""
        p, v = self.p, self.v
        xb, rb, warps, side = (_real(v[n]) for n in ("XB", "RB", "num_warps", "SIDE"))
        programs, turn = _up(p.x, xb), _real(v["STEPS"]) * side
        steps = _up(p.steps, turn)
        points = np.maximum(xb * rb * side, warps * self.warp) * _real(v["STEPS"])  # idle threads take part
        vector = points * (p.ops + 2 + 2 * p.folds + (side > 1) * _SIDE_OPS) / self._lanes()
        vector = vector + points * p.slow_ops / (self.c.exps_per_clock * self.clock)
        # The chain of a turn: each step waits for the one before, folds for their shuffles, a tile for its scan.
        shuffles = np.where(rb > 1, p.folds * np.log2(np.maximum(rb, 2)), 0.0)
        chain = (_real(v["STEPS"]) * _STEP_CLOCKS + (shuffles + (side > 1) * np.log2(side)) * _SHUFFLE) / self.clock
        apart = np.where((rb > self.warp) | (side > self.warp), self.c.exchange_s, 0.0) * (warps > 1)
        vector = np.maximum(vector, (chain + apart) * warps / _SCHEDULERS)
        run = (np.minimum(xb, p.x) if p.across or p.folds else np.minimum(turn, p.steps)) * p.itemsize
        waste = np.maximum(1.0, _SECTOR / run)
        loaded = xb * rb * p.point_bytes * turn * waste
        step = _Step(0.0, vector, loaded, waste * p.total_bytes / (programs * steps), 0.0, 0.0, 0.0, overlap=True)
        return self._waves(programs, steps, step, (xb * p.out_bytes / max(1, p.x), 0.0), stages=1)

    def pointwise(self) -> dict[str, Any]:
        p, v = self.p, self.v
        xb, warps = _real(v["XB"]), _real(v["num_warps"])
        programs = _up(p.x, xb)
        each = xb / (warps * self.warp)
        wide = np.minimum(16.0, np.maximum(1.0, each) * p.itemsize)
        loaded = xb * max(p.point_bytes, p.total_bytes / max(1, p.x))
        vector = xb * p.ops / self._lanes() + xb * p.slow_ops / (self.c.exps_per_clock * self.clock)
        idle = np.maximum(1.0, warps * self.warp / xb)
        copies = (loaded + xb * p.out_bytes / max(1, p.x)) / (self.warp * wide) * idle
        vector = vector * idle + copies * self.c.copy_s
        step = _Step(0.0, vector, loaded, p.total_bytes / programs, 0.0, 0.0, 0.0, overlap=True)
        return self._waves(programs, 1.0, step, (xb * p.out_bytes / max(1, p.x), 0.0), stages=1)

    # ---------------------------------------------------------------- terms

    def _lanes(self) -> float:
        return self.c.lanes_per_clock * self.clock

    def _copies(self, loaded: Any) -> Any:
        """Instructions that copy, a step; what comes by descriptors takes none of a warp's time."""
        by_warps = 1 - _real(self.v.get("TMA", 0)) * self.p.described / 2
        return loaded / _COPY * (1 if self.p.aligned else 16 / self.p.itemsize) * by_warps

    def _stages(self) -> Any:
        """Stages that really run ahead: unaligned operands are not copied asynchronously."""
        return _real(self.v["num_stages"]) if self.p.aligned else _real(self.v["num_stages"]) * 0 + 1

    def _product(self, bm: Any, bn: Any, bk: Any, left_in_registers: bool = False) -> tuple[Any, Any, Any]:
        """``(seconds, bytes read from shared memory, whether by warp)`` of one tile product on one unit."""
        p, flops = self.p, self.target.flops
        work = 2.0 * bm * bn * bk
        warps = _real(self.v["num_warps"])
        if not p.matrix:  # products by the lanes: their operands come out of registers, filled from shared memory
            rate = flops.get("f64" if p.dtype == "f64" else "f32", flops["f32"]) / self.units * 0.6
            slow = 4.0 if p.plain else 1.0  # sums of products through a third dimension
            return work * slow / rate, (bm + bn) * bk * p.itemsize * 4, 1.0
        dtype = "tf32" if p.dtype == "f32" else p.dtype
        rate = flops.get(dtype, flops.get("bf16", flops["f32"])) / self.units * self.c.matrix_efficiency
        seconds, reads = work / rate, 0.0 * bm
        by_warp = np.ones_like(seconds)
        done = np.zeros_like(bm + warps, dtype=bool)
        for i in self.target.matrix:
            fits = (bm >= i.m) & (warps >= i.warps) & ~done
            fits = fits if i.name != self.target.matrix[-1].name else ~done  # the last one takes every tile
            s, r = self._instruction(i, work / rate, bm, bn, bk, warps, left_in_registers)
            seconds, reads = np.where(fits, s, seconds), np.where(fits, r, reads)
            by_warp = np.where(fits, 0.0 if i.shared else 1.0, by_warp)
            done = done | fits
        return seconds, reads, by_warp

    def _instruction(
        self, i: MatrixInstruction, seconds: Any, bm: Any, bn: Any, bk: Any, warps: Any, left: bool
    ) -> tuple[Any, Any]:
        """Time and shared-memory reads when tiles are multiplied by one instruction."""
        size = self.p.itemsize
        padded = np.maximum(1.0, i.m / bm) * np.maximum(1.0, i.k_bytes / (bk * size)) * np.maximum(1.0, i.n / 32 / bn)
        if i.shared:
            reads = ((0 if left else bm) + _up(bm, i.m) * bn) * bk * size
        else:
            along = 2.0 ** np.clip(np.round(np.log2(warps * bm / bn) / 2), 0, np.log2(warps))
            reads = ((0 if left else bm * (warps / along)) + bn * along) * bk * size
        return seconds * padded / i.rate, reads

    def _traffic(self, bm: Any, bn: Any, tiles_m: Any, tiles_n: Any, a_bytes: Any, b_bytes: Any) -> Any:
        """Bytes of operands that come from memory: L2 keeps what a wave, or a group of rows, reads together."""
        p, v = self.p, self.v
        a, b = float(p.m) * p.k * a_bytes, float(p.k) * p.n * b_bytes
        each = tiles_m * tiles_n
        together = np.minimum(each, np.maximum(1, self.units * np.maximum(self.v["per_unit"], 1)))
        group = np.minimum(_real(v["GROUP"]), tiles_m)
        columns = np.minimum(tiles_n, _up(together, group))
        rows = np.minimum(tiles_m, group * _up(together, group * tiles_n))
        wave = (rows * bm * a_bytes + columns * bn * b_bytes) * p.k
        waves = each / together
        panel = group * bm * p.k * p.a_bytes  # rows of a group, kept while all columns pass
        grouped = np.where(panel <= self.l2_size / 2, a + _up(tiles_m, group) * b, np.inf)
        per_product = np.maximum(a + b, np.minimum(waves * wave, grouped))
        per_product = np.where(a + b <= self.l2_size / 2, a + b, per_product)
        return per_product * p.batch

    def _waves(
        self, programs: Any, steps: Any, step: _Step, epilogue: tuple[Any, Any], stages: Any, combine: Any = 0.0
    ) -> dict[str, Any]:
        """All terms, from what one step and one epilogue take."""
        staying = _real(self.v.get("PERSIST", 0))
        most = np.where(staying > 0, np.minimum(staying, self.v["per_unit"]), self.v["per_unit"])
        resident = np.minimum(np.maximum(most, 1), _up(programs, self.units))
        at_once = self.units * resident
        full = np.floor(programs / at_once)
        rest = programs - full * at_once
        active = np.clip(rest, 1, self.units)
        main = self._wave(resident, np.minimum(self.units, programs), steps, step, epilogue, stages)
        last = self._wave(np.maximum(1, _up(rest, self.units)), active, steps, step, epilogue, stages)
        out = {n: np.where(full > 0, main[n], last[n]) for n in (*_STEP, "ahead")}
        out |= {n: full * main[n] + np.where(rest > 0, last[n], 0.0) for n in main if n not in out}
        out |= {"programs": programs, "resident": resident, "waves": programs / at_once, "steps": steps}
        # Programs that are resident together hide each other's waits, except the first of all. Programs that stay
        # begin once, and ask for the next tile ahead of time.
        alone = 1 - 1 / np.where(full > 0, resident, np.maximum(1, _up(rest, self.units)))
        waits = {"fill": np.where(stages > 1, self.c.latency_s, 0.0), "start": self.c.program_s}
        for n, wait in waits.items():
            out[n] = np.where(staying > 0, np.where(full > 0, main[n], last[n]), out[n]) + alone * wait
        handed = np.where(staying > 0, at_once, programs)
        walk = sum(out[n] for n in ("work", "issue", "fill", "epilogue", "start"))
        out["dispatch"] = np.maximum(0.0, handed * self.c.dispatch_s - walk)
        out |= {"combine": combine, "launch": self.c.launch_s}
        out["total"] = walk + out["dispatch"] + combine + self.c.launch_s
        return out

    def _wave(
        self, o: Any, active: Any, steps: Any, step: _Step, epilogue: tuple[Any, Any], stages: Any
    ) -> dict[str, Any]:
        """One wave with ``o`` programs resident on each of ``active`` units."""
        port = _PORT * self.clock
        l2_rate = np.minimum(self.c.l2_bytes_per_s / active, port)
        memory_rate = np.minimum(self.memory_rate / active, port)
        l2, memory = step.l2_bytes / l2_rate, step.memory_bytes / memory_rate
        shared = step.shared_bytes / self.shared_rate
        warps = _real(self.v["num_warps"])
        idle = np.maximum(1.0, _SCHEDULERS / (o * warps))  # schedulers without a warp
        # One warp a scheduler cannot hide its own loads from shared memory; two can (wgmma reads them itself).
        lone = 1 + 0.25 * np.clip(2 * _SCHEDULERS / (o * warps) - 1, 0, 1) * step.by_warp
        matrix, vector = step.matrix * idle * lone, step.vector * idle
        work = np.maximum.reduce(np.broadcast_arrays(matrix, l2, memory, shared, vector))
        # Four warps wait for their own products, then for their arithmetic on them; other four go on meanwhile.
        few = _SCHEDULERS / warps
        chain = (step.matrix + step.vector) * few if not step.overlap else np.maximum(matrix, vector)
        # A tile must arrive in the time that the stages in flight give; without stages every step waits for its own.
        arrival = np.maximum(l2, memory) * o
        ahead = np.maximum(stages - 1, 1)
        apart = self.c.latency_s + np.maximum(l2, memory) + np.maximum(chain, shared)
        cover = np.where(stages > 1, (self.c.latency_s + arrival) / ahead, apart)
        copies = step.copies * self.c.copy_s * np.maximum(1.0, few)
        issue = (self.c.issue_s + copies) / o
        busy = np.maximum(o * work, np.maximum(work, chain))
        first = np.minimum(stages - 1, steps)
        written, arithmetic = epilogue
        return {
            "matrix": o * matrix,
            "l2": o * l2,
            "memory": o * memory,
            "shared": o * shared,
            "vector": o * vector,
            "serial": 0.0 * work if step.overlap else chain,
            "latency": cover,
            "ahead": first,
            "work": first * busy + (steps - first) * np.maximum(busy, cover),
            "issue": steps * issue,
            "fill": np.where(stages > 1, (self.c.latency_s + first * copies) / o + l2, 0.0),  # else every step waits
            "epilogue": o * written / memory_rate + arithmetic + self.c.exchange_s * _real(self.v.get("PIECES", 1)) / o,
            "start": self.c.program_s / o,
        }


def _real(x: Any) -> Any:
    return np.asarray(x, dtype=float)


def _up(a: Any, b: Any) -> Any:
    """A quotient rounded up."""
    return np.ceil(np.asarray(a, dtype=float) / b)
