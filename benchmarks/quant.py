"""Quantized layers on the CPU: a Llama layer 8192 wide, one token at a time and many at once, in one run.

    python benchmarks/quant.py [--hidden 8192] [--tokens 512] [--seconds 20]

Decoding: bfloat16 by torch.compile (default and freezing, the better counts) and by Tessel; w8a16 and w4a16 (groups of
128), formats of 4 and 8 bits that are no integers, and 2:4 by Tessel; w8a16 and w4a16 also by the packed products that
torch itself has for this CPU (those that torchao's layers call) under torch.compile. Prefill (``tokens``): bfloat16 as
above, w8a8 and w4a8 by Tessel. Every way runs the same model; results are compared with the quantized model's in eager
mode, which for rounded inputs is right up to the few that lie between two codes.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from common import table, write_result
from cpu_measure import interleaved, spread
from torch import Tensor, nn

import tessel
from tessel.quant.linear import QuantLinear, unpack


class Int8(nn.Module):
    """torch's product with int8 weights, a scale a row."""

    def __init__(self, q: QuantLinear) -> None:
        super().__init__()
        self.register_buffer("codes", (unpack(q.words, 8, q.in_features) - 128).to(torch.int8))
        self.register_buffer("scale", q.scale[:, 0].to(q.dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch._weight_int8pack_mm(rows, self.codes, self.scale).reshape(*x.shape[:-1], -1)


class Int4(nn.Module):
    """torch's product with int4 weights, a scale and a zero a group."""

    def __init__(self, q: QuantLinear) -> None:
        super().__init__()
        codes = unpack(q.words, 4, q.in_features).to(torch.int32)
        self.group = q.in_features // q.scale.shape[1]
        self.register_buffer("codes", torch._convert_weight_to_int4pack_for_cpu(codes, 2))
        scales = torch.stack((q.scale, torch.zeros_like(q.scale)), -1).transpose(0, 1)
        self.register_buffer("scales", scales.to(torch.bfloat16).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.scales)
        return out.reshape(*x.shape[:-1], -1)


def by_torch(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The quantized model with torch's products."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, QuantLinear):
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, kind(module))
    return made


def layer(hidden: int) -> nn.Module:
    """One Llama layer in bfloat16."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 1024,
    )
    return LlamaModel(config).to(torch.bfloat16).eval()


def measured(model: nn.Module, schemes: list[str], tokens: int, seconds: float) -> dict[str, dict[str, Any]]:
    """A row a way, for inputs of so many tokens."""
    inputs: dict[str, Any] = {"input_ids": torch.arange(3, 3 + tokens)[None] % 256, "use_cache": False}
    torch._dynamo.reset()
    whole = {
        "bf16, torch.compile": torch.compile(model),
        "bf16, torch.compile, freezing": torch.compile(model, options={"freezing": True}),
        "bf16, Tessel": tessel.compile(model, target="cpu"),
    }
    ways: dict[str, tuple[nn.Module, Any]] = {name: (model, fn) for name, fn in whole.items()}
    for scheme in schemes:
        small = tessel.quantize(model, scheme)
        ways[f"{scheme}, Tessel"] = small, tessel.compile(small, target="cpu")
        if scheme in _BY_TORCH:
            ways[f"{scheme}, torch's product"] = small, torch.compile(by_torch(small, _BY_TORCH[scheme]))
    rows: dict[str, Any] = {}
    with torch.no_grad():
        for name, (own, fn) in ways.items():
            want, got = own(**inputs)[0].float(), fn(**inputs)[0].float()
            rows[name] = {"error": round(float((got - want).abs().max() / want.abs().max()), 5)}
        times = interleaved({n: lambda fn=fn: fn(**inputs) for n, (_, fn) in ways.items()}, seconds)
    for name, taken in times.items():
        rows[name] |= spread(taken)
    base = min(rows[n]["ms"] for n in list(whole)[:2])
    for row in rows.values():
        row["times"] = round(base / row["ms"], 3)
    return rows


_BY_TORCH = {"w8a16": Int8, "w4a16": Int4}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512, help="of a prefill; 0: decoding alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two")
    parser.add_argument("--decode", nargs="*", default=["w8a16", "w4a16", "nf4", "mxfp4a16", "2:4"], help="schemes")
    parser.add_argument("--prefill", nargs="*", default=["w8a8", "w4a8"], help="schemes")
    given = parser.parse_args(argv)
    model = layer(given.hidden)
    found: dict[str, Any] = {"hidden": given.hidden, "tokens": given.tokens}
    parts = [("rows", given.decode, 1)] + [("prefill", given.prefill, given.tokens)] * (given.tokens > 0)
    for part, schemes, tokens in parts:
        if not schemes:
            continue
        rows = found[part] = measured(model, schemes, tokens, given.seconds)
        body = [
            [n, f"{r['ms']:.2f}", f"{r['iqr']:.0%}", f"{r['times']:.2f}", f"{r['error']:.4f}"] for n, r in rows.items()
        ]
        what = "one token" if tokens == 1 else f"{tokens} tokens"
        print(table([what, "ms", "spread", "times bf16 torch.compile", "error"], body))
    print(write_result("quant", found))


if __name__ == "__main__":
    main()
