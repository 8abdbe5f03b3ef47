"""Whole models, forward and backward, captured both ways and evaluated node by node."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from evaluate import run
from test_capture import compiled

from tessel.frontend.capture import export_graph
from tessel.frontend.importer import Imported

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

_SIZES = {"num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small model without dropout, and inputs for one call."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 12))
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0, use_cache=False)
        return transformers.GPT2LMHeadModel(config), {"input_ids": ids}
    wide = {"intermediate_size": 64, "max_position_embeddings": 64}
    if name == "bert":
        config = transformers.BertConfig(**_SIZES, **wide, **_NO_DROPOUT)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        return transformers.BertForMaskedLM(config), {"input_ids": ids, "attention_mask": mask}
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, {"num_local_experts": 4}),
    }
    config_type, model_type, more = kinds[name]
    config = config_type(**_SIZES, **wide, num_key_value_heads=2, use_cache=False, **more)
    return model_type(config), {"input_ids": ids}


def tensors(out: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(out.to_tuple())
    return [x for x in leaves if isinstance(x, torch.Tensor)]


def near(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def whole(imported: Imported) -> Counter[str]:
    assert not imported.fallbacks, list(map(str, imported.fallbacks))
    return Counter(n.op.name for n in imported.graph.nodes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_inference(name: str) -> None:
    model, inputs = build(name)
    model.eval()
    fast, seen = compiled(model, fullgraph=True)
    with torch.no_grad():
        near(tensors(fast(**inputs)), tensors(model(**inputs)))
    count = whole(seen[0][1])
    assert count["attention"] == 2
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dynamic_length(name: str) -> None:
    model, inputs = build(name)
    model.eval()
    fast, seen = compiled(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 12), (3, 7), (5, 9)):
            cut = {k: x[:1, :length].expand(batch, -1).contiguous() for k, x in inputs.items()}
            near(tensors(fast(**cut)), tensors(model(**cut)))
    assert len(seen) == 1
    assert whole(seen[0][1])["attention"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_training_step(name: str) -> None:
    model, inputs = build(name)
    other = copy.deepcopy(model)
    fast, seen = compiled(model, fullgraph=True)
    for m, run_it in ((model, fast), (other, other)):
        logits = run_it(**inputs).logits
        labels = inputs["input_ids"].roll(1, 1).flatten()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
        assert any(p.grad is not None for p in m.parameters())
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")
    assert [info.kind for info, _ in seen] == ["forward", "backward"]
    if name != "mixtral":  # its experts' gradient is a custom operator of the library
        assert whole(seen[0][1])["attention"] == 2
        assert whole(seen[1][1])["attention_backward"] == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_export(name: str) -> None:
    model, inputs = build(name)
    model.eval()
    imported = export_graph(model, (), inputs)
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    rest = iter(inputs.values())
    given = []
    for node in imported.graph.inputs:
        role = node.attrs["role"]
        if role != "constant":
            given.append(state[node.attrs["name"]] if role in ("param", "buffer") else next(rest))
    with torch.no_grad():
        got = [x for x in run(imported, given) if isinstance(x, torch.Tensor)]
        near(got, tensors(model(**inputs)))
    assert whole(imported)["attention"] == 2
