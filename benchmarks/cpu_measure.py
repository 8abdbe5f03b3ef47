"""The measurements of ``cpu.py``, each made in a process of its own: see the functions' first lines."""

from __future__ import annotations

import contextlib
import copy
import random
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cpu_cases import MODELS, Case, load, load_training, tensor_of

Runner = Callable[[], Any]
WAYS = ("tessel", "compile", "freeze", "eager")
_SHORT = 0.1  # seconds of a round of calls below which a turn is a burst
_BURST = 16


def runner(way: str, case: Case) -> Runner:
    """One way to run a case; compiled at its first call. Imports what it needs, so that a cold start counts it."""
    fn: Callable[..., Any]
    if way == "tessel":
        import tessel

        fn = tessel.compile(case.fn, target="cpu")
    elif way == "eager":
        fn = case.fn
    else:
        fn = torch.compile(case.fn, options={"freezing": True} if way == "freeze" else None)
    return lambda: fn(*case.args, **case.kwargs)


def said(e: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text[:300]}"


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds of real time."""

    def over(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median in milliseconds, and the interquartile range as a part of it."""
    low, mid, high = statistics.quantiles(times, n=4)
    return {"ms": round(mid * 1e3, 4), "iqr": round((high - low) / mid, 4), "runs": len(times)}


def interleaved(
    runners: dict[str, Runner],
    seconds: float,
    least: int = 9,
    most: int = 201,
    clock: Runner = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every counted call by ``clock``: the runners take turns, in an order drawn anew in every round.

    Short calls are made ``_BURST`` times in a turn, and the second half counts. The first ones pay for what the runner
    before left in the caches and in the C library: where eager frees its intermediate results, their pages go back to
    the system, and whoever comes next pays for fresh ones, several times the time of a small kernel.
    """
    times: dict[str, list[float]] = {way: [] for way in runners}
    names = list(runners)
    for _ in range(2):
        start = time.perf_counter()
        for run in runners.values():
            run()
        short = time.perf_counter() - start < _SHORT
    burst = _BURST if short else 1
    order = random.Random(0)
    end = time.perf_counter() + seconds
    i = 0
    while i < least or (time.perf_counter() < end and i < most):
        for way in order.sample(names, len(names)):
            for call in range(burst):
                start = clock()
                runners[way]()
                took = clock() - start
                if 2 * call >= burst - 1:
                    times[way].append(took)
        i += 1
    return times


def _first_calls(
    runners: dict[str, Runner], out: dict[str, Any], seconds: float
) -> tuple[dict[str, Runner], dict[str, Any]]:
    """Compile: the runners that work, and what each gave. What fails is written down as ``<way>_failed``."""
    good: dict[str, Runner] = {}
    results: dict[str, Any] = {}
    for way, run in runners.items():
        print(f"first call: {way}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            with limit(seconds):
                results[way] = run()
        except Exception as e:
            out[f"{way}_failed"] = said(e)
            continue
        out[f"{way}_first_s"] = round(time.perf_counter() - start, 3)
        good[way] = run
    return good, results


def _timed(runners: dict[str, Runner], out: dict[str, Any], seconds: float) -> None:
    for way, times in interleaved(runners, seconds).items():
        out |= {f"{way}_{k}": v for k, v in spread(times).items()}
    peers = [out[f"{p}_ms"] for p in ("compile", "freeze") if f"{p}_ms" in out]
    if peers and "tessel_ms" in out:
        out["ratio"] = round(min(peers) / out["tessel_ms"], 4)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN or not."""
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))


def inference(name: str, dtype: torch.dtype, seconds: float, patience: float) -> dict[str, Any]:
    """One call of a case: times of the four ways, bits of two runs, error against float64, products alone."""
    out: dict[str, Any] = {}
    model = name in MODELS
    with torch.no_grad():
        start = load(name, dtype)
        good, results = _first_calls({w: runner(w, start()) for w in WAYS}, out, patience)
        if "tessel" in good:
            again = [tensor_of(good["tessel"]()).clone() for _ in range(2)]
            out["same_bits"] = same_bits(*again)
            out |= errors(name, dtype, {w: results[w] for w in ("tessel", "eager") if w in results})
        del results
        print("timing", file=sys.stderr, flush=True)
        _timed(good, out, seconds)
        if model and "eager" in good:
            print("products", file=sys.stderr, flush=True)
            from cpu_products import products

            case = start()
            out |= products(case.fn, case.args, case.kwargs, min(seconds / 3, 5.0))
    return out


def errors(name: str, dtype: torch.dtype, results: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference from the eager run of the same weights in float64."""
    if dtype is not torch.float32:
        return {}
    exact = load(name, torch.float64)()
    want = tensor_of(exact.fn(*exact.args, **exact.kwargs)).double()
    return {f"{w}_error": float((tensor_of(r).double() - want).abs().max()) for w, r in results.items()}


def training(name: str, dtype: torch.dtype, seconds: float, patience: float) -> dict[str, Any]:
    """Forward and backward of a model in training mode; gradients are dropped before every step."""
    out: dict[str, Any] = {}
    start = load_training(name, dtype)
    model: Any = start().fn

    def step(way: str) -> Runner:
        forward = runner(way, start())

        def run() -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            loss = tensor_of(forward())
            loss.backward()
            return loss.detach()

        return run

    grads: dict[str, list[torch.Tensor]] = {}

    def noted(way: str, run: Runner) -> Runner:
        def first() -> torch.Tensor:
            loss = run()
            grads[way] = [loss.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            return loss

        return first

    steps = {w: step(w) for w in ("tessel", "compile", "eager")}
    good, _ = _first_calls({w: noted(w, run) for w, run in steps.items()}, out, patience)
    if "tessel" in good:
        again = []
        for _ in range(2):
            torch.manual_seed(1)
            good["tessel"]()
            again.append(grads["tessel"])
        out["same_bits"] = all(map(same_bits, *again))
        if dtype is torch.float32 and "dropout" not in name:
            out |= _training_errors(start(), grads)
    grads.clear()
    _timed({w: steps[w] for w in good}, out, seconds)
    return out


def _training_errors(case: Case, grads: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Largest error of a gradient's element, of the largest element of that gradient in float64.

    A gradient that is zero but for rounding (attention's key bias) is measured by a thousandth of the largest of all.
    """
    exact: Any = copy.deepcopy(case.fn).double()
    exact.zero_grad(set_to_none=True)
    tensor_of(exact(**case.kwargs)).backward()
    want = [p.grad for p in exact.parameters() if p.grad is not None]

    least = 1e-3 * max(float(w.abs().max()) for w in want)

    def worst(got: list[torch.Tensor]) -> float:
        return max(float((g - w).abs().max() / w.abs().max().clamp_min(least)) for g, w in zip(got[1:], want))

    return {f"{way}_error": worst(grads[way]) for way in ("tessel", "eager") if way in grads}


def startup(way: str, name: str, dtype: torch.dtype) -> float:
    """Seconds from the wish to compile to the first result; torch is imported and the model built before."""
    with torch.no_grad():
        case = load(name, dtype)()
        begin = time.perf_counter()
        tensor_of(runner(way, case)())
        return time.perf_counter() - begin


def memory(way: str, name: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of one call and bytes held between calls, see ``memory.measure``."""
    from memory import measure

    with torch.no_grad():
        return measure(runner(way, load(name, dtype)()))


def bandwidth(name: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Bytes a second of a memory-bound kernel, beside streams that take turns with it; see ``cpu_streams``.

    Counted are the bytes of the arguments and of the result, each once. The streams are whole passes over the kernel's
    own arguments and an array like its result, timed as the kernel is: "copy" reads the largest argument and writes
    as much, "read" only reads it, and "mix" reads and writes as many large arrays as the kernel, which for a kernel
    that reads one and writes one is the copy. Of each, the way with the highest median counts. "part" is the median
    over the turns of the kernel's rate by the mix's in that turn, "of_copy" by the copy's: what the memory gives may
    change by half within a second, and both see it. Reading alone may be slower than a copy, by bytes a second,
    because a memory channel that waits for requests can write meanwhile. Of a kernel that gathers rows by an index,
    "of_rows" tells how it compares with a copy of the same rows in their order; "part" does not depend on that.
    """
    from cpu_streams import rows, streams

    with torch.no_grad():
        case = load(name, dtype)()
        run = runner("tessel", case)
        out = run()
        large = max(t.nbytes for t in case.args)
        reads = [t for t in case.args if t.nbytes == large]
        like = reads[0]
        writes = out.nbytes == large
        moved = out.nbytes + sum(t.nbytes for t in case.args)
        ways = {"copy": (streams(reads[:1], like), 2 * large), "read": (streams(reads[:1], None), large)}
        if len(reads) > 1:
            ways["mix"] = streams(reads, like if writes else None), (len(reads) + writes) * large
        index = next((t for t in case.args if t.dtype == torch.int64), None)
        if index is not None:
            ways["rows"] = rows(like, index), 2 * large
        calls: dict[tuple[str, str], tuple[Runner, int]] = {("kernel", ""): (run, moved)}
        calls |= {(kind, way): (f, n) for kind, (found, n) in ways.items() for way, f in found.items()}
        del out
        rates = _rates(calls, seconds)
    best: dict[str, tuple[float, float, str]] = {}
    for (kind, way), found in rates.items():
        low, mid, high = statistics.quantiles(found, n=4)
        best[kind] = max(best.get(kind, (0.0, 0.0, "")), (mid, (high - low) / mid, way))
    row: dict[str, Any] = {"bytes": moved, "runs": len(rates["kernel", ""])}
    for kind, (mid, spread_, way) in best.items():
        row |= {f"{kind}_gb_s": round(mid, 2), f"{kind}_iqr": round(spread_, 4)} | ({f"{kind}_way": way} if way else {})
    mix = "mix" if "mix" in best else "copy" if writes else "read"
    for key, kind in (("part", mix), ("of_copy", "copy"), *([("of_rows", "rows")] if "rows" in best else [])):
        turns = zip(rates["kernel", ""], rates[kind, best[kind][2]], strict=True)
        row[key] = round(statistics.median(a / b for a, b in turns), 4)
    return row | {f"mix_{x}": row[f"{mix}_{x}"] for x in ("gb_s", "iqr", "way")}


def _rates(calls: dict[tuple[str, str], tuple[Runner, int]], seconds: float) -> dict[tuple[str, str], list[float]]:
    """GB/s of every call, which moves that many bytes: turns in random order, the second of two calls counts."""
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    order, keys = random.Random(0), list(calls)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates[keys[0]]) < 25:
        for key in order.sample(keys, len(keys)):
            run, moved = calls[key]
            run()
            start = time.perf_counter()
            run()
            rates[key].append(moved / (time.perf_counter() - start) / 1e9)
    return rates


def quiet() -> None:
    """Warnings of other packages are no part of a result."""
    warnings.filterwarnings("ignore")
