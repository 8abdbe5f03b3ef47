"""Models of transformers with random weights, whole: by C++ kernels and by the IR's interpreter, against float64.

Asked of every model: results and gradients no further from a run in float64 than a small multiple of eager's own
distance; nothing that the importer could not express, and no operator of torch but those named here; and of models with
recurrences as many nodes for one length as for another.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

import tessel
from tessel.frontend import library_functions, scan_trace
from tessel.frontend.capture import GraphInfo, aot
from tessel.frontend.importer import Imported
from tessel.ir.interp import interpret
from tessel.ir.node import Graph

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.slow

TEXT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "use_cache": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EAGER = {"attn_implementation": "eager"}


def causal(kind: str, **sizes: Any) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**TEXT, **sizes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)  # type: ignore[no-any-return]


def mamba(**more: Any) -> torch.nn.Module:
    return causal("Mamba", state_size=8, num_hidden_layers=1, **more)


def mamba_by_loop() -> torch.nn.Module:
    return mamba(use_associative_scan=False)


def mamba2() -> torch.nn.Module:
    sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16}
    return causal("Mamba2", **sizes, num_hidden_layers=1)


def recurrent_gemma() -> torch.nn.Module:
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "lru_width": 32}
    kinds = ["recurrent", "attention"]
    return causal("RecurrentGemma", **sizes, block_types=kinds, num_hidden_layers=2, attention_window_size=16)


def falcon_h1() -> torch.nn.Module:
    sizes = {"intermediate_size": 64, **HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    sizes |= {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
    return causal("FalconH1", **sizes, num_hidden_layers=1)


def qwen3_next() -> torch.nn.Module:
    sizes = {"intermediate_size": 64, **HEADS, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2}
    sizes |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = ["linear_attention", "full_attention"]
    return causal("Qwen3Next", **sizes, num_hidden_layers=2, layer_types=kinds)


def gemma2() -> torch.nn.Module:
    """Soft caps, and windows in every other layer."""
    return causal("Gemma2", intermediate_size=48, **HEADS, head_dim=8, num_hidden_layers=2, sliding_window=5, **EAGER)


def gpt_oss() -> torch.nn.Module:
    """Sinks."""
    more = {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}
    return causal("GptOss", intermediate_size=48, **HEADS, **more, num_hidden_layers=2, **EAGER)


def deepseek_v3() -> torch.nn.Module:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    more = {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_attention_heads": 4}
    return causal("DeepseekV3", intermediate_size=48, **more, **ranks, **experts, num_hidden_layers=2)


def mixtral() -> torch.nn.Module:
    return causal("Mixtral", intermediate_size=48, **HEADS, num_local_experts=4, num_hidden_layers=1)


def t5() -> torch.nn.Module:
    """Biases by relative position; an encoder and a decoder."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    sizes |= {"num_layers": 2, "num_decoder_layers": 1}  # of two layers the second has the first one's bias
    config = transformers.T5Config(**sizes, dropout_rate=0.0, use_cache=False, **EAGER)
    return transformers.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def longformer() -> torch.nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    more = {"attention_window": 8, "max_position_embeddings": 128, "num_hidden_layers": 1}
    return transformers.LongformerModel(transformers.LongformerConfig(**sizes, **more))  # type: ignore[no-any-return]


Make = Callable[[], torch.nn.Module]
RECURRENT: list[Make] = [mamba, mamba_by_loop, mamba2, recurrent_gemma, falcon_h1, qwen3_next]
MODELS: list[Make] = [*RECURRENT, gemma2, gpt_oss, deepseek_v3, mixtral, t5, longformer]


class Widened(TorchFunctionMode):
    """What a model's own code computes in float32 whatever the model's dtype is, such as norms, in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return torch.Tensor.double(*given[0]) if func is torch.Tensor.float else func(*given[0], **given[1])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(make: Make) -> torch.nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make().eval()


def exact_of(model: torch.nn.Module) -> torch.nn.Module:
    """To be run under ``Widened``."""
    exact: Any = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # grouped products have no float64
    return exact  # type: ignore[no-any-return]


def given(make: Make, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))
    if make is t5:
        return {"input_ids": ids, "decoder_input_ids": ids[:, : length // 2]}
    if make is longformer:
        mask = torch.ones_like(ids)
        mask[1, -7:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 distance; NaN counts as infinitely far."""
    far = float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    return far if far == far else float("inf")


def gradients(run: Callable[..., Any], model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """The result, and the gradients of all parameters that have one."""
    out = run(**inputs)[0]
    weights = dict(model.named_parameters())
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), list(weights.values()), allow_unused=True)
    return out.detach(), dict(zip(weights, grads, strict=True))


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_by_kernels(make: Make) -> None:
    """Forward alone, and with gradients."""
    model, inputs = build(make), given(make, 40)
    exact = exact_of(model)
    fast = tessel.compile(model, target="cpu")
    with torch.no_grad():
        alone = fast(**inputs)[0]
    (got, grads), (eager, plain) = (gradients(run, model, inputs) for run in (fast, model))
    with Widened():
        want, best = gradients(exact, exact, inputs)
    limit = max(3 * error(eager, want), 2e-6)
    assert error(alone, want) <= limit and error(got, want) <= limit
    largest = max(float(g.norm()) for g in best.values() if g is not None)
    for name, g in best.items():
        assert (g is None) == (plain[name] is None) == (grads[name] is None), name
        if g is not None:
            ours, theirs = (float((x[name].double() - g).norm()) for x in (grads, plain))
            assert ours <= max(3 * theirs, 5e-6 * float(g.norm()), 1e-8 * largest), name
    report = tessel.explain(fast)
    if make is not longformer:  # which asks its mask whether any token is global: torch breaks the graph there
        assert [c.kind for c in report.compilations] == ["inference", "forward", "backward"]
    assert not report.fallbacks, [f.reason for f in report.fallbacks]


class Captured:
    """A model whose graphs are kept and run by the interpreter in float64."""

    def __init__(self, make: Make) -> None:
        self.make, self.model = make, build(make)
        self.graphs: list[Graph] = []

        def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
            return aot(gm, examples, self.keep)

        backend.__module__ = "tessel"  # what it traces is what Tessel's own backend traces
        scan_trace.register()
        library_functions.register()
        self.run = torch.compile(self.model, backend=backend)

    def keep(self, imported: Imported, info: GraphInfo) -> Callable[[list[Any]], Any]:
        self.graphs.append(imported.graph)

        def run(values: list[Any]) -> Any:
            rest = iter(values)
            names = [n.attrs["name"] for n in imported.graph.inputs]
            held = [imported.constants[n] if n in imported.constants else next(rest) for n in names]
            return interpret(imported.graph, held, precise=True)

        return run

    def nodes(self, length: int, fresh: bool) -> int:
        """Of the graphs of a call at this length, which is as exact as float64; ``fresh``: the first of its process."""
        if fresh:
            torch._dynamo.reset()
        before, inputs = len(self.graphs), given(self.make, length)
        with torch.no_grad():
            got = self.run(**inputs)[0]
            with Widened():
                want = exact_of(self.model)(**inputs)[0]
        assert error(got, want) <= 1e-9
        made = self.graphs[before:]
        assert len(made) == 1 or self.make is longformer
        return sum(len(g.nodes) for g in made)


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_by_the_interpreter(make: Make) -> None:
    """One graph; for recurrences with as many nodes for any length, and but for sizes where torch has seen another."""
    model = Captured(make)
    nodes = model.nodes(40, fresh=True)
    if make in RECURRENT:
        assert nodes <= model.nodes(24, fresh=False) <= 1.3 * nodes
        assert model.nodes(24, fresh=True) == nodes
