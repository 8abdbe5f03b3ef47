"""Quantized decoding on the CPU: a Llama layer 8192 wide, one token at a time, in one run.

    python benchmarks/quant.py [--hidden 8192] [--seconds 20]

Ways: bfloat16 by torch.compile (default and freezing, the better counts) and by Tessel; w8a16 and w4a16 (groups of 128)
by Tessel, and by the packed products that torch itself has for this CPU (those that torchao's layers call) under
torch.compile. Every way runs the same model; results are compared with the dequantized model's.
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


def layer(hidden: int) -> tuple[nn.Module, dict[str, Any]]:
    """One Llama layer in bfloat16 and a token."""
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
    model = LlamaModel(config).to(torch.bfloat16).eval()
    return model, {"input_ids": torch.tensor([[3]]), "use_cache": False}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args(argv)
    model, inputs = layer(given.hidden)
    w8, w4 = tessel.quantize(model, "w8a16"), tessel.quantize(model, "w4a16")
    ways: dict[str, Any] = {
        "bf16, torch.compile": torch.compile(model),
        "bf16, torch.compile, freezing": torch.compile(model, options={"freezing": True}),
        "bf16, Tessel": tessel.compile(model, target="cpu"),
        "w8a16, Tessel": tessel.compile(w8, target="cpu"),
        "w8a16, torch's product": torch.compile(by_torch(w8, Int8)),
        "w4a16, Tessel": tessel.compile(w4, target="cpu"),
        "w4a16, torch's product": torch.compile(by_torch(w4, Int4)),
    }
    rows: dict[str, Any] = {}
    with torch.no_grad():
        for name, fn in ways.items():
            own = model if name.startswith("bf16") else w8 if name.startswith("w8") else w4
            want, got = own(**inputs)[0].float(), fn(**inputs)[0].float()
            rows[name] = {"error": round(float((got - want).abs().max() / want.abs().max()), 5)}
        times = interleaved({n: lambda fn=fn: fn(**inputs) for n, fn in ways.items()}, given.seconds)
    for name, taken in times.items():
        rows[name] |= spread(taken)
    base = min(rows[n]["ms"] for n in list(ways)[:2])
    for row in rows.values():
        row["times"] = round(base / row["ms"], 3)
    body = [[n, f"{r['ms']:.2f}", f"{r['iqr']:.0%}", f"{r['times']:.2f}", f"{r['error']:.4f}"] for n, r in rows.items()]
    print(table(["way", "ms", "spread", "times bf16 torch.compile", "error"], body))
    print(write_result("quant", {"hidden": given.hidden, "rows": rows}))


if __name__ == "__main__":
    main()
