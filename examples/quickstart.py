"""Compile a model with Tessel for this machine's CPU, beside eager and torch.compile. Needs no GPU and no download.

    python examples/quickstart.py

Two sections: C++ kernels on the CPU (target="cpu"), with the times of all three; then a smaller model whose Triton
kernels run through Triton's interpreter (target="triton-interpret"): slow, and exactly the code that a GPU would run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Empty caches, so that the compile times of both compilers are those of a first use.
os.environ["TESSEL_CACHE_DIR"] = tempfile.mkdtemp(prefix="tessel-quickstart-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torch-compile-quickstart-")

import torch
from torch import nn

import tessel
from tessel.config import cxx
from tessel.runtime.native import find_compiler

warnings.filterwarnings("ignore", category=FutureWarning)
Call = Callable[[], Any]


class Block(nn.Module):
    """One pre-norm transformer block, for when transformers is not installed."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def build(width: int, layers: int, batch: int, tokens: int) -> tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]:
    """What to compile: its name, the module, and the arguments of one call."""
    torch.manual_seed(0)
    size = f"{layers} layers, width {width}, input {batch}x{tokens}"
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        return f"transformer blocks, {size}", blocks.eval(), (torch.randn(batch, tokens, width),), {}
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 4),
        num_key_value_heads=max(width // 128, 2),
        vocab_size=4 * width,
        max_position_embeddings=tokens,
    )
    model = LlamaForCausalLM(config).eval()
    return f"Llama, {size}", model, (), {"input_ids": torch.randint(0, 4 * width, (batch, tokens))}


def tensor_of(result: Any) -> torch.Tensor:
    """The model's main result."""
    return result["logits"] if isinstance(result, Mapping) else result


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def show(name: str, model: nn.Module, fast: Any, error: float) -> str:
    """Print what became of a model; the source of the kernel that saves most memory traffic."""
    report = tessel.explain(fast)
    graph = report.compilations[0]
    parameters = sum(p.numel() for p in model.parameters())
    fallbacks = ", ".join(sorted({f"{f.operator} ({f.reason})" for f in report.fallbacks})) or "none"
    print(f"model             {name}: {parameters:,} parameters, torch {torch.__version__}")
    print(f"nodes captured    {graph.captured}")
    print(f"kernels           {len(graph.kernels)} after fusion, launched {graph.launches} times a call")
    print(f"library calls     {len(graph.calls)}")
    print(f"fallbacks         {fallbacks}")
    print(f"bytes moved       {graph.bytes_before:,} without fusion, {graph.bytes_after:,} with it")
    print(f"max error         {error:.2e} against eager, in float32")
    print(f"kernels lie in    {os.path.dirname(str(graph.host_file))}")
    print(f"host program      {graph.host_file}")
    sources = {k.name: k.source for k in graph.kernels}
    groups = [g for g in graph.groups if g.kernel in sources]
    if not groups:
        return ""
    widest = max(groups, key=lambda g: g.saved_bytes)
    return f"The kernel that saves most, {widest.kernel}: {', '.join(widest.operators)}\n\n{sources[widest.kernel]}"


def on_the_cpu() -> str:
    """Eager, torch.compile and Tessel side by side; the source of one C++ kernel."""
    name, model, args, kwargs = build(width=512, layers=2, batch=2, tokens=128)
    try:
        print(f"C++ compiler      {find_compiler(cxx()).version.splitlines()[0]}")
    except tessel.TesselError as e:
        print(f"C++ compiler      none: torch runs every operator by itself, no kernel is generated. {e}")
    fast, peer = tessel.compile(model, target="cpu"), torch.compile(model)
    # Tessel goes first and so pays for what both import.
    calls: dict[str, Call] = {
        'Tessel, target="cpu"': lambda: fast(*args, **kwargs),
        "torch.compile": lambda: peer(*args, **kwargs),
        "eager": lambda: model(*args, **kwargs),
    }
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    for way in list(calls):
        try:
            first[way] = seconds(calls[way])
        except Exception as e:
            if way != "torch.compile":  # which raises without a compiler
                raise
            failed[way] = " ".join(str(e).split())[:100]
            del calls[way]
    error = (tensor_of(fast(*args, **kwargs)) - tensor_of(model(*args, **kwargs))).abs().max().item()
    source = show(name, model, fast, error)

    times: dict[str, list[float]] = {way: [] for way in calls}
    end = time.perf_counter() + 10  # a busy machine gets fewer rounds
    while len(times["eager"]) < 20 and (len(times["eager"]) < 3 or time.perf_counter() < end):
        for way, call in calls.items():
            times[way].append(seconds(call))
    print(f"\n{'':22}first call, compile time and all    a call (median, taking turns)")
    for way in reversed(list(first)):
        print(f"{way:22}{first[way]:10.2f} s {statistics.median(times[way]) * 1e3:34.2f} ms")
    for way, words in failed.items():
        print(f"{way:22}failed: {words}")
    return source


def through_the_interpreter() -> str:
    """A small model's Triton kernels, run without a GPU; the source of one."""
    name, model, args, kwargs = build(width=64, layers=2, batch=2, tokens=16)
    fast = tessel.compile(model, target="triton-interpret")
    took = seconds(lambda: fast(*args, **kwargs))
    error = (tensor_of(fast(*args, **kwargs)) - tensor_of(model(*args, **kwargs))).abs().max().item()
    source = show(name, model, fast, error)
    print(f"compile and run   {took:.1f} s, kernels interpreted")
    return source


def main() -> None:
    with torch.no_grad():
        print("== C++ kernels on this machine's CPU\n")
        native = on_the_cpu()
        torch._dynamo.reset()  # the same code with other sizes would be compiled for every size
        print("\n== Triton kernels, through the interpreter\n")
        triton = through_the_interpreter()
    print(f"\n== C++\n\n{native}\n\n== Triton\n\n{triton}")
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


if __name__ == "__main__":
    main()
