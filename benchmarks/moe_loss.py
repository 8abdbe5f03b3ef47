"""Experts and losses on the CPU: Tessel, torch.compile and eager in turns, medians; peak memory of the losses.

    python benchmarks/moe_loss.py [--only NAMES] [--dtype float32] [--seconds S] [--threads N]

A loss is ``cross_entropy(linear(h, W).float(), target)`` with a vocabulary of 32,000 as transformers' models for
causal language write it; a layer of experts is Mixtral's (router, 8 experts, 2 a token) with transformers' "grouped_mm"
implementation. "training" is a forward and a backward, gradients of hidden states and weights. "ratio" is
torch.compile's median over Tessel's.

Memory is what a call adds to the resident memory of the process at its peak, in a process of its own a way. It counts
the results: of a training step the gradient of the weights, which is written down beside it ("results").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, table, write_result
from cpu_measure import interleaved, quiet, spread
from memory import resident

F = torch.nn.functional
WAYS = ("tessel", "compile", "eager")


class Loss(torch.nn.Module):
    """The head of a language model and its loss."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, h: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(h).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), target, ignore_index=-100)


class Experts(torch.nn.Module):
    """Mixtral's layer of experts, random weights."""

    def __init__(self, hidden: int, inner: int, experts: int) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
        config._experts_implementation = "grouped_mm"
        self.config = config
        self.block = MixtralSparseMoeBlock(config)
        for p in self.parameters():
            torch.nn.init.normal_(p, std=hidden**-0.5)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block(h)


@dataclass(frozen=True)
class Case:
    """What is measured: a maker of (module, inputs) in a dtype, and whether gradients are asked for."""

    make: Callable[[torch.dtype], tuple[torch.nn.Module, list[torch.Tensor]]]
    training: bool = False


def _loss(tokens: int, hidden: int = 768, vocabulary: int = 32000) -> Any:
    def make(dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
        target = torch.randint(0, vocabulary, (tokens,))
        target[::7] = -100
        return Loss(hidden, vocabulary).to(dtype), [torch.randn(tokens, hidden).to(dtype), target]

    return make


def _experts(tokens: int, hidden: int = 768, inner: int = 2048, experts: int = 8) -> Any:
    def make(dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
        return Experts(hidden, inner, experts).to(dtype), [torch.randn(1, tokens, hidden).to(dtype)]

    return make


CASES: dict[str, Case] = {
    "loss, 1024 tokens": Case(_loss(1024)),
    "loss, 1024 tokens, training": Case(_loss(1024), True),
    "loss, 4096 tokens, training": Case(_loss(4096), True),
    "experts, 1 token": Case(_experts(1)),
    "experts, 128 tokens": Case(_experts(128)),
    "experts, 512 tokens": Case(_experts(512)),
    "experts, 512 tokens, training": Case(_experts(512), True),
}


def runner(way: str, case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    """A call of one way; inputs and weights are the same for all."""
    torch.manual_seed(0)
    module, ins = case.make(dtype)
    module.eval()
    if case.training:
        ins[0].requires_grad_()
    fn: Callable[..., Any] = module
    if way == "tessel":
        import tessel

        fn = tessel.compile(module, target="cpu")
    elif way == "compile":
        fn = torch.compile(module)

    def infer() -> Any:
        with torch.no_grad():
            return fn(*ins)

    def train() -> Any:
        out = fn(*ins)
        loss = out if out.dim() == 0 else out.float().square().mean()
        loss.backward()
        for p in (ins[0], *module.parameters()):
            p.grad = None  # so that the next call's memory counts its own
        return loss

    return train if case.training else infer


def measure(name: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """One case: milliseconds of the three ways, their ratios, the largest difference from float64."""
    torch._dynamo.reset()
    case = CASES[name]
    runners = {way: runner(way, case, dtype) for way in WAYS}
    results = {way: run().detach().double() for way, run in runners.items()}
    torch.manual_seed(0)
    module, ins = case.make(dtype)
    if isinstance(module, Experts):
        module.config._experts_implementation = "eager"  # the other one has no float64
    with torch.no_grad():
        want = module.double()(*(t.double() if t.is_floating_point() else t for t in ins))
        want = want.square().mean() if case.training and want.dim() else want
    del module, ins
    out: dict[str, Any] = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
    for way, found in interleaved(runners, seconds, least=5).items():
        out |= {f"{way}_{k}": v for k, v in spread(found).items()}
        out[f"{way}_error"] = float((results[way] - want).abs().max())
    out["ratio"] = round(out["compile_ms"] / out["tessel_ms"], 3)
    return out


def peak(name: str, dtype: torch.dtype, way: str) -> int:
    """Bytes of a call at its peak, in this process."""
    case = CASES[name]
    run = runner(way, case, dtype)
    for _ in range(2):
        run()
    return max(resident(run) for _ in range(3))


def memory(name: str, dtype: str) -> dict[str, Any]:
    """Peaks of the three ways, each in a process of its own, and eager's over Tessel's."""
    out: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--peak", way, "--only", name, "--dtype", dtype]
        got = subprocess.run(command, capture_output=True, text=True, check=True)
        out[f"{way}_peak"] = int(got.stdout.split()[-1])
    out["memory_ratio"] = round(out["eager_peak"] / max(out["tessel_peak"], 1), 2)
    if CASES[name].training:
        module, ins = CASES[name].make(getattr(torch, dtype))
        out["results"] = sum(t.numel() * t.element_size() for t in (ins[0], *module.parameters()))
    return out


def row(r: dict[str, Any]) -> list[str]:
    times = [f"{r[f'{w}_ms']:.3g} ±{r[f'{w}_iqr'] / 2:.0%}" for w in WAYS]
    peaks = " ".join(f"{r[f'{w}_peak'] / 2**20:.0f}" for w in WAYS) if "eager_peak" in r else ""
    less = f"1/{r['memory_ratio']:.1f}" if peaks else ""
    errors = f"{r['tessel_error']:.1e}, {r['eager_error']:.1e}"
    return [f"{r['case']} {r['dtype']}", *times, f"{r['ratio']:.2f}", errors, peaks, less]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of cases, with ; between them")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=WAYS, help="only print the bytes of one way's peak (the case is --only)")
    parser.add_argument("--out", type=Path, help="where the figures go; results/moe_loss-<date>.json if all are run")
    given = parser.parse_args(arguments)
    quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(given.only, getattr(torch, given.dtype[0]), given.peak))
        return
    rows = []
    head = ["case", *(f"{w} ms" for w in WAYS), "ratio", "error, eager's", "MiB at the peak", "of eager's"]
    for dtype in given.dtype:
        for name in CASES:
            if name in given.only.split(";") or not given.only:
                rows.append(measure(name, getattr(torch, dtype), given.seconds))
                if name.startswith("loss"):
                    rows[-1] |= memory(name, dtype)
                print(" | ".join(row(rows[-1])), flush=True)
    print(f"\n{table(head, map(row, rows))}")
    result = {"threads": given.threads, "cases": rows}
    if given.out:
        given.out.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n", encoding="utf-8")
    elif not given.only and len(given.dtype) == 2:
        print(write_result("moe_loss", result))


if __name__ == "__main__":
    main()
