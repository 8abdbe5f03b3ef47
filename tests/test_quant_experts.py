"""Experts' stacks in few bits: rounded inputs and whole numbers, files, and the kernels for GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from offline_record import Recorded
from test_quant_sparse import experts
from torch import Tensor, nn

import tessel
from tessel.codegen.fused import packed_source
from tessel.errors import TesselError
from tessel.ops.packed_stacks import packed_experts_ref
from tessel.quant.experts import inputs_of
from tessel.quant.files import load_quantized, save_quantized
from tessel.quant.formats import FORMATS, Format, integers, quantize, rounded
from tessel.quant.scheme import scheme as scheme_of
from tessel.quant.stacks import Stack, quantize_stacks
from tessel.runtime import packed_cpu
from tessel.runtime.fused_gpu import GpuPackedExperts
from tessel.targets import get_target

pytestmark = pytest.mark.usefixtures("shared_cache")

files = pytest.importorskip("safetensors.torch")

# ---------------------------------------------------------------- inputs that are rounded


def layer(f: Format, t: int, h: int, e: int, i: int, o: int, more: str = "") -> tuple[Any, ...]:
    """Operands of ``packed_experts``; more: "b" for biases."""
    g = torch.Generator().manual_seed(t)

    def stack(n: int, k: int) -> tuple[Any, ...]:
        made = Stack([quantize(torch.randn(n, k, generator=g) / k**0.5, f) for _ in range(e)], torch.empty(0), False)
        return made.words, made.scale, made.zero, torch.randn(e, n, generator=g) if "b" in more else None, made.table

    index = torch.stack([torch.randperm(e, generator=g)[:2] for _ in range(t)])
    x, weights = torch.randn(t, h, generator=g), torch.rand(t, 2, generator=g)
    return x, *stack(2 * i, h), *stack(o, i), index, weights


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("f", [integers(8), integers(4, 32), integers(4, 32, symmetric=False)], ids=str)
def test_whole_numbers_on_the_cpu(f: Format) -> None:
    given = layer(f, 19, 64, 4, 32, 40, "b")
    attrs: dict[str, Any] = {"bits": f.bits, "inputs": 8}
    got = packed_cpu.forward_experts_integers(*given, **attrs)[0]
    want = packed_experts_ref(*map(wide, given), **attrs)[0]
    # what is rounded in the middle lies between two codes here and there
    assert (got.double() - want).abs().max() <= 5e-3 * want.abs().max()
    assert (got.double() - want).abs().median() <= 1e-6 * want.abs().max()
    as_floats = packed_cpu.forward_experts(*given, **attrs)[0]
    assert (got - as_floats).abs().median() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize(("name", "scheme"), [("mixtral", "w4a8-g32"), ("gpt-oss", "w8a8")])
def test_experts_round_their_inputs(name: str, scheme: str) -> None:
    torch._dynamo.reset()
    model, inputs = experts(name)
    small = tessel.quantize(model, scheme)
    rows = [r for r in small.quantization.layers if "experts" in r.name]
    assert len(rows) == 2 and all(r.how.endswith("inputs int8") and not r.fallback for r in rows)
    fast = tessel.compile(small, target="cpu")
    with torch.no_grad():
        want, got = small(**inputs)[0], fast(**inputs)[0]
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()
    (call,) = (c for d in tessel.explain(fast).compilations for c in d.calls if c.operator == "packed_experts")
    if packed_cpu.multiplies_int8(get_target("cpu").features):
        assert "products of whole numbers" in call.reason
    else:
        assert "this CPU has no product of 8-bit integers" in call.reason


def _stored(s: Stack) -> tuple[Any, ...]:
    """A stack without biases, as ``packed_experts`` takes it."""
    return s.words, s.scale, s.zero, None, s.table


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4"])
def test_experts_round_their_inputs_to_small_floats(name: str, tmp_path: Path) -> None:
    """Tokens and what becomes of gate and up, each as a whole; the kernels of both targets against the definition."""
    model, inputs = experts("mixtral")
    small = tessel.quantize(model, name)
    rows = [r for r in small.quantization.layers if "experts" in r.name]
    bits = {"nvfp4": 4}.get(name, 8)
    assert len(rows) == 2 and all(r.how.endswith(f"inputs float{bits}") and not r.fallback for r in rows)
    module = next(m for n, m in small.named_modules() if n.endswith("experts"))
    f = inputs_of(module)
    assert f is not None and f == scheme_of(name).activation
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2)
    up_stack, down_stack = module.gate_up_proj_stack, module.down_proj_stack
    up_weight, down_weight = up_stack(), down_stack()
    pre = torch.stack([rounded(x, f)[i // 2] @ up_weight[e].t() for i, e in enumerate(index.flatten())])
    gate, up = pre.chunk(2, -1)
    inner = rounded(nn.functional.silu(gate) * up, f)
    each = torch.stack([inner[i] @ down_weight[e].t() for i, e in enumerate(index.flatten())])
    want = (each.unflatten(0, (3, 2)) * weights[..., None]).sum(1)
    with torch.no_grad():
        torch.testing.assert_close(module(x, index, weights), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    packed = (x, *_stored(up_stack), *_stored(down_stack), index, weights)
    floats = (f.group, f.exponent, f.mantissa, f.largest, f.scale)
    attrs: dict[str, Any] = {"bits": bits, "exponent": up_stack.format.exponent, "floats": floats}
    runs = [GpuPackedExperts(get_target("triton-interpret"), tmp_path).forward]
    for run in [*runs, packed_cpu.forward_experts] if name == "mxfp8" else runs:
        far = (run(*packed, **attrs)[0] - packed_experts_ref(*packed, **attrs)[0]).abs()
        assert far.median() <= 1e-6 * want.abs().max() and far.max() <= 5e-2 * want.abs().max()
    if name == "mxfp8":
        torch._dynamo.reset()
        fast = tessel.compile(small, target="cpu")
        with torch.no_grad():
            own, got = small(**inputs)[0], fast(**inputs)[0]
        assert (got - own).abs().max() <= 5e-2 * own.abs().max()
        said = [n for d in tessel.explain(fast).compilations for n in d.notes]
        assert any("inputs rounded to floats of 8 bits are multiplied as float32" in n for n in said), said


def test_gradients_reach_tokens_and_their_weights() -> None:
    model, _ = experts("mixtral")
    whole = next(m for n, m in model.named_modules() if n.endswith("experts"))
    module = next(m for n, m in tessel.quantize(model, "w8a8").named_modules() if n.endswith("experts"))
    index = torch.tensor([[0, 1], [2, 3], [1, 0]])
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    found = []
    for m in (whole, module):
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        m(given[0], index, given[1]).square().sum().backward()
        found.append([p.grad for p in given])
    for want, got in zip(*found, strict=True):
        assert got is not None and want is not None
        assert (got - want).abs().max() <= 0.1 * want.abs().max()


class OddExperts(nn.Module):
    """A stack whose module does something that no operator says."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 64, 64)), nn.Parameter(torch.randn(2, 64, 32))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x @ (self.down_proj @ self.gate_up_proj[:, :32]).mean(0).t() * index.sum(1, keepdim=True) * weights.sum()


@pytest.mark.parametrize("scheme", ["w8a8", "mxfp8"])
def test_other_code_keeps_its_inputs_whole_and_it_is_said(scheme: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": OddExperts()})
    small = tessel.quantize(model, scheme)
    rows = [r for r in small.quantization.layers if r.name.startswith("b.")]
    words = "its inputs stay whole: its code computes something else"
    assert len(rows) == 2 and all(words in r.fallback for r in rows)
    assert all("inputs" not in r.how for r in rows) and type(small["b"]).forward is OddExperts.forward


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("mixtral", "w4a16-g32-asym"), ("mixtral", "w8a8"), ("gpt-oss", "w8a16"), ("gpt-oss", "w4a8-g32")],
)
def test_what_is_written_is_read(name: str, scheme: str, tmp_path: Path) -> None:
    model, inputs = experts(name)
    small = tessel.quantize(model, scheme)
    save_quantized(small, tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    for buffer, value in model.named_buffers():  # tables of positions, which no file holds
        owner, _, last = buffer.rpartition(".")
        empty.get_submodule(owner)._buffers[last] = value.clone()
    back = load_quantized(empty.eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(back(**inputs)[0], small(**inputs)[0])
    modules = [m for n, m in back.named_modules() if n.endswith("experts")]
    assert len(modules) == 1 and (inputs_of(modules[0]) is not None) == ("a8" in scheme)
    held = files.load_file(tmp_path / "model.safetensors")
    both = "gate_up_proj" if name == "gpt-oss" else "up_proj"
    (packed,) = (n for n in held if n.endswith(f"experts.3.{both}.weight_packed"))
    assert held[packed].dtype == torch.int32 and held[packed].shape[0] == (128 if name == "gpt-oss" else 64)
    assert not any(n.endswith(("gate_up_proj", "down_proj", "_stack.words")) for n in held)


def test_the_layout_is_that_of_others(tmp_path: Path) -> None:
    """Mixtral as it was before its experts were stacked: w1, w3 and w2 of each, codes eight a word."""
    model, _ = experts("mixtral")
    save_quantized(tessel.quantize(model, "w4a16-g32"), tmp_path)
    held = files.load_file(tmp_path / "model.safetensors")
    old = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    renamed, want = {}, {}
    for name, value in held.items():
        owner, _, last = name.rpartition(".")
        layer_name = owner.rpartition(".")[2]
        if ".experts." in name and layer_name in old:
            renamed[f"{owner.rpartition('.')[0]}.{old[layer_name]}.{last}"] = value
            if last == "weight_packed":
                codes = torch.stack([(value.long() >> s) & 15 for s in range(0, 32, 4)], -1).flatten(1) - 8
                want[owner] = codes * held[f"{owner}.weight_scale"].repeat_interleave(32, 1)
        else:
            renamed[name] = value
    files.save_file(renamed, tmp_path / "model.safetensors")
    back = load_quantized(experts("mixtral")[0], tmp_path)
    ((owner, module),) = ((n, m) for n, m in back.named_modules() if n.endswith("experts"))
    for e in range(4):
        both = torch.cat([want[f"{owner}.{e}.gate_proj"], want[f"{owner}.{e}.up_proj"]])
        assert torch.equal(module.gate_up_proj[e], both)
        assert torch.equal(module.down_proj[e], want[f"{owner}.{e}.down_proj"])


def _change(tensors: dict[str, Tensor], what: str) -> None:
    first = next(n for n in tensors if n.endswith("experts.2.down_proj.weight_packed")).removesuffix("weight_packed")
    other = first.replace("experts.2", "experts.7")
    if what == "matrix":
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[first + part]
    elif what == "scale":
        del tensors[first + "weight_scale"]
    elif what == "extra":
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            tensors[other + part] = tensors[first + part].clone()
    elif what == "shape":
        tensors[first + "weight_shape"] = torch.tensor([64, 32])
    else:
        tensors[first + "weight_scale"] = tensors[first + "weight_scale"] * torch.nan


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("matrix", r"experts\.2\.down_proj is missing, others are there"),
        ("scale", r"experts\.2\.down_proj has no weight_scale"),
        ("extra", r"the model has no layer .*experts\.7\.down_proj"),
        ("shape", r"experts\.2\.down_proj is 64 x 32 in the file, 64 x 64 in the model"),
        ("nan", r"experts\.2\.down_proj: scales that are NaN"),
    ],
)
def test_files_that_do_not_fit(what: str, words: str, tmp_path: Path) -> None:
    model, _ = experts("mixtral")
    save_quantized(tessel.quantize(model, "w4a16-g32"), tmp_path)
    tensors = files.load_file(tmp_path / "model.safetensors")
    _change(tensors, what)
    files.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TesselError, match=words):
        load_quantized(model, tmp_path)


def test_inputs_that_cannot_be_rounded_here(tmp_path: Path) -> None:
    """A file that says so of a module whose code is unknown: an error, and not a model that computes something else."""
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": OddExperts()})
    save_quantized(tessel.quantize(model, "w8a16"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TesselError, match="inputs of b are rounded in the file, here they cannot be"):
        load_quantized(nn.ModuleDict({"a": nn.Linear(64, 64), "b": OddExperts()}), tmp_path)


def test_formats_that_the_layout_has_no_words_for(tmp_path: Path) -> None:
    model, f = nn.ModuleDict({"b": OddExperts()}), integers(3, 32)
    rows, _ = quantize_stacks(model, f, "int3", lambda name: False, lambda w: quantize(w, f))
    assert [r.name for r in rows] == ["b.gate_up_proj", "b.down_proj"]
    with pytest.raises(TesselError, match="b.gate_up_proj_stack .*no words in the compressed-tensors layout"):
        save_quantized(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- kernels for GPUs

WAYS: dict[str, tuple[Format, int]] = {
    "w4a16": (integers(4, 32), 0),
    "w4a16-asym": (integers(4, 8, symmetric=False), 0),
    "w8a16": (integers(8), 0),
    "w3a16": (integers(3, 24), 0),
    "nf4": (FORMATS["nf4"], 0),
    "mxfp4": (FORMATS["mxfp4"], 0),
    "w8a8": (integers(8), 8),
    "w4a8": (integers(4, 16), 8),
    "w4a8-asym": (integers(4, 16, symmetric=False), 8),
    "w4a8, groups of half a step": (integers(4, 8), 8),
}


@pytest.mark.parametrize("way", WAYS)
def test_odd_sizes_in_the_interpreter(way: str, tmp_path: Path) -> None:
    f, inputs = WAYS[way]
    h, i = (64, 192) if f.group == 64 else (96, 96) if f.group == 32 else (96, 48) if f.group > 0 else (45, 23)
    given = layer(f, 19, h, 5, i, 21, "b" if "asym" in way else "")
    attrs: dict[str, Any] = {"bits": f.bits, "inputs": inputs, "exponent": f.exponent}
    if "asym" in way:
        attrs |= {"act": "limited", "interleaved": True, "alpha": 1.7, "limit": 0.8}
    got = GpuPackedExperts(get_target("triton-interpret"), tmp_path).forward(*given, **attrs)[0]
    want = packed_experts_ref(*map(wide, given), **attrs)[0]
    far = (got.double() - want).abs()
    assert far.median() <= 1e-6 * want.abs().max()
    assert far.max() <= (3e-6 if not inputs else 5e-3) * want.abs().max()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_compiled_for_a_gpu_nothing_is_unpacked(scheme: str) -> None:
    torch._dynamo.reset()
    model, _ = experts("mixtral")
    module = next(m for n, m in tessel.quantize(model, scheme).named_modules() if n.endswith("experts"))
    fast = tessel.compile(module, target="triton-interpret")
    given = torch.randn(3, 64), torch.tensor([[0, 1], [3, 1], [1, 0]]), torch.rand(3, 2)
    with torch.no_grad():
        want, got = module(*given), fast(*given)
    assert (got - want).abs().max() <= (1e-5 if scheme != "w8a8" else 2e-2) * want.abs().max()
    calls = {c.operator: c.reason for d in tessel.explain(fast).compilations for c in d.calls}
    assert "packed_experts" in calls and "experts" not in calls
    assert "codes become numbers where they are multiplied" in calls["packed_experts"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ("a100", "h100", "b200", "mi300x"))
def test_compile_offline(target: str, offline: Recorded) -> None:
    record = get_target(target)
    plain: dict[str, Any] = {"bits": 4, "zero": False, "table": False, "once": True, "whole": False}
    limited = {"act": "limited", "interleaved": True, "alpha": 1.7, "limit": 7.0, "bias": True}
    ways: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("inner", {}, plain),
        ("inner", limited, {**plain, "bits": 8, "zero": True, "once": False}),
        ("inner", {}, {**plain, "whole": True}),
        ("product", {"scaled": True}, {**plain, "table": True}),
        ("product", {"scaled": True}, {**plain, "bits": 8, "zero": True, "whole": True}),
    )
    sources = [packed_source(part, torch.bfloat16, record, {**more, "packed": packed}) for part, more, packed in ways]
    offline.fitting(sources, record, spills=63)
