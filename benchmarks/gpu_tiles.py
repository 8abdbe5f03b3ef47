"""Solved tiles on the GPU of this machine, against the best of a sweep, torch's own kernels and torch.compile.

    python benchmarks/gpu_tiles.py [--sweep 150] [--only matmul]

20 matrix products, 8 reductions and 6 attentions. Of each kernel the predicted pick, the best of the shortlist that
``tessel tune --measure`` would measure, and the best of a sweep are compared: the best tiles by prediction and as many
drawn at random from the rest. Every tile is checked against float64 before it is timed, all in turns. Torch is timed
by the same clock right after. The last table says how far predictions are off, by the term that they say counts:
what a calibration would have to correct.

Writes ``benchmarks/results/<device>-tiles-<date>.json``. Exit status: 0 done, 1 a kernel failed, 2 no GPU here.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import table, write_result
from gemm_picks import SHAPES
from torch.nn import functional as F

Call = Callable[..., torch.Tensor]
Inputs = Callable[[str], tuple[torch.Tensor, ...]]
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
SHORTLIST = 6


def cases() -> list[tuple[str, str, Call, Inputs]]:
    """Family, name, function, and its inputs on a device."""

    def random_of(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Inputs:
        return lambda device: tuple(torch.randn(s, device=device, dtype=dtype) for s in shapes)

    out: list[tuple[str, str, Call, Inputs]] = []
    for name, m, n, k, dtype in SHAPES:
        inputs = random_of([(m, k), (n, k)], DTYPES[dtype])
        out.append(("matmul", f"{name}, {m}x{n}x{k} {dtype}", lambda a, b: a @ b.t(), inputs))
    norm = lambda x, w: F.rms_norm(x, (x.shape[-1],), w)  # noqa: E731
    layer = lambda x, w: F.layer_norm(x, (x.shape[-1],), w)  # noqa: E731
    folds: list[tuple[str, Call, list[tuple[int, ...]]]] = [
        ("softmax 8192x1024", lambda x: F.softmax(x, -1), [(8192, 1024)]),
        ("softmax 4096x32000", lambda x: F.softmax(x, -1), [(4096, 32000)]),
        ("rms norm 8192x4096", norm, [(8192, 4096), (4096,)]),
        ("rms norm 1024x16384", norm, [(1024, 16384), (16384,)]),
        ("layer norm 8192x1024", layer, [(8192, 1024), (1024,)]),
        ("sum over rows 16384x4096", lambda x: x.sum(0), [(16384, 4096)]),
        ("sum over columns 16384x4096", lambda x: x.sum(1), [(16384, 4096)]),
        ("largest of 4096x32000", lambda x: x.amax(-1), [(4096, 32000)]),
    ]
    out += [("reduction", n, fn, random_of(s, torch.bfloat16)) for n, fn, s in folds]
    for heads, length, width in ((32, 1024, 64), (32, 4096, 64), (16, 16384, 64), (32, 1024, 128), (32, 4096, 128)):
        shape = (1, heads, length, width)
        out.append(
            ("attention", f"causal, {heads} heads, {length}x{width}", _causal, random_of([shape] * 3, torch.bfloat16))
        )
    plain = random_of([(4, 32, 2048, 128)] * 3, torch.bfloat16)
    out.append(("attention", "4x32 heads, 2048x128", F.scaled_dot_product_attention, plain))
    return out


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sweep(choice: Any, count: int, seed: int = 0) -> list[Mapping[str, int]]:
    """The shortlist first, then the best by prediction, then tiles drawn from all others; ``count`` in all."""
    ranked = [dict(c.knobs) for c in choice.candidates()]
    short = [dict(c.knobs) for c in choice.shortlist(SHORTLIST)]
    rest = [knobs for knobs in ranked if knobs not in short]
    room = max(count - len(short), 0)
    best = rest[: room // 2]
    others = rest[room // 2 :]
    drawn = random.Random(seed).sample(others, min(room - len(best), len(others)))
    return [*short, *best, *drawn]


def compared(choice: Any, measured: Sequence[Any], mode: str = "warm") -> dict[str, float]:
    """Seconds of the pick, of the best of the shortlist and of the best of all; and what was predicted for the pick.

    Raises:
        RuntimeError: the pick, or all tiles, were refused; the reason is in the message.
    """
    if measured[0].refused:
        raise RuntimeError(f"the pick is refused: {measured[0].refused}")
    short = min(SHORTLIST, len(measured))
    took = [m.times[mode].median if not m.refused else math.inf for m in measured]
    return {
        "pick": took[0],
        "shortlist": min(took[:short]),
        "best": min(took),
        "predicted": choice.predicted.total,
        "refused": float(sum(bool(m.refused) for m in measured)),
    }


def peers(
    fn: Call, inputs: tuple[torch.Tensor, ...], seconds: Callable[[Callable[[], None], int], float]
) -> dict[str, float]:
    """Seconds of torch's own kernel and of torch.compile's best, in turns: medians."""
    tuned = torch.compile(fn, mode="max-autotune-no-cudagraphs", dynamic=False)
    calls: dict[str, Callable[[], None]] = {"torch": lambda: fn(*inputs), "torch.compile": lambda: tuned(*inputs)}  # type: ignore[dict-item, return-value]
    for call in calls.values():
        call()
    counts = {n: max(1, min(50, int(1e-3 / max(seconds(c, 3), 1e-7)))) for n, c in calls.items()}
    found: dict[str, list[float]] = {n: [] for n in calls}
    for _ in range(11):
        for name, call in calls.items():
            found[name].append(seconds(call, counts[name]))
    return {n: statistics.median(x) for n, x in found.items()}


def one(family: str, fn: Call, inputs: Inputs, measurer: Any, target: Any, count: int) -> dict[str, Any]:
    """All figures of one case."""
    from tessel.autotune.kernels import kernels_of
    from tessel.solve import tile

    torch._dynamo.reset()
    found = next(f for f in kernels_of(fn, inputs("meta")) if f.kernel.family == family)
    choice = tile(found.kernel, target)
    tiles = sweep(choice, count)
    row = compared(choice, measurer.measure(found, tiles))
    return {**row, **peers(fn, inputs("cuda"), measurer.seconds), "tiles": len(tiles), "bound": choice.predicted.bound}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def report(rows: list[dict[str, Any]]) -> str:
    """The rows, the means of each family, and how far predictions are off."""
    ratios = {
        "pick / best": lambda r: r["best"] / r["pick"],
        f"best of {SHORTLIST} / best": lambda r: r["best"] / r["shortlist"],
        "torch": lambda r: r["torch"] / r["shortlist"],
        "torch.compile": lambda r: r["torch.compile"] / r["shortlist"],
    }
    cells = [
        [
            r["case"],
            *(f"{r[k] * 1e6:.1f}" for k in ("predicted", "pick", "shortlist", "best", "torch", "torch.compile")),
        ]
        + [f"{ratio(r):.2f}" for ratio in ratios.values()]
        for r in rows
    ]
    head = ["µs", "predicted", "pick", f"best of {SHORTLIST}", "best", "torch", "torch.compile", *ratios]
    text = [table(head, cells), ""]
    for family in dict.fromkeys(r["family"] for r in rows):
        some = [r for r in rows if r["family"] == family]
        means = ", ".join(f"{name} {geometric_mean([ratio(r) for r in some]):.3f}" for name, ratio in ratios.items())
        text.append(f"{family}: geometric means over {len(some)}: {means}")
    for bound in sorted({r["bound"] for r in rows}):
        off = [r["pick"] / r["predicted"] for r in rows if r["bound"] == bound]
        text.append(f"measured / predicted where {bound} counts: {geometric_mean(off):.2f} over {len(off)}")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=int, default=150, help="tiles timed of one kernel")
    parser.add_argument("--only", default="", help="cases with this in their family or name")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_tiles: torch finds no GPU here; nothing was run or measured", file=sys.stderr)
        return 2
    from tessel.autotune.measure import GpuMeasurer
    from tessel.targets import match_device

    name = torch.cuda.get_device_name(0)
    target = match_device(name)
    if target is None:
        print(f"gpu_tiles: no record for {name}; describe it in a JSON file (TESSEL_TARGET_PATH)", file=sys.stderr)
        return 2
    measurer = GpuMeasurer(target, rounds=5)
    rows: list[dict[str, Any]] = []
    broken = []
    for family, what, fn, inputs in cases():
        if given.only not in f"{family} {what}":
            continue
        try:
            rows.append({"family": family, "case": what, **one(family, fn, inputs, measurer, target, given.sweep)})
        except Exception:
            broken.append(what)
            print(f"{what}: not measured\n{traceback.format_exc()}", file=sys.stderr)
        print(f"{len(rows) + len(broken)}: {what}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    print(report(rows))
    data = {"sweep": given.sweep, "cases": rows, "not measured": broken}
    written = write_result(f"{name.replace(' ', '-')}-tiles", data)
    print(f"written: benchmarks/results/{written.name}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
