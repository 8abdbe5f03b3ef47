"""Memory of training: ZeRO's formulas, and activations by liveness against the closed forms of a GPT layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tessel.errors import TesselError
from tessel.frontend.capture import export_program, import_program
from tessel.ir.text import value_names
from tessel.solve.memory import kept_of, optimizer_bytes, param_bytes
from tessel.solve.units import Segment, segments_of, units_of

ORACLES = json.loads((Path(__file__).parent / "data/sharding_oracles.json").read_text())


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_zero(level: int) -> None:
    got = param_bytes(7.5e9, 2, [(level, 64)], "adamw").total / 1e9
    assert got == pytest.approx(ORACLES["zero_7_5b_n64_gb"][str(level)], rel=1e-9)


def test_zero_over_two_axes() -> None:
    b = param_bytes(64, 2, [(3, 4), (1, 2)], "adamw")
    assert (b.params, b.grads, b.optimizer) == (32, 32, 12 * 64 / 8)
    assert param_bytes(64, 2, [(3, 4)], None).total == 32
    with pytest.raises(TesselError, match="did you mean 'adamw'"):
        optimizer_bytes("adam", 2)


class Layer(nn.Module):
    """A GPT layer without dropout."""

    def __init__(self, h: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, s, h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    def __init__(self, h: int, heads: int, layers: int) -> None:
        super().__init__()
        self.start = nn.Linear(h, h)
        self.layers = nn.ModuleList(Layer(h, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        for layer in self.layers:
            x = layer(x)
        return x


B, S, H, A = 2, 64, 128, 4


@pytest.fixture(scope="module")
def middle() -> list[Segment]:
    """The two segments (attention, feed-forward) of a layer in the middle."""
    with torch.device("meta"):
        model, x = Stack(H, A, 3).to(torch.bfloat16), torch.empty(B, S, H, dtype=torch.bfloat16)
    graph = import_program(export_program(model, (x,), {})).graph.live()
    segments = segments_of(units_of(graph, value_names(graph))[0])
    own = [s for s in segments if any("layers.1" in u.node.loc.module for u in s.units)]
    assert len(own) == 2
    return own


def test_activations_of_a_layer(middle: list[Segment]) -> None:
    """34sbh of arXiv 2205.05198 without its two dropout masks of 1sbh: with flash attention 32sbh and the
    log-sum-exp of each row. Full recomputation keeps the layer's input, 2sbh a cut."""
    sbh = S * B * H
    none = sum(t.nbytes for s in middle for t in kept_of(s.units, s.before, "none").saved)
    lse, statistics = 4 * B * A * S, none - 32 * sbh - 4 * B * A * S
    assert statistics >= 0 and statistics <= 4 * 4 * B * S, (none / sbh, lse)  # mean and rstd of the norms
    full = sum(t.nbytes for s in middle for t in kept_of(s.units, s.before, "full").saved)
    assert full == 2 * (2 * sbh)
    selective = sum(t.nbytes for s in middle for t in kept_of(s.units, s.before, "selective").saved)
    assert full < selective < none


def test_selective_does_again_what_it_does_not_keep(middle: list[Segment]) -> None:
    for segment in middle:
        kept = kept_of(segment.units, segment.before, "selective")
        assert kept.again and all(u.node.op.kind not in ("contract", "attention") for u in kept.again)
        assert not kept_of(segment.units, segment.before, "none").again
        assert set(segment.units) == set(kept_of(segment.units, segment.before, "full").again)
    with pytest.raises(TesselError, match="did you mean 'full'"):
        kept_of(middle[0].units, None, "ful")
