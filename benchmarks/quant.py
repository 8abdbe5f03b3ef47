"""Quantized layers on the CPU: a Llama layer 8192 wide, one token at a time and many at once, in one run.

    python benchmarks/quant.py [--hidden 8192] [--tokens 512] [--seconds 20]

Bfloat16 by torch.compile (default and freezing, the better counts) and by Tessel; then schemes by Tessel: integers of
8, 4 and 3 bits (below 8 in groups of 128), tables (nf4), small floats (mxfp4), and 2:4; inputs too (w8a8, w4a8).
Decoding w8a16 and w4a16 also by the packed products that torch itself has for this CPU (those that torchao's layers
call) under torch.compile. Results are compared with the quantized model's in eager mode, which for rounded inputs is
right up to the few that lie between two codes. What it takes to quantize is in the result too, in seconds.
"""

from __future__ import annotations

import argparse
import copy
import time
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
        self.register_buffer("codes", (unpack(q.words, 8, q.in_features, torch.uint8) ^ 128).view(torch.int8))  # - 128
        self.register_buffer("scale", q.scale[:, 0].to(q.dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch._weight_int8pack_mm(rows, self.codes, self.scale).reshape(*x.shape[:-1], -1)


class Int4(nn.Module):
    """torch's product with int4 weights, a scale and a zero a group."""

    def __init__(self, q: QuantLinear) -> None:
        super().__init__()
        codes = unpack(q.words, 4, q.in_features, torch.int32)
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


def quantized(model: nn.Module, schemes: set[str]) -> dict[str, tuple[nn.Module, float]]:
    """The model in each scheme, and the seconds that it took."""
    made = {}
    for scheme in sorted(schemes):
        start = time.perf_counter()
        made[scheme] = tessel.quantize(model, scheme), time.perf_counter() - start
    return made


def measured(model: nn.Module, small: dict[str, nn.Module], tokens: int, seconds: float) -> dict[str, dict[str, Any]]:
    """A row a way, for inputs of so many tokens; ``small``: the model by scheme."""
    inputs: dict[str, Any] = {"input_ids": torch.arange(3, 3 + tokens)[None] % 256, "use_cache": False}
    torch._dynamo.reset()
    many = {"recompile_limit": 64}  # all ways share the code of one class, and are a compilation of it each
    torch._dynamo.config.recompile_limit = many["recompile_limit"]
    whole = {
        "bf16, torch.compile": torch.compile(model),
        "bf16, torch.compile, freezing": torch.compile(model, options={"freezing": True}),
        "bf16, Tessel": tessel.compile(model, target="cpu", options=many),
    }
    ways: dict[str, tuple[nn.Module, Any]] = {name: (model, fn) for name, fn in whole.items()}
    for scheme, own in small.items():
        ways[f"{scheme}, Tessel"] = own, tessel.compile(own, target="cpu", options=many)
        if scheme in _BY_TORCH and tokens == 1:
            ways[f"{scheme}, torch's product"] = own, torch.compile(by_torch(own, _BY_TORCH[scheme]))
    rows: dict[str, Any] = {}
    eager: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, (own, fn) in ways.items():
            if id(own) not in eager:
                eager[id(own)] = own(**inputs)[0].float()
            want, got = eager[id(own)], fn(**inputs)[0].float()
            rows[name] = {"error": round(float((got - want).abs().max() / want.abs().max()), 5)}
        least = 9 if tokens == 1 else 5
        times = interleaved({n: lambda fn=fn: fn(**inputs) for n, (_, fn) in ways.items()}, seconds, least)
    for name, taken in times.items():
        rows[name] |= spread(taken)
    base = min(rows[n]["ms"] for n in list(whole)[:2])
    for row in rows.values():
        row["times"] = round(base / row["ms"], 3)
    return rows


_BY_TORCH = {"w8a16": Int8, "w4a16": Int4}
_DECODE = ["w8a16", "w8a8", "w4a16", "w3a16", "nf4", "mxfp4a16", "2:4"]
_PREFILL = ["w8a8", "w4a8", "w8a16", "w4a16", "nf4", "2:4"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512, help="of a prefill; 0: decoding alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two")
    parser.add_argument("--decode", nargs="*", default=_DECODE, help="schemes")
    parser.add_argument("--prefill", nargs="*", default=_PREFILL, help="schemes")
    given = parser.parse_args(argv)
    model = layer(given.hidden)
    made = quantized(model, {*given.decode, *(given.prefill if given.tokens else ())})
    found: dict[str, Any] = {"hidden": given.hidden, "tokens": given.tokens}
    found["seconds_to_quantize"] = {name: round(seconds, 2) for name, (_, seconds) in made.items()}
    print(table(["scheme", "seconds to quantize"], [[n, str(s)] for n, s in found["seconds_to_quantize"].items()]))
    parts = [("rows", given.decode, 1)] + [("prefill", given.prefill, given.tokens)] * (given.tokens > 0)
    for part, schemes, tokens in parts:
        if not schemes:
            continue
        rows = found[part] = measured(model, {s: made[s][0] for s in schemes}, tokens, given.seconds)
        body = [
            [n, f"{r['ms']:.2f}", f"{r['iqr']:.0%}", f"{r['times']:.2f}", f"{r['error']:.4f}"] for n, r in rows.items()
        ]
        what = "one token" if tokens == 1 else f"{tokens} tokens"
        print(table([what, "ms", "spread", "times bf16 torch.compile", "error"], body))
    print(write_result("quant", found))


if __name__ == "__main__":
    main()
