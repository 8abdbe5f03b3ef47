"""Compile a small model with Tessel and see what became of it. Needs no GPU and no download.

    python examples/quickstart.py

The generated Triton kernels run through Triton's interpreter here (target="triton-interpret"): slow, and
exactly the code that a GPU would run.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import nn

import tessel

warnings.filterwarnings("ignore", category=FutureWarning)


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


def build() -> tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]:
    """What to compile: its name, the module, and the arguments of one call."""
    torch.manual_seed(0)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return "a transformer block, width 64", Block().eval(), (torch.randn(2, 16, 64),), {}
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    return "Llama, 2 layers, width 64", model, (), {"input_ids": torch.randint(0, 256, (2, 16))}


def tensor_of(result: Any) -> torch.Tensor:
    """The model's main result."""
    return result["logits"] if isinstance(result, Mapping) else result


def main() -> None:
    name, model, args, kwargs = build()
    parameters = sum(p.numel() for p in model.parameters())
    kernels = os.environ.get("TESSEL_DUMP") or tempfile.mkdtemp(prefix="tessel-quickstart-")
    fast = tessel.compile(model, target="triton-interpret", options={"dump_dir": kernels})

    start = time.perf_counter()
    with torch.no_grad():
        got, want = tensor_of(fast(*args, **kwargs)), tensor_of(model(*args, **kwargs))
    seconds = time.perf_counter() - start
    report = tessel.explain(fast)
    graph = report.compilations[0]
    fallbacks = ", ".join(sorted({f"{f.operator} ({f.reason})" for f in report.fallbacks})) or "none"

    print(f"model             {name}: {parameters:,} parameters, torch {torch.__version__}")
    print(f"nodes captured    {graph.captured}")
    print(f"kernels           {len(graph.kernels)} after fusion, launched {graph.launches} times a call")
    print(f"library calls     {len(graph.calls)}")
    print(f"fallbacks         {fallbacks}")
    print(f"bytes moved       {graph.bytes_before:,} without fusion, {graph.bytes_after:,} with it")
    print(f"max error         {(got - want).abs().max().item():.2e} against eager, in float32")
    print(f"compile and run   {seconds:.1f} s")
    print(f"kernels lie in    {kernels}")
    print(f"host program      {graph.host_file}")
    widest = max(graph.groups, key=lambda g: g.saved_bytes)
    source = next(k for k in graph.kernels if k.name == widest.kernel)
    print(f"\nThe kernel that saves most, {widest.kernel}: {', '.join(widest.operators)}\n")
    print(source.source)


if __name__ == "__main__":
    main()
