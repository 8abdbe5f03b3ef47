"""Real models, small, under every scheme: compiled they give what the dequantized model gives. And rows that matter."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import pytest
import torch
from test_quantize import tiny
from torch import Tensor, nn

import tessel
from tessel.errors import TesselError
from tessel.quant import hessian
from tessel.quant.calibrate import look
from tessel.quant.experts import inputs_of
from tessel.quant.formats import Format, integers, quantize, rounded
from tessel.quant.hessian import rows_gain
from tessel.quant.linear import QuantLinear
from tessel.quant.scheme import NAMES, scheme
from tessel.quant.sparse import SparseLinear
from tessel.quant.stacks import Stack, stacked

pytestmark = pytest.mark.usefixtures("shared_cache")

SCHEMES = [n for n in NAMES if scheme(n).weight is not None or scheme(n).sparse]  # caches have tests of their own
# Groups of 128 reach over the 64 columns that most layers of these models have.
SCHEMES = [f"{n}-g32" if n in ("w4a16", "w4a8", "w3a16", "w2a16") else n for n in SCHEMES] + [
    "w4a16-g32-asym",
    "w5a16-g32",
]
MODELS = ("llama", "mixtral", "bert", "vit", "mamba")
# Every scheme in one model, and every model with some; the full product by `make test-quant`.
FAST = {"w4a8-g32": "llama", "w8a16": "mixtral", "fp8-row": "bert", "mxfp4": "vit", "nf4": "mamba"}
FEW = FAST | {s: MODELS[i % 5] for i, s in enumerate(s for s in SCHEMES if s not in FAST)}
ALL = "TESSEL_TEST_QUANT" in os.environ
CASES = [
    pytest.param(m, s, marks=() if FAST.get(s) == m else pytest.mark.slow)
    for s in SCHEMES
    for m in MODELS
    if ALL or FEW[s] == m
]


def reference(model: nn.Module, small: nn.Module) -> nn.Module:
    """The model with dequantized weights in plain layers, whose inputs are rounded where the scheme says so."""
    made = copy.deepcopy(model)
    for name, (_, p, _) in stacked(made).items():
        owner, _, own = name.rpartition(".")
        p.data = getattr(small.get_submodule(owner), own).detach().clone()
    for name, m in small.named_modules():
        if not isinstance(m, QuantLinear | SparseLinear):
            continue
        layer = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)
        layer.weight.data = m.weight.data
        if m.bias is not None:
            layer.bias.data = m.bias.data
        if (f := getattr(m, "activation", None)) is not None:
            layer.register_forward_pre_hook(lambda _, args, f=f: (rounded(args[0], f),))
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, layer)
    for name, m in small.named_modules():
        if (f := inputs_of(m)) is not None:
            module: Any = made.get_submodule(name)
            module.forward = partial(rounding_experts, module, f)
    return made


def rounding_experts(module: Any, f: Format, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """A layer of experts, one token and choice after another, each product's inputs rounded."""
    rows = []
    for token, chosen, by in zip(x, index.tolist(), weights, strict=True):
        made = []
        for e in chosen:
            pre = rounded(token[None], f) @ module.gate_up_proj[e].T
            made.append(rounded(module._apply_gate(pre), f) @ module.down_proj[e].T)
        rows.append((torch.cat(made) * by[:, None]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "scheme_name"), CASES)
def test_compiled_is_the_dequantized_model(name: str, scheme_name: str) -> None:
    torch._dynamo.reset()
    model, inputs = tiny(name)
    small = tessel.quantize(model.eval(), scheme_name)
    assert any(isinstance(m, QuantLinear | SparseLinear | Stack) for m in small.modules())
    assert not any(isinstance(m, QuantLinear | SparseLinear | Stack) for m in model.modules()), "the model was changed"
    plain = reference(model, small)
    with torch.no_grad():
        fast = tessel.compile(small, target="cpu")
        want, got = plain(**inputs)[0], fast(**inputs)[0]
    assert not any(done.fallbacks for done in tessel.explain(fast).compilations)
    # an input that is rounded lies on the edge between two codes here and there
    room = 1e-5 if scheme(scheme_name).activation is None else 2e-2
    assert (got - want).abs().max() <= room * want.abs().max()
    report = small.quantization
    assert report.after < report.before and all(x.sqnr is not None for x in report.layers)
    assert str(report).count("\n") > len(report.layers)
    for row in report.whole:
        assert row.how == "as it was" or row.how.startswith("left whole: ")


# ---------------------------------------------------------------- rows that make up for each other


class Block(nn.Module):
    """``down(up(x))``; down has a small rank, so that most changes of what up gives do not matter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.up.weight.data = torch.randn(width, width, generator=g)
        self.down.weight.data = torch.randn(width, 6, generator=g) @ torch.randn(6, width, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Narrow(nn.Module):
    """One block, numbered as those of real models."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def narrow() -> tuple[nn.Module, Tensor]:
    g = torch.Generator().manual_seed(1)
    mix = torch.linalg.cholesky(0.9 ** (torch.arange(48)[:, None] - torch.arange(48)).abs())
    return Narrow(), torch.randn(4096, 48, generator=g) @ mix.T


def test_what_a_layers_output_matters() -> None:
    """Of a linear block the mean of ``g g^T`` is ``W^T W`` of the layer after."""
    model, x = narrow()
    block = model.layers[0]
    seen = look(model, {"layers.0.up": block.up, "layers.0.down": block.down}, [x], ("turboboa",), block)
    down = block.down.weight.detach().double()
    want, got = down.T @ down, seen["layers.0.up"].outputs / len(x)
    assert (got - want).norm() < 0.1 * want.norm()
    own = seen["layers.0.down"].outputs / len(x)
    assert (own - torch.eye(48)).norm() < 0.15 * 48**0.5 and rows_gain(own) < 1.05
    assert rows_gain(got) > 3
    assert all(p.grad is None for p in model.parameters())


def test_rows_make_up_for_rows_in_a_model() -> None:
    """Much better than gptq where the next layer hides most of what rows say; the other layer is done by gptq, and it
    is said."""
    model, x = narrow()
    want = model(x).detach()

    def loss(method: str) -> tuple[float, Any]:
        small = tessel.quantize(model, "w3a16-channel", [x], method=method, skip=("down",))
        return float((small(x) - want).detach().square().mean()), small.quantization

    gptq, (jointly, report) = loss("gptq")[0], loss("turboboa")
    assert jointly < 0.5 * gptq
    assert report.layers[0].fallback == ""
    both = tessel.quantize(model, "w3a16-channel", [x], method="hadamard+turboboa").quantization
    assert "by gptq: its rows hardly matter to each other" in both.layers[1].fallback


def test_a_block_with_a_cache_is_run_again_without_it() -> None:
    model, inputs = tiny("llama")
    batch = {"input_ids": inputs["input_ids"], "use_cache": True}
    small = tessel.quantize(model.eval(), "w4a16-g32", [batch], method="turboboa")
    assert all(isinstance(m, QuantLinear) for n, m in small.named_modules() if n.endswith("proj"))
    notes = {r.name.rpartition(".")[2]: r.fallback for r in small.quantization.layers}
    assert notes["q_proj"] == notes["k_proj"] == "", "queries and keys meet in scores, which mix their rows"


# ---------------------------------------------------------------- bad input


def test_no_factor_names_the_layer_that_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's Hessian has no Cholesky factor: that layer is rounded to nearest, the other is not."""
    real, calls = hessian.inverse_factor, []

    def second_fails(h: Tensor) -> Tensor:
        calls.append(h)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("linalg.cholesky: the leading minor of order 3 is not positive-definite")
        return real(h)

    monkeypatch.setattr(hessian, "inverse_factor", second_fails)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(200, 64) @ torch.randn(64, 64)
    small = tessel.quantize(model, "w4a16-g32", [x], method="gptq")
    first, second = small.quantization.layers
    assert first.fallback == "" and second.name == "1"
    assert second.fallback.startswith("rounded to nearest: linalg.cholesky: the leading minor of order 3")
    near = quantize(model[1].weight.detach(), integers(4, 32)).dequantize()
    torch.testing.assert_close(small[1].weight, near, rtol=0, atol=1e-6)
    assert second.fallback.split(":")[0] in str(small.quantization).replace("\n", " ")


def test_inputs_that_are_always_zero_and_data_of_one_row_are_fine() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(1, 64)
    x[:, ::3] = 0
    small = tessel.quantize(model, "w4a16-g32", [x], method="gptq")
    assert small.quantization.layers[0].fallback == "" and torch.isfinite(small[0].weight).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calibration": []}, "the calibration data is an empty list"),
        ({"calibration": [torch.full((2, 64), float("inf"))], "method": "turboboa"}, "0 NaN or infinite inputs"),
        ({"method": "turboboa"}, "there is none"),
        ({"method": "gptq+turboboa", "calibration": [torch.ones(2, 64)]}, "choose one"),
        ({"scheme": "nvfp4", "method": "gptq", "calibration": [torch.ones(2, 64)]}, "0: .*no column-by-column"),
        ({"scheme": "fp8", "method": "turboboa", "calibration": [torch.ones(2, 64)]}, "turboboa rounds symmetric"),
        ({"rows": 0}, "0 rows, 1 shards: at least 1"),
        ({"calibration": {"x": torch.ones(2, 64)}, "method": "gptq"}, r"call by call: \[batch\]"),
        ({"calibration": iter(()), "method": "gptq"}, "the calibration data is an empty list"),
        ({"calibration": [torch.ones(0, 64)], "method": "gptq"}, "the 1 items of the calibration data hold no values"),
        ({"calibration": [torch.ones(2, 63)], "budget": "20dB"}, "item 0 of the calibration data: RuntimeError"),
        ({"calibration": [torch.ones(0, 64)], "budget": "20dB"}, "hold no values"),
        ({"calibration": [torch.ones(2, 63)], "method": "gptq"}, "item 0 of the calibration data: RuntimeError"),
        ({"calibration": [torch.ones(2, 64), 3], "method": "gptq"}, "item 1 of the calibration data: "),
        ({"calibration": [torch.full((2, 64), torch.nan)], "method": "smoothquant"}, "0 NaN or infinite inputs"),
        ({"skip": ("*",)}, "no linear layer outside"),
    ],
)
def test_bad_requests(change: dict[str, Any], words: str) -> None:
    given = {"scheme": "w4a16-g32", **change}
    with pytest.raises(TesselError, match=words):
        tessel.quantize(nn.Sequential(nn.Linear(64, 8)), given.pop("scheme"), **given)


def test_groups_that_do_not_divide_are_said_for_each_layer() -> None:
    """Nothing stays whole without a word: each layer is quantized, or the report says why not."""
    model = nn.ModuleList([nn.Linear(k, 16) for k in (64, 96, 100, 128)])
    small = tessel.quantize(model, "w4a16-g64")
    assert [type(m) is QuantLinear for m in small] == [True, False, False, True]
    whole = {r.name: r.how for r in small.quantization.whole}
    assert whole == {
        n: f"left whole: groups of 64 of its weight do not divide k = {k}" for n, k in (("1", 96), ("2", 100))
    }
    assert small.quantization.before == sum(p.numel() * 4 for p in model.parameters())


def test_groups_that_do_not_divide_a_shard_are_said() -> None:
    model = nn.ModuleList([nn.Linear(k, 16) for k in (256, 384, 130)])
    for name, want in (
        ("w4a16", ["", "(384 / 2 shards) % 128 = 64", "groups of 128 of its weight do not divide k = 130"]),
        ("w8a16", ["2 shards would share a scale"] * 3),
    ):
        small = tessel.quantize(model, name, shards=2)
        found = {r.name: r.how for r in small.quantization.whole}
        for m, (own, words) in zip(small, enumerate(want), strict=True):
            assert isinstance(m, QuantLinear) == (not words) and words in found.get(str(own), "")


def test_a_layer_that_calibration_gives_no_rows() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x[:0]).sum(0)

    a, b = tessel.quantize(Half(), "w4a16-g32", [torch.randn(9, 64)], method="gptq").quantization.layers
    assert a.fallback == "" and "the calibration data never reaches it" in b.fallback


def test_a_sparse_layer_that_shards_do_not_divide() -> None:
    model = nn.ModuleList([nn.Linear(24, 8), nn.Linear(20, 8)])
    small = tessel.quantize(model, "2:4", shards=2)
    assert [type(m) is SparseLinear for m in small] == [True, False]
    assert small.quantization.whole[0].how == "left whole: four weights do not divide k = 20 in 2 shards"
