"""Layers of experts: the CPU kernel against float64, capture from transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tessel
from tessel.ops.experts import ACTS, experts_backward_ref, experts_ref
from tessel.runtime import experts_cpu as kernels

BOUND = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}


def dtypes() -> list[torch.dtype]:
    from tessel.codegen.cpp.gemm import multiplies_bf16
    from tessel.targets import get_target

    half = multiplies_bf16(get_target("cpu").features)
    return [torch.float32, *([torch.bfloat16] if half else [])]


def layer(
    t: int, h: int, e: int, i: int, o: int, c: int, bias: bool, turned: bool, dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """Operands of ``experts``; experts are drawn at random, some may get nothing."""
    gate_up, down = torch.randn(e, 2 * i, h) / h**0.5, torch.randn(e, o, i) / i**0.5
    if turned:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = (torch.randn(e, 2 * i), torch.randn(e, o)) if bias else (None, None)
    given = [torch.randn(t, h), gate_up, biases[0], down, biases[1]]
    made: list[torch.Tensor | None] = [None if x is None else x.to(dtype) for x in given]
    return [*made, torch.randint(0, e, (t, c)), torch.rand(t, c)]


def by_definition(operands: list[Any], attrs: dict[str, Any]) -> torch.Tensor:
    """One token and one choice after another, in plain torch."""
    from tessel.ops.experts import gated

    x, gate_up, gub, down, db, index, scale = operands
    act = (attrs["act"], attrs["interleaved"], attrs.get("alpha", 1.0), attrs.get("limit", 0.0))
    rows = []
    for t in range(x.shape[0]):
        total = x.new_zeros(down.shape[2 if attrs["turned"] else 1])
        for c in range(index.shape[1]):
            e = int(index[t, c])
            first, second = (gate_up[e], down[e]) if attrs["turned"] else (gate_up[e].t(), down[e].t())
            pre = x[t] @ first + (0 if gub is None else gub[e])
            y = gated(pre[None], *act)[0] @ second + (0 if db is None else db[e])
            total = total + scale[t, c] * y
        rows.append(total)
    return torch.stack(rows)


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, what: str, plain: float = 0.0) -> None:
    """``plain`` is the error of plain torch in float32, large where terms cancel: silu near -1.28."""
    assert got.shape == want.shape, what
    error = (got.double() - want).abs().max().item()
    most = want.abs().max().clamp(min=1e-3).item() * BOUND[dtype]
    assert error <= max(most, 4 * plain), f"{what}: {error}, {most} allowed, plain torch has {plain}"


def compare(operands: list[Any], attrs: dict[str, Any], dtype: torch.dtype) -> None:
    """Kernel and reference, forward and backward, against autograd in float64."""
    floating = [isinstance(t, torch.Tensor) and t.is_floating_point() for t in operands]

    def by_autograd(x: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        given = [t.to(x).requires_grad_() if f else t for t, f in zip(operands, floating, strict=True)]
        out = by_definition(given, attrs)
        inputs = [t for t, f in zip(given, floating, strict=True) if f]
        return out.detach(), torch.autograd.grad(out, inputs, grad.to(x))

    grad = torch.randn_like(kernels.forward(*operands, **attrs)[0])
    want, grads = by_autograd(torch.float64)
    errors = [(g - w).abs().max().item() for g, w in zip(by_autograd(torch.float32)[1], grads, strict=True)]
    for forward, backward in ((kernels.forward, kernels.backward), (experts_ref, experts_backward_ref)):
        out, pre = forward(*operands, keep=True, **attrs)
        near(out, want, dtype, "out")
        assert torch.equal(forward(*operands, **attrs)[0], out)
        got = [g for g in backward(grad, *operands, pre, **attrs) if g.numel()]
        for i, (g, w, plain) in enumerate(zip(got, grads, errors, strict=True)):
            near(g, w, dtype, f"gradient {i}", plain)


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_acts(act: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    odd = ACTS.index(act) % 2 == 1
    attrs = {"act": act, "interleaved": act == "limited", "turned": odd or act == "limited"}
    operands = layer(21, 40, 5, 18, 31, 2, act in ("gelu", "limited"), bool(attrs["turned"]), dtype)
    attrs |= {"alpha": 1.702, "limit": far_from_all(operands)} if act == "limited" else {}
    compare(operands, attrs, dtype)


def far_from_all(operands: list[Any]) -> float:
    """A limit that no sum in front of an activation comes near: the derivative jumps there, whatever rounds."""
    x, gate_up, bias = (t.double() for t in operands[:3])
    sums = torch.einsum("th,ehi->tei", x, gate_up) + bias
    limits = torch.linspace(0.8, 1.0, 201, dtype=torch.float64)
    return float(limits[(sums.flatten().abs()[:, None] - limits).abs().amin(0).argmax()])


@pytest.mark.parametrize("spread", ["one token", "all to one", "k in parts", "many experts"])
def test_spreads(spread: str) -> None:
    torch.manual_seed(0)
    sizes = {"one token": (1, 16, 8), "all to one": (70, 16, 4), "k in parts": (12, 3000, 2)}
    t, h, e = sizes.get(spread, (9, 8, 33))
    operands: list[Any] = layer(t, h, e, 60, h if h < 100 else 20, 2, False, False, torch.float32)
    if spread == "all to one":
        operands[5][:] = e - 1
    compare(operands, {"act": "silu", "interleaved": False, "turned": False}, torch.float32)


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_every_expert_of_every_token(dtype: torch.dtype) -> None:
    """As many choices as experts, and an expert that none of them is."""
    torch.manual_seed(0)
    operands: list[Any] = layer(10, 24, 5, 12, 24, 4, True, False, dtype)
    operands[5] = torch.stack([torch.randperm(4) for _ in range(10)])
    compare(operands, {"act": "silu", "interleaved": False, "turned": False}, dtype)
    grads = kernels.backward(torch.ones(10, 24, dtype=dtype), *operands, kernels.forward(*operands, keep=True)[1])
    assert not any(g[4].any() for g in grads[1:5])


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_no_token(dtype: torch.dtype) -> None:
    operands = layer(0, 24, 3, 12, 20, 2, True, False, dtype)
    for forward, backward in ((kernels.forward, kernels.backward), (experts_ref, experts_backward_ref)):
        out, pre = forward(*operands, keep=True)  # type: ignore[arg-type]
        assert out.shape == (0, 20) and pre.shape == (0, 24)
        grads = backward(torch.ones_like(out), *operands, pre)  # type: ignore[arg-type]
        given = [t for i, t in enumerate(operands) if i != 5]
        assert [g.shape for g in grads] == [t.shape for t in given if t is not None]
        assert not any(g.any() for g in grads)


@settings(max_examples=20, deadline=None)
@example(t=1, h=24, e=1, i=1, c=1, bias=True, turned=False, interleaved=False)
@given(
    t=st.integers(1, 30),
    h=st.integers(1, 40),
    e=st.integers(1, 9),
    i=st.integers(1, 60),
    c=st.integers(1, 3),
    bias=st.booleans(),
    turned=st.booleans(),
    interleaved=st.booleans(),
)
def test_shapes(t: int, h: int, e: int, i: int, c: int, bias: bool, turned: bool, interleaved: bool) -> None:
    torch.manual_seed(t * 100 + h)
    attrs = {"act": "silu", "interleaved": interleaved, "turned": turned}
    compare(layer(t, h, e, i, h + 1, c, bias, turned, torch.float32), attrs, torch.float32)


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("turned, interleaved", [(False, False), (False, True), (True, False), (True, True)])
def test_many_columns(turned: bool, interleaved: bool, dtype: torch.dtype) -> None:
    """A matrix unit takes weights that lie along k for its left operand."""
    torch.manual_seed(0)
    attrs = {"act": "silu", "interleaved": interleaved, "turned": turned}
    compare(layer(66, 290, 3, 601, 300, 2, not turned, turned, dtype), attrs, dtype)


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_rows_that_a_matrix_unit_takes_in_turns(dtype: torch.dtype) -> None:
    """More of them than it packs at a time, and more of k than it holds."""
    torch.manual_seed(0)
    operands: list[Any] = layer(200, 900, 2, 310, 610, 1, True, False, dtype)
    operands[5][:] = 1
    compare(operands, {"act": "silu", "interleaved": False, "turned": False}, dtype)


def test_pieces_of_the_experts_add_up() -> None:
    """What a mesh that splits the experts runs; a number of no expert adds nothing."""
    torch.manual_seed(0)
    x, gate_up, _, down, _, index, scale = layer(11, 8, 6, 5, 8, 2, False, False, torch.float32)
    assert gate_up is not None and down is not None and index is not None
    index[3, 1] = 6  # transformers marks a slot that another device has by this
    whole, _ = kernels.forward(x, gate_up, None, down, None, index, scale)
    pieces = ((0, 2), (2, 6))
    parts = [kernels.forward(x, gate_up[a:b], None, down[a:b], None, index, scale, offset=a) for a, b in pieces]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    nothing, pre = kernels.forward(x, gate_up, None, down, None, index + 100, scale, keep=True)
    assert not nothing.any() and not pre.any()


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    operands = layer(64, 48, 5, 100, 48, 2, True, False, torch.float32)
    threads = torch.get_num_threads()
    got = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            out, pre = kernels.forward(*operands, keep=True)  # type: ignore[arg-type]
            got.append([out, pre, *kernels.backward(torch.ones_like(out), *operands, pre)])  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


# ---------------------------------------------------------------- capture

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}


def model(name: str) -> Any:
    """A tiny model with experts, random weights and biases."""
    import transformers as t

    more: dict[str, Any]
    if name == "mixtral":
        made: Any = t.MixtralForCausalLM(t.MixtralConfig(**_SMALL, num_local_experts=4))
    elif name == "gpt_oss":
        more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "layer_types": ["full_attention"]}
        made = t.GptOssForCausalLM(t.GptOssConfig(**_SMALL, **more))
    elif name == "qwen2_moe":  # with an expert that every token has
        more = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
        more |= {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 1}
        made = t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**_SMALL, **more))
    elif name == "qwen3_moe":
        more = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16}
        made = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_SMALL, **more))
    else:
        more = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 16}
        more |= {"first_k_dense_replace": 0, "moe_intermediate_size": 16, "kv_lora_rank": 16, "v_head_dim": 16}
        more |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        made = t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**_SMALL, **more))
    for parameter_name, p in made.named_parameters():
        if "bias" in parameter_name:
            torch.nn.init.normal_(p)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("mixtral", "grouped_mm"),
        ("deepseek_v3", "grouped_mm"),
        ("qwen2_moe", "grouped_mm"),
        ("gpt_oss", "grouped_mm"),
        ("gpt_oss", "batched_mm"),
    ],
)
def test_models(name: str, implementation: str) -> None:
    """The whole model, forward and gradients, ends in one operator a layer."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    m = model(name)
    m.set_experts_implementation(implementation)
    ids = torch.randint(0, 61, (2, 9))

    def fn(ids: torch.Tensor) -> torch.Tensor:
        return m(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    fast = tessel.compile(fn, target="cpu")
    want = fn(ids)
    want.backward()
    grads = {k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}
    m.zero_grad()
    got = fast(ids)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for k, p in m.named_parameters():
        if k in grads:
            assert p.grad is not None and (p.grad - grads[k]).abs().max() <= 2e-5 * grads[k].abs().max() + 1e-7, k
    names = [c.operator for run in tessel.explain(fast).compilations for c in run.calls]
    assert names.count("experts") == names.count("experts_backward") == 1
    assert not {"grouped_mm", "sort", "histc", "index_put"} & set(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("mixtral", "grouped_mm"),
        ("deepseek_v3", "grouped_mm"),
        ("qwen3_moe", "grouped_mm"),
        ("gpt_oss", "grouped_mm"),
        ("gpt_oss", "batched_mm"),
        ("mixtral", "eager"),
        ("deepseek_v3", "eager"),
    ],
)
def test_exported_models(name: str, implementation: str) -> None:
    """What ``tessel compile hf:...`` builds: one operator a layer as well, and eager's results."""
    from evaluate import run

    from tessel.frontend.capture import export_graph

    torch.manual_seed(0)
    m = model(name).eval()
    m.set_experts_implementation(implementation)
    m.config.use_cache = False
    ids = torch.randint(0, 61, (2, 9))
    imported = export_graph(m, (ids,))
    names = [n.op.name for n in imported.graph.nodes]
    assert names.count("experts") == 1 and not {"grouped_mm", "sort", "histc", "index_put"} & set(names)
    state = {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())}
    inputs = [n.attrs for n in imported.graph.inputs if n.attrs["role"] != "constant"]
    given = [state[a["name"]] if a["role"] in ("param", "buffer") else ids for a in inputs]
    with torch.no_grad():
        torch.testing.assert_close(run(imported, given)[0], m(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_known_leaves_the_layer() -> None:
    """A norm of the experts' results between: the products stay calls, and the report says so."""
    from torch.nn.functional import silu

    torch._dynamo.reset()
    w1, w2 = torch.randn(3, 16, 8).bfloat16(), torch.randn(3, 8, 8).bfloat16()  # torch traces only these

    def fn(x: torch.Tensor, index: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        numbers, perm = torch.sort(index.reshape(-1))
        ends = torch.cumsum(torch.histc(numbers.float(), bins=3, min=0, max=2), dim=0, dtype=torch.int32)
        pre = torch.nn.functional.grouped_mm(x[perm // 2], w1.transpose(-2, -1), offs=ends)
        gate, up = pre.chunk(2, dim=-1)
        y = torch.nn.functional.grouped_mm(silu(gate) * up, w2.transpose(-2, -1), offs=ends)
        y = torch.nn.functional.layer_norm(y, (8,)) * scale.reshape(-1)[perm].unsqueeze(-1)
        back = torch.empty_like(perm)
        back[perm] = torch.arange(perm.shape[0])
        return y[back].view(-1, 2, 8).sum(dim=1)

    ins = (torch.randn(5, 8).bfloat16(), torch.randint(0, 3, (5, 2)), torch.rand(5, 2).bfloat16())
    fast = tessel.compile(fn, target="cpu")
    with torch.no_grad():
        torch.testing.assert_close(fast(*ins), fn(*ins), rtol=0.05, atol=0.05)
    notes = [n for run in tessel.explain(fast).compilations for n in run.notes]
    assert any("2 grouped products are not part of a known layer" in n for n in notes)
