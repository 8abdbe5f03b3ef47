"""Attention, scans, losses and experts on the CPU: Tessel, torch.compile and eager in turns, medians; peaks of memory.

    python benchmarks/algebra.py [--only NAMES] [--dtype float32] [--seconds S] [--threads N]

* Attention is torch's ``scaled_dot_product_attention``, whose CPU kernel eager and torch.compile both call; q, k and v
  lie [batch, length, heads, width] as projections leave them, a cache [batch, heads, length, width].
* "Mamba" is one layer of transformers' model without its optional kernels: a loop over 2048 tokens.
* A loss is ``cross_entropy(linear(h, W).float(), target)`` with a vocabulary of 32,000 as transformers' models for
  causal language write it; one target in seven is ignored where the name does not say that all count.
* A layer of experts is Mixtral's (router, 8 experts, 2 a token) with transformers' "grouped_mm".

"training" is a forward and a backward, gradients of what goes in and of the weights. "ratio" is torch.compile's median
over Tessel's, "eager" eager's. A way whose first call takes longer than --patience is left out, and named.

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
from cpu_measure import interleaved, limit, quiet, said, spread
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


class Attention(torch.nn.Module):
    """Torch's operator, causal or not, keys and values shared by groups of heads or not."""

    def __init__(self, causal: bool, shared: bool) -> None:
        super().__init__()
        self.causal, self.shared = causal, shared

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.shared)


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        make: (module, inputs) in a dtype.
        training: gradients are asked for, of floating inputs and weights.
        memory: peaks are measured too.
        dtypes: those it is measured in.
    """

    make: Callable[[torch.dtype], tuple[torch.nn.Module, list[torch.Tensor]]]
    training: bool = False
    memory: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def _attention(heads: int, kept: int, queries: int, keys: int, width: int, causal: bool) -> Any:
    def make(dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
        sizes = ((queries, heads), (keys, kept), (keys, kept))
        ins = [torch.randn(1, n, h, width).to(dtype).transpose(1, 2) for n, h in sizes]
        if queries == 1:
            ins[1:] = [t.contiguous() for t in ins[1:]]
        return Attention(causal, heads != kept), ins

    return make


def _mamba(tokens: int, hidden: int = 768) -> Any:
    def make(dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        config = MambaConfig(hidden_size=hidden, num_hidden_layers=1, use_cache=False)
        return MambaMixer(config, layer_idx=0).to(dtype), [torch.randn(1, tokens, hidden).to(dtype)]

    return make


def _loss(tokens: int, hidden: int = 768, vocabulary: int = 32000, ignored: bool = True) -> Any:
    def make(dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
        target = torch.randint(0, vocabulary, (tokens,))
        if ignored:
            target[::7] = -100
        return Loss(hidden, vocabulary).to(dtype), [torch.randn(tokens, hidden).to(dtype), target]

    return make


def _experts(tokens: int, hidden: int = 768, inner: int = 2048, experts: int = 8) -> Any:
    def make(dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
        return Experts(hidden, inner, experts).to(dtype), [torch.randn(1, tokens, hidden).to(dtype)]

    return make


CASES: dict[str, Case] = {
    "attention, causal 1x16x2048x64": Case(_attention(16, 16, 2048, 2048, 64, True)),
    "attention, causal 1x16x2048x64, training": Case(_attention(16, 16, 2048, 2048, 64, True), True),
    "attention, 1 token, 32 heads on 8, cache 4096x128": Case(_attention(32, 8, 1, 4096, 128, False)),
    "Mamba layer, 1x2048": Case(_mamba(2048), dtypes=("float32",)),
    "loss, 1024 tokens": Case(_loss(1024), memory=True),
    "loss, 1024 tokens, all count, training": Case(_loss(1024, ignored=False), True),
    "loss, 4096 tokens, training": Case(_loss(4096), True, memory=True),
    "experts, 1 token": Case(_experts(1)),
    "experts, 512 tokens": Case(_experts(512)),
    "experts, 512 tokens, training": Case(_experts(512), True),
}


def runner(way: str, case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    """A call of one way; inputs and weights are the same for all."""
    torch.manual_seed(0)
    module, ins = case.make(dtype)
    module.eval()
    for t in ins:
        t.requires_grad_(case.training and t.is_floating_point())
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
        for p in (*ins, *module.parameters()):
            p.grad = None  # so that the next call's memory counts its own
        return loss

    return train if case.training else infer


def measure(name: str, dtype: torch.dtype, seconds: float, patience: float) -> dict[str, Any]:
    """One case: milliseconds of the three ways, their ratios, the largest difference from float64."""
    torch._dynamo.reset()
    case = CASES[name]
    out: dict[str, Any] = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
    runners, results = {}, {}
    for way in WAYS:
        run = runner(way, case, dtype)
        try:
            with limit(patience):
                results[way] = run().detach().double()
        except Exception as e:  # one way that fails is a result; the others are still measured
            out[f"{way}_failed"] = said(e)
            continue
        runners[way] = run
    torch.manual_seed(0)
    module, ins = case.make(dtype)
    if isinstance(module, Experts):
        module.config._experts_implementation = "eager"  # the other one has no float64
    with torch.no_grad():
        want = module.double()(*(t.double() if t.is_floating_point() else t for t in ins))
        want = want.square().mean() if case.training and want.dim() else want
    del module, ins
    for way, found in interleaved(runners, seconds, least=5).items():
        out |= {f"{way}_{k}": v for k, v in spread(found).items()}
        out[f"{way}_error"] = float((results[way] - want).abs().max())
    for peer, key in (("compile", "ratio"), ("eager", "eager_ratio")):
        if peer in runners and "tessel" in runners:
            out[key] = round(out[f"{peer}_ms"] / out["tessel_ms"], 3)
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
    times = [f"{r[f'{w}_ms']:.3g} ±{r[f'{w}_iqr'] / 2:.0%}" if f"{w}_ms" in r else "failed" for w in WAYS]
    ratios = [f"{r[k]:.2f}" if k in r else "" for k in ("ratio", "eager_ratio")]
    peaks = " ".join(f"{r[f'{w}_peak'] / 2**20:.0f}" for w in WAYS) if "eager_peak" in r else ""
    less = f"1/{r['memory_ratio']:.1f}" if peaks else ""
    errors = ", ".join(f"{r[f'{w}_error']:.1e}" for w in ("tessel", "eager") if f"{w}_error" in r)
    return [f"{r['case']} {r['dtype']}", *times, *ratios, errors, peaks, less]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of cases, with ; between them")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, a case")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for a first call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=WAYS, help="only print the bytes of one way's peak (the case is --only)")
    parser.add_argument("--out", type=Path, help="where the figures go; results/algebra-<date>.json if all are run")
    given = parser.parse_args(arguments)
    quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(given.only, getattr(torch, given.dtype[0]), given.peak))
        return
    rows = []
    head = ["case", *(f"{w} ms" for w in WAYS), "ratio", "eager", "error, eager's", "MiB at the peak", "of eager's"]
    for dtype in given.dtype:
        for name in CASES:
            case = CASES[name]
            if (name in given.only.split(";") or not given.only) and dtype in case.dtypes:
                rows.append(measure(name, getattr(torch, dtype), given.seconds, given.patience))
                if case.memory and dtype == "float32":
                    rows[-1] |= memory(name, dtype)
                print(" | ".join(row(rows[-1])), flush=True)
    print(f"\n{table(head, map(row, rows))}")
    failed = [f"{r['case']} {r['dtype']}, {w}: {r[f'{w}_failed']}" for r in rows for w in WAYS if f"{w}_failed" in r]
    print("".join(f"\n{line}" for line in failed))
    result = {"threads": given.threads, "cases": rows}
    if given.out:
        given.out.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n", encoding="utf-8")
    elif not given.only and len(given.dtype) == 2:
        print(write_result("algebra", result))


if __name__ == "__main__":
    main()
