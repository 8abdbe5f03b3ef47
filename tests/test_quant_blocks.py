"""Block floating point: scales that are powers of two, channels in an order, files, inputs that are moved."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tessel
from tessel.errors import TesselError
from tessel.quant.files import load_quantized, safetensors, save_quantized
from tessel.quant.formats import block_floats, integers, quantize
from tessel.quant.linear import QuantLinear
from tessel.quant.scheme import scheme
from tessel.quant.sqnr import sqnr
from tessel.quant.transforms import channel_order

N, K = 96, 256


def uneven(seed: int = 0, spread: float = 1.5) -> Tensor:
    """A weight whose channels differ in size as e^(spread * normal)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=draw) * torch.exp(spread * torch.randn(K, generator=draw))


def model(weight: Tensor, bias: bool = True) -> nn.Module:
    layer = nn.Linear(K, N, bias)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(layer).eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_are_powers_of_two_and_the_error_is_bounded(bits: int) -> None:
    x = uneven()
    got = quantize(x, block_floats(bits, 16))
    mantissa, _ = torch.frexp(got.scale)
    assert bool((mantissa == 0.5).all())
    # half a step, or where the last code is passed, what of a step lies above it
    inside = (x.unflatten(1, (-1, 16)) / got.scale[..., None]).abs() <= 2 ** (bits - 1) - 1
    error = (got.dequantize() - x).unflatten(1, (-1, 16)).abs() / got.scale[..., None]
    assert float(error[inside].max()) <= 0.5 + 1e-5 and float(error.max()) <= 1 + 1e-5


def test_like_channels_side_by_side_lose_less() -> None:
    for seed in range(4):
        w = uneven(seed)
        order = channel_order(w)
        assert sorted(order.tolist()) == list(range(K))
        f = block_floats(4, 32)
        plain, ordered = quantize(w, f).dequantize(), quantize(w[:, order], f).dequantize()[:, order.argsort()]
        even = 1 / w.square().mean(0).sqrt()  # what makes channels count alike: inputs as large as weights are small
        assert sqnr(w * even, ordered * even) > sqnr(w * even, plain * even) + 9
    parts = channel_order(w, 4).view(4, -1)
    assert all(sorted(p.tolist()) == list(range(i * K // 4, (i + 1) * K // 4)) for i, p in enumerate(parts))
    with pytest.raises(TesselError, match="3 shards do not divide 256 channels"):
        channel_order(w, 3)


def inputs(weight: Tensor, rows: int = 2048) -> Tensor:
    """Inputs whose channels are as large as the weight's are small, and neighbours tell of each other."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, K, generator=draw)
    for i in range(1, K):
        x[:, i] = 0.9 * x[:, i - 1] + math.sqrt(1 - 0.9**2) * x[:, i]
    return x / weight.square().mean(0).sqrt()


def moved(name: str, method: str = "gptq", shards: int = 1) -> nn.Module:
    w = uneven()
    made = tessel.quantize(model(w), name, [inputs(w)], method=method, shards=shards)
    assert made[0].order is not None
    return made


def test_a_layer_moves_its_inputs_only_where_that_gains() -> None:
    flat = tessel.quantize(model(torch.randn(N, K, generator=torch.Generator().manual_seed(0))), "bfp4a16")
    assert flat[0].order is None and "order" not in flat.quantization.layers[0].how
    assert tessel.quantize(model(uneven()), "bfp4a16")[0].order is None  # no inputs are known: all count alike
    assert "channels in order" in moved("bfp4a16").quantization.layers[0].how
    within = moved("bfp4a16", shards=4)[0].order.view(4, -1)
    assert bool((within // (K // 4) == torch.arange(4)[:, None]).all())


@pytest.mark.parametrize("name", ["bfp8a16", "bfp4a16", "bfp3a16", "bfp6a16-g16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_compiled_layer_is_that_of_its_weight(name: str, rows: int) -> None:
    made = moved(name)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1))
    want = nn.functional.linear(x.double(), made[0].weight.double(), made[0].bias.double())
    bound = 1e-5 * nn.functional.linear(x.abs().double(), made[0].weight.abs().double()) + 1e-6
    with torch.no_grad():
        for fn in (made, tessel.compile(made, target="cpu")):
            assert bool(((fn(x).double() - want).abs() <= bound).all())


def test_gptq_knows_the_order() -> None:
    w = uneven()
    x, whole, made = inputs(w), model(w), moved("bfp4a16")
    nearest = copy.deepcopy(made)
    order = made[0].order
    nearest[0] = QuantLinear.of(whole[0], quantize(w[:, order], block_floats(4)), order=order)
    left = tessel.quantize(model(w), "w4a16-g32", [x], method="gptq")  # channels as they come
    with torch.no_grad():
        lost = [float((m(x) - whole(x)).square().mean()) for m in (made, nearest, left)]
    assert lost[0] < 0.6 * lost[1] and lost[0] < 0.5 * lost[2]


@pytest.mark.parametrize("name", ["bfp4a16", "bfp8a16"])
def test_files_keep_the_order(name: str, tmp_path: Path) -> None:
    made = moved(name)
    folder = save_quantized(made, tmp_path)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    back = load_quantized(model(torch.zeros(N, K)), folder)
    assert isinstance(back[0], QuantLinear)
    assert torch.equal(back[0].weight, made[0].weight)
    files = safetensors()
    tensors = files.load_file(folder / "model.safetensors")
    codes_in_place = tensors["0.weight_g_idx"]
    assert codes_in_place.shape == (K,) and codes_in_place.bincount().tolist() == [32] * (K // 32)
    files.save_file({**tensors, "0.weight_g_idx": torch.zeros(K, dtype=torch.int32)}, folder / "model.safetensors")
    with pytest.raises(TesselError, match="weight_g_idx does not put 256 channels in 8 equal groups"):
        load_quantized(model(torch.zeros(N, K)), folder)
    del tensors["0.weight_g_idx"]  # as channels lie
    files.save_file(tensors, folder / "model.safetensors")
    assert not torch.equal(load_quantized(model(torch.zeros(N, K)), folder)[0].weight, made[0].weight)


def test_names_and_bad_ones() -> None:
    assert scheme("bfp5a16").weight == block_floats(5, 32) and scheme("bfp5a16").ordered
    assert "channels in order" in repr(scheme("bfp4a16-g16")) and not scheme("w4a16").ordered
    assert block_floats(4).bits_per_value(4096) == 4.25 and integers(4, 32).bits_per_value(4096) == 5.0
    for wrong in ("bfp9a16", "bfp1a16", "bfp4a16-g0", "bfp4"):
        with pytest.raises(TesselError, match="unknown scheme"):
            scheme(wrong)
    with pytest.raises(TesselError, match="a block of 0 values"):
        block_floats(4, 0)
    odd = tessel.quantize(nn.Sequential(nn.Linear(40, 8), nn.Linear(64, 8)), "bfp4a16")
    assert type(odd[0]) is nn.Linear and "groups of 32 of its weight do not divide k = 40" in str(odd.quantization)
