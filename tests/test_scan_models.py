"""Models of transformers with recurrences, small and with random weights: equal to eager, with gradients, and with as
many nodes for one length as for another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tessel

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "use_cache": False}


def mamba(**more: Any) -> torch.nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**SMALL, state_size=8, num_hidden_layers=1, **more))


def mamba_by_loop() -> torch.nn.Module:
    return mamba(use_associative_scan=False)


def mamba2() -> torch.nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16}
    return Mamba2ForCausalLM(Mamba2Config(**SMALL, **sizes, num_hidden_layers=1))


def recurrent_gemma() -> torch.nn.Module:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "lru_width": 32, "block_types": ["recurrent"]}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SMALL, **sizes, num_hidden_layers=1))


def falcon_h1() -> torch.nn.Module:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 32}
    sizes |= {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
    return FalconH1ForCausalLM(FalconH1Config(**SMALL, **sizes, num_hidden_layers=1))


def qwen3_next() -> torch.nn.Module:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sizes |= {"shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **sizes, num_hidden_layers=1))


MODELS: list[Callable[[], torch.nn.Module]] = [mamba, mamba_by_loop, mamba2, recurrent_gemma, falcon_h1, qwen3_next]
# Two lengths of one kind: Mamba-2 and Falcon-H1 pad to whole chunks of 16 tokens, Qwen3-Next of 64, and a loop has
# four steps or more.
LENGTHS = {qwen3_next: (260, 330)}


def run(make: Callable[[], torch.nn.Module], length: int, train: bool) -> tessel.report.Report:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = make().train(train)
    x = torch.randint(3, 60, (1, length))
    made = tessel.compile(model, target="cpu")
    with torch.set_grad_enabled(train):
        given = {"input_ids": x, **({"labels": x} if train else {})}
        got, want = made(**given), model(**given)
    assert (got.logits - want.logits).abs().max() <= 2e-5 * want.logits.abs().max()
    if train:
        weights = [p for p in model.parameters() if p.requires_grad]
        grads = [torch.autograd.grad(o.loss, weights, allow_unused=True) for o in (got, want)]
        for a, b in zip(*grads, strict=True):
            if b is not None:
                assert a is not None and (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1e-4)
    return tessel.explain(made)


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_equal_to_eager_and_no_longer_than_need_be(make: Callable[[], torch.nn.Module]) -> None:
    short, long = LENGTHS.get(make, (40, 72))
    counts = {run(make, n, False).captured for n in (short, long)}
    assert len(counts) == 1


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_gradients(make: Callable[[], torch.nn.Module]) -> None:
    run(make, 40, True)


def test_the_chunked_delta_rule_is_as_exact_as_eager() -> None:
    """Gradients of decays are sums that cancel. The model computes its rule in float32 whatever its own dtype is, so
    a model in float64 repeats eager's rounding and is no oracle: by it, Tessel's gradient of ``dt_bias`` in a model of
    four layers was off by 1e-3 of its largest element. Here the rule's own casts are to float64."""
    import inspect

    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    rule = qwen.torch_chunk_gated_delta_rule
    text = inspect.getsource(rule)
    text = text[text.index("def ") :].replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    names: dict[str, Any] = dict(vars(qwen))
    exec(text, names)
    b, time, h, d = 1, 40, 4, 8
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, time, h, d) * 0.02 for _ in range(3))
    beta, a, log = torch.rand(b, time, h), torch.randn(b, time, h) * 0.02, torch.log(torch.rand(h) * 16)
    weight = torch.randn(b, time, h, d)

    def gradients(rule: Any, run: Any, *args: torch.Tensor) -> Any:
        def fn(q: Any, k: Any, v: Any, beta: Any, a: Any, bias: Any, log: Any) -> Any:
            g = -log.exp() * torch.nn.functional.softplus(a + bias)
            return rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

        given = [x.clone().requires_grad_() for x in args]
        return torch.autograd.grad((run(fn)(*given) * weight.to(args[0].dtype)).sum(), given)

    args = (q, k, v, beta, a, torch.ones(h), log)
    exact = gradients(names[rule.__name__], lambda fn: fn, *(x.double() for x in args))
    eager = gradients(rule, lambda fn: fn, *args)
    torch._dynamo.reset()
    got = gradients(rule, lambda fn: tessel.compile(fn, target="cpu"), *args)
    for x, y, z in zip(got, exact, eager, strict=True):
        assert (x - y).abs().max() <= 4 * (z - y).abs().max() + 1e-6 * y.abs().max()
