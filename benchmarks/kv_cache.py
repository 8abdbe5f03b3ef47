"""Attention of one new token to a long cache on the CPU, whole and in few bits: the kernel alone, in one run.

    python benchmarks/kv_cache.py [--tokens 4096] [--batch 4] [--seconds 20]

32 heads share 8 heads of keys and values, 128 wide, bfloat16; the newest 128 tokens are whole. Ways: Tessel's kernel on
a bfloat16 cache and on caches of 8, 4 and 2 bits, torch's attention on the bfloat16 one. Each is compared with torch's
attention in float64 on what the cache holds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from common import table, write_result
from cpu_measure import interleaved, spread

import tessel
from tessel.quant.kv import Packed, pack_keys, pack_values
from tessel.quant.scheme import scheme

_HEADS, _SHARED, _WIDTH, _RECENT = 32, 8, 128, 128


def attend(q: Any, keys: Any, values: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def unpacked(bits: int) -> Any:
    """Attention to packed tokens and then whole ones."""

    def fn(q: Any, kw: Any, ks: Any, kl: Any, vw: Any, vs: Any, vl: Any, k: Any, v: Any) -> torch.Tensor:
        keys = Packed(kw, ks, kl, bits, _WIDTH, "channels")
        values = Packed(vw, vs, vl, bits, _WIDTH, "tokens")
        own = [torch.cat((x.dequantize(q.dtype), new), 2) for x, new in ((keys, k), (values, v))]
        return attend(q, *own)

    return fn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    n, half = given.tokens, torch.bfloat16
    q = torch.randn(given.batch, _HEADS, 1, _WIDTH).to(half)
    k, v = (torch.randn(given.batch, _SHARED, n, _WIDTH).to(half) for _ in range(2))
    ways: dict[str, tuple[Any, tuple[Any, ...], int]] = {
        "bf16, torch": (attend, (q, k, v), k.nbytes + v.nbytes),
        "bf16, Tessel": (tessel.compile(attend, target="cpu", dynamic=False), (q, k, v), k.nbytes + v.nbytes),
    }
    plain = dict.fromkeys(ways, attend)
    for bits in (8, 4, 2):
        s = scheme(f"kv{bits}")
        assert s.keys is not None and s.values is not None
        old, new = [x[:, :, : n - _RECENT] for x in (k, v)], [x[:, :, n - _RECENT :].contiguous() for x in (k, v)]
        packed = pack_keys(old[0], s.keys), pack_values(old[1], s.values, s.keys.group)
        parts = [t for p in packed for t in (p.words, p.scale, p.low)]
        fn = unpacked(bits)
        nbytes = sum(p.nbytes for p in packed) + sum(x.nbytes for x in new)
        plain[f"kv{bits}, Tessel"] = fn
        ways[f"kv{bits}, Tessel"] = tessel.compile(fn, target="cpu", dynamic=False), (q, *parts, *new), nbytes
    rows: dict[str, Any] = {}
    with torch.no_grad():
        for name, (fn, args, nbytes) in ways.items():
            wide = [x.double() if x.dtype == half else x for x in args]
            want, got = plain[name](*wide), fn(*args).double()
            error = round(float((got - want).abs().max() / want.abs().max()), 5)
            rows[name] = {"MiB": round(nbytes / 2**20, 2), "error": error}
        calls = {n: lambda fn=fn, args=args: fn(*args) for n, (fn, args, _) in ways.items()}
        for name, taken in interleaved(calls, given.seconds).items():
            rows[name] |= spread(taken)
    base = rows["bf16, Tessel"]["ms"]
    for row in rows.values():
        row["times"] = round(base / row["ms"], 3)
    body = [
        [n, f"{r['MiB']:.1f}", f"{r['ms']:.3f}", f"{r['iqr']:.0%}", f"{r['times']:.2f}", f"{r['error']:.4f}"]
        for n, r in rows.items()
    ]
    print(table(["way", "MiB", "ms", "spread", "times bf16 Tessel", "error"], body))
    print(write_result("kv_cache", {"tokens": n, "batch": given.batch, "rows": rows}))


if __name__ == "__main__":
    main()
