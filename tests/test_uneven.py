"""Sizes that do not divide are refused or left whole in words; windows read the edges of the shares beside them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from ranks import annotations, same_as_one_device
from test_forms import captured, fast, made, planned, same_gradients
from torch import nn

from tessel.errors import TesselError
from tessel.frontend.joint import capture_step
from tessel.sharding.spmd import lay_out
from tessel.sharding.verify import verify_program
from tessel.targets.mesh import Mesh


class Vocabulary(nn.Module):
    """A table of words and a head, of a size that is odd."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 16), nn.Linear(16, words, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))  # type: ignore[no-any-return]


def test_an_odd_vocabulary_stays_whole_and_says_so() -> None:
    model, ids = Vocabulary(8193), torch.randint(8193, (2, 4))
    plan, spmd = planned(model, [ids], fast({"tp": 2}))
    notes = " ".join(plan.data["provenance"]["notes"])
    assert "embedding: 8193 words do not divide over tp=2 and stay whole" in notes
    same_gradients(spmd, model, [ids])
    with pytest.raises(TesselError, match=r"dim 0 of size 8193 does not divide by 2 \(tp=2\)"):
        lay_out(
            capture_step(model, (ids,), train=False),
            Mesh({"tp": 2}),
            annotations([("shard", "embed.weight", ("tp", None))]),
        )


def test_an_odd_sequence_is_refused() -> None:
    with pytest.raises(TesselError, match="sp=2 is there to split the sequence, and 17 does not divide by 2"):
        planned(Vocabulary(24), [torch.randint(24, (2, 17))], fast({"sp": 2}))
    with pytest.raises(TesselError, match="dp=4 is there to split the batch, and 6 does not divide by 4"):
        planned(Vocabulary(24), [torch.randint(24, (6, 8))], fast({"dp": 4}))


def test_heads_that_do_not_divide_stay_whole() -> None:
    """Six heads over four devices: attention is whole, or gathered where the layers around it are split."""
    model, ids = made(6, 6, 24), torch.randint(24, (2, 8))
    plan, spmd = planned(model, [ids], fast({"tp": 4}))
    assert "attention: 6 heads do not divide over tp=4 and stay whole" in " ".join(plan.data["provenance"]["notes"])
    same_gradients(spmd, model, [ids])
    with torch.device("meta"):
        lines = annotations([("shard", "*.attention.q.weight", ("tp", None))])
    said = lay_out(captured(model, (ids,), train=True), Mesh({"tp": 4}), lines)
    same_as_one_device(said, model, [ids])


# ---------------------------------------------------------------- halos


class Convolved(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...], tuple[Any, ...], dict[str, int], int]] = [
    (nn.Conv1d(3, 5, 3, padding=1), (2, 3, 16), (None, None, "sp"), {"sp": 4}, 2),
    (nn.Conv1d(3, 5, 5, padding=2, bias=False), (2, 3, 16), (None, None, "sp"), {"sp": 4}, 2),
    (nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4), (2, 4, 16), ("dp", None, "sp"), {"dp": 2, "sp": 2}, 2),
    (nn.Conv1d(3, 5, 4, stride=2, padding=1), (2, 3, 16), (None, None, "sp"), {"sp": 4}, 2),
    (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 6), (None, None, "sp", None), {"sp": 4}, 2),
    (nn.Conv2d(3, 5, (3, 5), padding=(1, 2)), (2, 3, 8, 8), (None, None, "a", "b"), {"a": 2, "b": 2}, 4),
    (nn.AvgPool2d(2), (2, 3, 8, 6), (None, None, "sp", None), {"sp": 4}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape", "dims", "mesh", "permutes"), CONVOLUTIONS)
def test_convolutions_read_the_edges_beside_them(
    layer: nn.Module, shape: tuple[int, ...], dims: tuple[Any, ...], mesh: dict[str, int], permutes: int
) -> None:
    torch.manual_seed(0)
    model, x = Convolved(layer), torch.randn(shape)
    step = capture_step(model, (x,), train=False)
    spmd = lay_out(step, Mesh(mesh), annotations([("shard", "inputs[0]", dims)]), whole_results=False)
    assert Counter(c.kind for c in spmd.collectives()) == Counter(collective_permute=permutes)
    assert verify_program(spmd.forward).proved
    same_as_one_device(spmd, model, [x])


def test_a_kernel_wider_than_a_share_is_gathered() -> None:
    model, x = Convolved(nn.Conv1d(2, 2, 9, padding=4)), torch.randn(1, 2, 8)
    step = capture_step(model, (x,), train=False)
    spmd = lay_out(step, Mesh({"sp": 4}), annotations([("shard", "inputs[0]", (None, None, "sp"))]))
    assert not any(c.kind == "collective_permute" for c in spmd.collectives())
    same_as_one_device(spmd, model, [x])


def test_a_split_image_trains() -> None:
    torch.manual_seed(0)
    model, x = Convolved(nn.Conv2d(3, 5, 3, padding=1)), torch.randn(2, 3, 8, 6)
    step = capture_step(model, (x,), train=True)
    spmd = lay_out(step, Mesh({"dp": 2, "sp": 2}), annotations([("shard", "inputs[0]", ("dp", None, "sp", None))]))
    assert any(c.kind == "collective_permute" for c in spmd.forward.collectives())
    same_as_one_device(spmd, model, [x])


def test_the_search_prices_halos() -> None:
    """An axis that may split anything splits the places of an image with one row."""
    torch.manual_seed(0)
    model, x = Convolved(nn.Conv2d(3, 5, 3, padding=1)), torch.randn(1, 3, 64, 6)
    plan, spmd = planned(model, [x], fast({"x": 4}), train=False)
    (node,) = (n for n in plan.data["nodes"] if n["op"] == "convolution")
    assert node["splits"] == {"x": "h"}
    moved = [c for c in plan.data["program"]["collectives"] if c["kind"] == "collective_permute"]
    priced = [c for c in plan.data["collectives"] if c["kind"] == "permute"]
    assert [c["bytes"] for c in moved] == [c["bytes"] for c in priced] == [3 * 6 * 4] * 2
    same_as_one_device(spmd, model, [x])
