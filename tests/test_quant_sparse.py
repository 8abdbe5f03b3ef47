"""2:4 sparse layers and stacks of experts' matrices: kernels against what they stand for, models, pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tessel
from tessel.errors import TesselError
from tessel.frontend.packed_op import sparse_linear
from tessel.ops.sparse import dense
from tessel.quant.files import load_quantized, save_quantized
from tessel.quant.hessian import hessian
from tessel.quant.linear import pack
from tessel.quant.sparse import SparseLinear, kept_of, pruned, pruned_by
from tessel.quant.stacks import Stack, stacked
from tessel.runtime import packed_cpu
from tessel.targets import get_target

pytestmark = pytest.mark.usefixtures("shared_cache")


def two_of_four(n: int, k: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse weight, its values and its mask."""
    kept = kept_of(torch.rand(n, k, generator=g))
    weight = torch.randn(n, k, generator=g) * kept
    return weight, weight[kept].reshape(n, k // 2), pack(kept.int(), 1)


@given(n=st.integers(1, 5), quarters=st.integers(1, 20), seed=st.integers(0, 99))
def test_what_is_stored_comes_out(n: int, quarters: int, seed: int) -> None:
    weight, values, mask = two_of_four(n, 4 * quarters, torch.Generator().manual_seed(seed))
    assert torch.equal(dense(values, mask), weight)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 60), quarters=st.integers(1, 60), bias=st.booleans(), half=st.booleans())
def test_the_kernel(m: int, n: int, quarters: int, bias: bool, half: bool) -> None:
    dtype = torch.bfloat16 if half and "avx512_bf16" in get_target("cpu").features else torch.float32
    g, k = torch.Generator().manual_seed(m * 100 + n), 4 * quarters
    weight, values, mask = two_of_four(n, k, g)
    x, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype) if bias else None
    weight = dense(values.to(dtype), mask).double()
    got = packed_cpu.forward_sparse(x, values.to(dtype), mask, b)
    added = 0.0 if b is None else b.double()
    want, size = x.double() @ weight.T + added, x.double().abs() @ weight.abs().T + abs(added)
    room = 1e-6 if dtype == torch.float32 else 5e-3
    assert ((got.double() - want).abs() <= room * size + 1e-6).all()


@pytest.mark.parametrize("target", ["cpu", "triton-interpret"])
def test_a_compiled_layer(target: str) -> None:
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(3)
    weight, values, mask = two_of_four(24, 44, g)
    x, bias = torch.randn(5, 44, generator=g), torch.randn(24, generator=g)
    fast = tessel.compile(lambda x: sparse_linear(x, values, mask, bias), target=target)
    torch.testing.assert_close(fast(x).double(), x.double() @ weight.double().T + bias.double(), rtol=1e-5, atol=1e-5)
    (done,) = tessel.explain(fast).compilations
    own = target == "cpu"
    assert [c.operator for c in done.calls] == ["sparse_linear"] * own
    assert [kernel.family for kernel in done.kernels] == ["matmul"] * (not own)


def test_magnitudes_keep_their_share_of_normal_values() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    kept = pruned(weight)
    assert bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    share = float((weight * kept).square().sum() / weight.square().sum())
    assert abs(share - 0.8678) < 0.002  # the two larger of four normal values


def test_the_others_make_up_for_what_is_zero() -> None:
    """Correlated inputs: less loss than magnitudes leave; inputs that tell nothing: by magnitude, or as good."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=g) * 0.2 + torch.eye(64)
    x, weight = torch.randn(1024, 64, generator=g) @ mix, torch.randn(48, 64, generator=g)
    h = hessian(x)

    def loss(made: Tensor) -> float:
        return float((x @ (made - weight).T).square().sum())

    kept, changed, why = pruned_by(weight, h)
    assert not why and bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert torch.equal(changed * kept, changed), "what is pruned is zero"
    assert loss(changed) < 0.65 * loss(weight * pruned(weight))
    same, _, why = pruned_by(weight, torch.full((64, 64), torch.nan))
    assert "pruned by magnitude" in why and torch.equal(same, pruned(weight))


def test_a_model_with_layers_of_two_in_four() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 30), nn.Linear(30, 8))
    x = torch.randn(40, 64)
    small = tessel.quantize(model, "2:4", [x], method="gptq")
    assert [type(m).__name__ for m in small] == ["SparseLinear", "ReLU", "SparseLinear", "Linear"]
    report = small.quantization
    assert "four do not divide k = 30" in report.whole[0].how
    whole, first = 4 * 64 * 32, report.layers[0]
    assert first.after - 4 * 32 == whole // 2 + whole // 32
    with torch.no_grad():
        want, got = small(x), tessel.compile(small, target="cpu")(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for scheme, method, words in (
        ("2:4+w4a16", "rtn", "stored whole"),
        ("2:4", "hadamard", "which weights are zero"),
    ):
        with pytest.raises(TesselError, match=words):
            tessel.quantize(model, scheme, method=method)


def test_files_hold_what_is_there(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(44, 8), nn.Linear(8, 30), nn.Linear(30, 8))
    small = tessel.quantize(model, "2:4")
    save_quantized(small, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["sparsity_config"]["format"] == "sparse-24-bitmask" and said["sparsity_config"]["ignore"] == ["2"]
    held = safetensors.load_file(tmp_path / "model.safetensors")
    assert held["0.compressed"].shape == (8, 22) and held["0.bitmask"].shape == (8, 6)
    got = load_quantized(nn.Sequential(nn.Linear(44, 8), nn.Linear(8, 30), nn.Linear(30, 8)), tmp_path)
    x = torch.randn(3, 44)
    assert torch.equal(got(x), small(x)) and isinstance(got[0], SparseLinear)
    held["1.bitmask"][0, 0] = 7
    safetensors.save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(TesselError, match="of some four weights not two are there"):
        load_quantized(model, tmp_path)


def test_gradients_pass_a_sparse_layer() -> None:
    layer = nn.Linear(32, 7)
    sparse = SparseLinear.of(layer, pruned(layer.weight.detach()))
    x = torch.randn(3, 32, requires_grad=True)
    sparse(x).sum().backward()
    torch.testing.assert_close(x.grad, sparse.weight.sum(0).expand(3, -1))


# ---------------------------------------------------------------- experts


def experts(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers as t

    size: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "mixtral":
        model: nn.Module = t.MixtralForCausalLM(t.MixtralConfig(**size))
    else:
        model = t.GptOssForCausalLM(t.GptOssConfig(**size, head_dim=32, num_experts_per_tok=2))
    for p in model.parameters():
        if p.dim() == 3:
            nn.init.normal_(p, std=0.1)
    return model.eval(), {"input_ids": torch.randint(0, 64, (2, 9)), "use_cache": False}


@pytest.mark.parametrize(
    ("name", "scheme"), [("mixtral", "w4a16-g32"), ("mixtral", "nf4"), ("mixtral", "w8a8"), ("gpt-oss", "mxfp4a16")]
)
def test_experts_are_quantized(name: str, scheme: str) -> None:
    torch._dynamo.reset()
    model, inputs = experts(name)
    small = tessel.quantize(model, scheme)
    report = small.quantization
    rows = {r.name.rpartition(".")[2]: r for r in report.layers if "experts" in r.name}
    assert set(rows) == {"gate_up_proj", "down_proj"}
    assert all(r.after < 0.4 * r.before and r.sqnr > 15 and "4 experts" in r.how for r in rows.values())
    assert ("inputs int8" in rows["down_proj"].how) == (scheme == "w8a8")
    assert all(r.fallback == "" for r in rows.values())
    assert not stacked(small) and stacked(model)
    with torch.no_grad():
        want = small(**inputs)[0]
        whole = model(**inputs)[0]
        fast = tessel.compile(small, target="cpu")
        got = fast(**inputs)[0]
    room = 1e-5 if "a16" in scheme or scheme == "nf4" else 2e-2
    assert (got - want).abs().max() <= room * want.abs().max()
    # most tokens: some are sent to other experts, as the router is quantized too
    assert (want - whole).abs().median() <= 0.3 * whole.abs().median()
    calls = [c.operator for done in tessel.explain(fast).compilations for c in done.calls]
    assert "packed_experts" in calls and "unpacked" not in calls and "experts" not in calls


def test_stacks_hold_what_rounding_gives() -> None:
    model, _ = experts("gpt-oss")
    small = tessel.quantize(model, "w8a16")
    stack = next(m for m in small.modules() if isinstance(m, Stack))
    name = next(n for n, m in small.named_modules() if m is stack)
    whole = model.get_parameter(name.removesuffix("_stack"))
    assert stack.turned and stack().shape == whole.shape
    assert float((stack() - whole).detach().abs().max()) < 0.01 * float(whole.detach().abs().max())
