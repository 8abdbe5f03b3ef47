"""Attention as models write it out: the operator found, its masks read, results and gradients those of eager."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_capture import compiled
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tessel.config import Options
from tessel.frontend.capture import export_graph
from tessel.ir.node import Graph
from tessel.ir.text import parse_graph, print_graph
from tessel.ops import OPS
from tessel.passes import masks
from tessel.passes.pipeline import CPU_ONLY, PASSES, run_pipeline

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

EAGER = {"attn_implementation": "eager"}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "use_cache": False, **EAGER}


def model_of(name: str) -> torch.nn.Module:
    t = transformers
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        return t.T5Model(t.T5Config(**sizes, dropout_rate=0.0, use_cache=False, **EAGER))
    if name == "gemma2":
        return t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, head_dim=8, sliding_window=5))
    if name == "gpt_oss":
        more = {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}
        return t.GptOssForCausalLM(t.GptOssConfig(**SIZES, **more))
    if name == "deepseek_v3":
        sizes = {**SIZES, "num_key_value_heads": 4, "num_hidden_layers": 1, "first_k_dense_replace": 1}
        ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12}
        return t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(**sizes, **ranks, n_routed_experts=4, n_group=2, topk_group=1)
        )
    if name == "bloom":
        sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4, "use_cache": False}
        return t.BloomForCausalLM(t.BloomConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, **EAGER))
    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 32}
    return t.MptForCausalLM(t.MptConfig(**sizes, use_cache=False, **EAGER))


def found(graph: Graph) -> list[dict[str, Any]]:
    """The attributes of each attention operator after the passes that read masks."""
    until = [name for name, _ in PASSES].index("decode")
    nodes = run_pipeline(graph, Options(), passes=PASSES[:until]).nodes
    return [dict(n.attrs) for n in nodes if n.op.name in ("attention", "attention_backward")]


# Attention operators, and what their masks turn out to be: (causal, window) of each.
MODELS: dict[str, list[tuple[bool, int | None]]] = {
    "t5": [(False, None), (True, None), (False, None)],
    "gemma2": [(True, 5), (True, None)],
    "gpt_oss": [(True, 5), (True, None)],
    "deepseek_v3": [(True, None)],
    "bloom": [(True, None)],
    "mpt": [(True, None)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = model_of(name)
    other = copy.deepcopy(model)
    ids = torch.randint(0, 64, (2, 11))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :7]} if name == "t5" else {})}
    fast, seen = compiled(model, fullgraph=True)
    results = []
    for run, m in ((fast, model), (other, other)):
        out = run(**inputs)[0]
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        results.append([out.detach(), *(p.grad for p in m.parameters())])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 + 1e-4 * float(want.abs().max()))
    assert [info.kind for info, _ in seen] == ["forward", "backward"]
    forward, backward = (found(imported.graph) for _, imported in seen)
    assert [(a["causal"], a.get("window")) for a in forward] == MODELS[name]
    assert len(backward) == len(forward)
    if name in ("gemma2", "gpt_oss", "deepseek_v3"):  # masks of places alone are known to the backward too
        assert Counter((a["causal"], a.get("window")) for a in backward) == Counter(MODELS[name])
    if name == "gemma2":
        assert all(a["softcap"] == 50.0 for a in forward + backward)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss"])
def test_export(name: str) -> None:
    graph = export_graph(model_of(name).eval(), (), {"input_ids": torch.randint(0, 64, (2, 11))}).graph
    assert [(a["causal"], a.get("window")) for a in found(graph)] == MODELS[name]


# ---------------------------------------------------------------- spellings


def qkv(heads: int = 4, n: int = 9) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(heads)
    return [torch.randn(2, h, n, 8, generator=g) for h in (4, heads, heads)]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edit: Any) -> torch.Tensor:
    return F.softmax(edit(q @ k.transpose(-1, -2) * 0.3), -1) @ v


def check(fn: Any, *args: torch.Tensor, count: int = 1) -> tuple[Graph, Any]:
    fast, seen = compiled(fn, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), fn(*args), rtol=1e-5, atol=1e-6)
    info, imported = seen[0]
    assert sum(n.op.name == "attention" for n in imported.graph.nodes) == count
    return imported.graph, info


def band(low: int, high: int) -> Any:
    """Keys from ``i + low`` to ``i + high``, as Longformer and sliding windows have them."""

    def edit(s: torch.Tensor) -> torch.Tensor:
        d = torch.arange(s.shape[-1])[None, :] - torch.arange(s.shape[-2])[:, None]
        return s.masked_fill(~((d >= low) & (d <= high)), -math.inf)

    return edit


@pytest.mark.parametrize(
    ("edit", "want"),
    [
        (lambda s: 5.0 * torch.tanh((s + torch.arange(9)) / 5.0), None),
        (lambda s: s.where(torch.ones(9, 9).tril() > 0, -math.inf), {"causal": True}),
        (band(-2, 2), {"causal": True, "offset": 2, "window": 5}),
        (band(-3, 0), {"causal": True, "window": 4}),
        (lambda s: s + torch.full(s.shape[-2:], torch.finfo(s.dtype).min).triu(1), {"causal": True}),
        (lambda s: s.masked_fill(torch.ones(9, 9).triu(1) > 0, -1e4), None),
        (lambda s: s.float().div(2.0) + 1.0, {"scale": 0.15}),
        (lambda s: 5.0 * torch.tanh(s / 5.0), {"softcap": 5.0, "scale": 0.3}),
        (lambda s: s * s, None),
        (lambda s: torch.where(torch.arange(9)[None, :] <= torch.arange(9)[:, None] + 1, s, -math.inf), {"offset": 1}),
    ],
    ids=[
        "inside_cap",
        "where_method",
        "longformer",
        "window",
        "triu",
        "soft_fill",
        "shifted",
        "softcap",
        "square",
        "where",
    ],
)
def test_spellings(edit: Any, want: dict[str, Any] | None) -> None:
    graph, info = check(lambda q, k, v: by_hand(q, k, v, edit), *qkv(), count=want is not None)
    if want is None:
        assert any("stays as it is" in note for note in info.notes)
        return
    (attrs,) = found(graph)
    assert {name: attrs[name] for name in want} == pytest.approx(want)


def test_documents_stay_a_mask_beside_causal() -> None:
    doc = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])

    def edit(s: torch.Tensor) -> torch.Tensor:
        i = torch.arange(9)
        return s.masked_fill(~((i[None, :] <= i[:, None]) & (doc[None, :] == doc[:, None])), -math.inf)

    graph, _ = check(lambda q, k, v: by_hand(q, k, v, edit), *qkv())
    (attrs,) = found(graph)
    assert attrs["causal"]


class _Alibi(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        i = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=-slopes[:, None, None] * (i[None] - i[:, None]).abs())


def test_a_mask_is_computed_where_it_is_read() -> None:
    graph = export_graph(_Alibi(), (*qkv(), torch.rand(4))).graph
    done = run_pipeline(graph, Options(attention="template"), passes=[p for p in PASSES if p[0] not in CPU_ONLY])
    first = next(n for n in done.nodes if n.op.name == "kernel")
    assert first.attrs["family"] == "attention"
    inside = {n.op.name for n in first.regions[0].nodes}
    assert {"attention", "abs", "mul"} <= inside


def test_repeated_heads_are_shared() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x[:, :, None].expand(2, 2, 2, 9, 8).reshape(2, 4, 9, 8) for x in (k, v))
        return by_hand(q, k, v, lambda s: s)

    graph, _ = check(fn, *qkv(2))
    (node,) = (n for n in graph.nodes if n.op.name == "attention")
    assert node.args[1].shape[1] == 2


def test_scores_that_are_returned_stay() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        p = torch.softmax(q @ k.transpose(-1, -2), -1)
        return p @ v, p

    _, info = check(fn, *qkv(), count=0)
    assert any("something else reads the weights" in note for note in info.notes)


def test_dropout_is_left_alone() -> None:
    fast, seen = compiled(lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5) @ v, dynamic=False)
    assert fast(*qkv()).shape == (2, 4, 9, 8)
    assert any("dropout" in note for note in seen[0][0].notes)


# ---------------------------------------------------------------- flex_attention

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TABLE = torch.linspace(-1, 1, 4 * 40 * 40).reshape(4, 40, 40)

FLEX: dict[str, tuple[Any, Any, int]] = {
    "softcap_window": (lambda s, b, h, i, j: torch.tanh(s / 5) * 5, lambda b, h, i, j: (i >= j) & (i - j < 7), 1),
    "table": (lambda s, b, h, i, j: s + TABLE[h, i, j], None, 1),
    "alibi": (lambda s, b, h, i, j: s + SLOPES[h] * (j - i), lambda b, h, i, j: i >= j, 1),
    "empty_rows": (None, lambda b, h, i, j: i > j, 1),
    "by_head": (lambda s, b, h, i, j: s * (1 + h), lambda b, h, i, j: i > j, 0),
}


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention(name: str) -> None:
    score_mod, mask_mod, count = FLEX[name]
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 40, 16, generator=g) for h in (4, 2, 2))
    blocks = create_block_mask(mask_mod, None, None, 40, 40, device="cpu") if mask_mod else None

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks, enable_gqa=True)

    graph, _ = check(fn, q, k, v, count=count)
    if name == "softcap_window":
        (attrs,) = found(graph)
        assert (attrs["causal"], attrs["window"], attrs["softcap"]) == (True, 7, 5.0)


def test_longformer() -> None:
    """Its windows are read by ``as_strided``: what they are read from must lie as eager's does. Padding included."""
    import tessel

    config = transformers.LongformerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        attention_window=8,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = transformers.LongformerModel(config).eval()
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, -7:] = 0
    inputs = {"input_ids": torch.randint(3, 64, (2, 32)), "attention_mask": mask}
    with torch.no_grad():
        want, got = model(**inputs)[0], tessel.compile(model, target="cpu")(**inputs)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_attention_written_out_is_found_without_weights() -> None:
    """On ``meta``, of which torch cannot say whether autocast is on."""
    q, k, v = (x.to("meta") for x in qkv())
    graph = export_graph(ByHand(), (q, k, v)).graph
    assert sum(n.op.name == "attention" for n in graph.nodes) == 1


class ByHand(torch.nn.Module):
    """Attention written out."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return by_hand(q, k, v, lambda scores: scores)


def test_a_condition_that_asks_where_a_rank_stands_stays() -> None:
    graph = parse_graph(
        """graph "g"
  %q: f32[1,1,4,8] = input "q"
  %p: f32[s0] = input "p"
  %zero = full(shape=(1, 1, 4, 4), value=0, dtype=i64)
  %at = add(%zero, s0)
  %c = ge(%at, 1)
  %o, %l = attention(%q, %q, %q, %c, causal=False, scale=0.5)
  return %o""",
        OPS,
    )
    assert print_graph(masks.run(graph)) == print_graph(graph)
