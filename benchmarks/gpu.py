"""``make gpu``: real models on the GPU of this machine: checked, then timed against eager and torch.compile.

    python benchmarks/gpu.py [MODEL ...] [--quick]

Every case runs eager, torch.compile and Tessel on the same weights and inputs. Checked against a float64 run of
eager, per tensor: Tessel's relative L2 error is at most 3 times eager's own or 2e-6 (fp32), at most twice eager's
or 1e-3 (bf16). Times are of one call, by CUDA events; the three take turns, so that clocks and heat hit all alike.
A training step is forward, loss, backward and, for the check, every gradient.

Writes ``benchmarks/results/<device>-<date>.json``. Exit status: 0 all right, 1 a case failed, 2 no GPU here.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from common import MODELS, Size, build, spread, table, write_result

SIZE = Size(layers=4, hidden=1024, heads=16, batch=4, seq=512, vocab=8192, image=224)
QUICK = Size(layers=1, hidden=256, heads=8, batch=2, seq=128, vocab=1024, image=64)
NAMES = ("Llama", "BERT", "ViT", "GPT-2", "Mixtral")
TRAINED = ("Llama", "BERT", "GPT-2", "ViT")
WAYS = ("eager", "torch.compile", "tessel")
LIMITS = {torch.float32: (3.0, 2e-6), torch.bfloat16: (2.0, 1e-3)}
Step = Callable[[torch.nn.Module, dict[str, Any]], list[torch.Tensor]]


def infer(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**inputs).logits]


def train(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Loss and gradients. The loss is a mean of squares, which every model has."""
    loss = model(**inputs).logits.float().square().mean()
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def prepared(name: str, size: Size, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Any]]:
    model, inputs = build(name, size)
    model = model.to("cuda", dtype)
    return model, {k: v.cuda().to(dtype) if v.is_floating_point() else v.cuda() for k, v in inputs.items()}


def oracle(model: torch.nn.Module, inputs: dict[str, Any], step: Step) -> list[torch.Tensor]:
    """The same in float64, from the very same rounded weights."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):  # grouped products take no float64
        wide.set_experts_implementation("eager")  # type: ignore[operator]
    got = step(wide, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    return [t.double() for t in got]


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    """Relative L2 error of each tensor.

    Some gradients are zero but for rounding (the bias of attention's keys): what counts as a tensor's size is at
    least a hundredth of the root mean square of all gradients.
    """
    if len(got) != len(want):
        raise AssertionError(f"{len(got)} tensors instead of {len(want)}")
    squares, count = sum(float(w.square().sum()) for w in want[1:]), sum(w.numel() for w in want[1:])
    least = 0.01 * math.sqrt(squares / count) if count else 0.0
    sizes = [max(float(w.norm()), least * math.sqrt(w.numel()), 1e-300) for w in want]
    return [float((g.double() - w).norm()) / s for g, w, s in zip(got, want, sizes)]


def compiled(way: str, model: torch.nn.Module) -> Any:
    import tessel

    if way == "torch.compile":
        return torch.compile(model, dynamic=False)
    return tessel.compile(model, dynamic=False) if way == "tessel" else model


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call, in turns; each figure is the mean of as many calls as fill about 20 ms."""
    many = {}
    for way, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        many[way] = max(1, int(0.02 / max(time.perf_counter() - start, 1e-5)))
    out: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(many[way]):
                call()
            end.record()
            torch.cuda.synchronize()
            out[way].append(start.elapsed_time(end) / many[way])
    return out


def case(name: str, dtype: torch.dtype, kind: str, size: Size, rounds: int) -> dict[str, Any]:
    """One model, type and kind: errors, seconds to the first result, times."""
    step: Step = train if kind == "training" else infer
    model, inputs = prepared(name, size, dtype)
    want = oracle(model, inputs, step)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    torch._dynamo.reset()
    for way in WAYS:
        fn = compiled(way, model)
        start = time.perf_counter()
        try:
            got = step(fn, inputs)
            torch.cuda.synchronize()
        except Exception as e:
            if way == "eager":
                raise
            failed[way] = f"{type(e).__name__}: {str(e)[:500]}"
            continue
        first[way] = time.perf_counter() - start
        errors[way] = error(got, want)
        calls[way] = lambda fn=fn: step(fn, inputs)  # type: ignore[misc]
    times = timed(calls, rounds)
    factor, floor = LIMITS[dtype]
    wrong = [
        f"tensor {i}: error {t:.2e}, eager's is {e:.2e}"
        for i, (e, t) in enumerate(zip(errors["eager"], errors.get("tessel", ())))
        if not t <= max(factor * e, floor)
    ]
    if "tessel" in failed:
        wrong.append(failed["tessel"])
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "kind": kind,
        "right": not wrong,
        "wrong": wrong[:5],
        "failed": failed,
        "largest error": {way: max(e) for way, e in errors.items()},
        "seconds to the first result": {way: round(s, 2) for way, s in first.items()},
        "ms": {way: spread(t) for way, t in times.items()},
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], way: str) -> str:
        t = row["ms"].get(way)
        return f"{t['median']:.3f} ({t['min']:.3f} – {t['max']:.3f})" if t else "failed"

    def line(row: dict[str, Any]) -> list[str]:
        e = row["largest error"]
        shown = f"{e['tessel']:.1e} (eager {e['eager']:.1e})" if "tessel" in e else "–"
        name = f"{row['model']} {row['dtype']} {row['kind']}"
        return [name, *(cell(row, way) for way in WAYS), shown, "right" if row["right"] else "WRONG"]

    return table(["ms: median (least – most)", *WAYS, "largest error", "checked"], map(line, rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=NAMES, help=", ".join(MODELS))
    parser.add_argument("--quick", action="store_true", help="small models, few repetitions: the check more than times")
    parser.add_argument("--rounds", type=int, help="measurements of each")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here; nothing was run or measured", file=sys.stderr)
        return 2
    size, rounds = (QUICK, given.rounds or 3) if given.quick else (SIZE, given.rounds or 9)
    # Llama and its like compare products of fp32: no compiler may use TF32 while another does not.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows, broken = [], []
    for name in given.models:
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("inference", "training") if name in TRAINED else ("inference",):
                what = f"{name} {dtype} {kind}"
                try:
                    rows.append(case(name, dtype, kind, size, rounds))
                except Exception:
                    broken.append(what)
                    print(f"{what}: not measured\n{traceback.format_exc()}", file=sys.stderr)
                    continue
                for line in rows[-1]["wrong"]:
                    print(f"{what}: {line}", file=sys.stderr)
                torch.cuda.empty_cache()
    device = torch.cuda.get_device_name(0).replace(" ", "-")
    print(as_table(rows))
    data = {"size": vars(size), "rounds": rounds, "cases": rows, "not measured": broken}
    print(f"written: benchmarks/results/{write_result(device, data).name}")
    return 1 if broken or not all(r["right"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
