"""Functions of transformers that are traced as the operators they compute: equal with gradients, said, and refused."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tessel
from tessel.frontend import library_functions
from tessel.frontend.capture import export_graph
from tessel.frontend.library_forms import FUNCTIONS

pytest.importorskip("transformers")
Tensor = torch.Tensor
MODULES = {"mamba2_chunk_scan": "mamba2", "torch_chunk_gated_delta_rule": "qwen3_next"}
NAMES = list(MODULES)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def function(name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"transformers.models.{MODULES[name]}.modeling_{MODULES[name]}")
    return getattr(module, name)  # type: ignore[no-any-return]


def call(name: str, index: int, time: int | None = None) -> tuple[list[Tensor], Callable[..., Any]]:
    """The tensors of a sample, and a function of them that calls a function with the sample's arguments."""
    args, kwargs = list(FUNCTIONS[name][1]())[index]
    places: list[Any] = [*range(len(args)), *(k for k, v in kwargs.items() if isinstance(v, Tensor))]
    found = [(args[p] if isinstance(p, int) else kwargs[p]).detach() for p in places]
    if time is not None:
        found = [x[:, :1].expand(-1, time, *x.shape[2:]).clone() if x.dim() > 2 else x for x in found]

    def of(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> list[Tensor]:
            named = dict(zip(places, tensors, strict=True))
            more = {**kwargs, **{k: v for k, v in named.items() if isinstance(k, str)}}
            made = fn(*[named[i] for i in range(len(args))], **more)
            return [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]

        return run

    return found, of


def gradients(run: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    given = [x.detach().clone().requires_grad_() for x in tensors]
    results = run(*given)
    total = torch.stack([x.float().sin().sum() for x in results]).sum()
    return [*results, *torch.autograd.grad(total, given)]


def near(got: list[Tensor], want: list[Tensor], far: float) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert (x - y).abs().max() <= far * y.abs().max().clamp_min(0.1)


def names(report: tessel.report.Report, of: int = 0) -> list[str]:
    return [n.op.name for n in report.compilations[of].passes[0].graph.nodes]


@pytest.mark.parametrize(("name", "index"), [(n, i) for n in NAMES for i in range(3 if n == NAMES[0] else 2)])
def test_they_are_linear_attention(name: str, index: int) -> None:
    tensors, of = call(name, index)
    fn = of(function(name))
    fast = tessel.compile(fn, target="cpu", fullgraph=True)
    near(gradients(fast, tensors), gradients(fn, tensors), 3e-5)
    report = tessel.explain(fast)
    assert names(report).count("linear_attention") == 1 and names(report, 1).count("linear_attention_backward") == 1
    notes = [n for c in report.compilations for n in c.notes]
    assert sum(f"{name} is computed as tessel::linear_attention: equal on samples" in n for n in notes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_halves_and_any_length(name: str) -> None:
    """As many nodes for one length as for another, one capture where lengths are dynamic; halves as in eager."""
    counts = set()
    for time in (5, 70):
        tensors, of = call(name, 0, time)
        fn = of(function(name))
        torch._dynamo.reset()
        fast = tessel.compile(fn, target="cpu", fullgraph=True)
        with torch.no_grad():
            near(fast(*tensors), fn(*tensors), 3e-5)
        counts.add(len(names(tessel.explain(fast))))
    assert len(counts) == 1
    tensors, of = call(name, 0, 9)
    fast = tessel.compile(of(function(name)), target="cpu", dynamic=True)
    with torch.no_grad():
        for time in (9, 17):
            tensors, of = call(name, 0, time)
            near(fast(*tensors), of(function(name))(*tensors), 3e-5)
        assert len(tessel.explain(fast).compilations) == 1
        half = [x.bfloat16() for x in tensors]
        near(fast(*half), of(function(name))(*half), 2e-2)


def test_other_backends_trace_what_is_written() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    tensors, of = call(NAMES[0], 0)
    fn = of(function(NAMES[0]))
    with torch.no_grad():
        tessel.compile(fn, target="cpu")(*tensors)
        torch._dynamo.reset()
        near(torch.compile(fn, backend=keep)(*tensors), fn(*tensors), 1e-6)
    assert not any("tessel" in str(n.target) for n in graphs[0].graph.nodes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out, value: (out[0] * 1.01, out[1]), "its results differ from what it is taken for, by 0.0099"),
        (lambda out, value: 1 / 0 if value.shape[1] == 11 else out, "it cannot be tried: ZeroDivisionError"),
        (None, "its parameters are not those that are known"),
    ],
    ids=["numbers", "error", "parameters"],
)
def test_what_is_not_equal_is_traced_as_it_is(change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAMES[1]
    rule = function(name)
    place = f"transformers.models.other.modeling_other_{len(library_functions._found)}"
    module = types.ModuleType(place)
    if change is None:

        def torch_chunk_gated_delta_rule(*args: Any, **kwargs: Any) -> Any:
            return rule(*args, **kwargs)
    else:

        def torch_chunk_gated_delta_rule(  # type: ignore[misc]
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            chunk_size: int = 64,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            **kwargs: Any,
        ) -> Any:
            made = rule(
                query, key, value, g, beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel
            )
            return change(made, value)

    torch_chunk_gated_delta_rule.__module__ = place
    module.torch_chunk_gated_delta_rule = torch_chunk_gated_delta_rule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, place, module)
    tensors, of = call(name, 0, 9)
    fn = of(torch_chunk_gated_delta_rule)
    fast = tessel.compile(fn, target="cpu")
    with torch.no_grad():
        near(fast(*tensors), fn(*tensors), 3e-5)
    notes = [n for c in tessel.explain(fast).compilations for n in c.notes]
    assert any(place in n and "is traced as it is: " in n and words in n for n in notes), notes


def test_the_first_graph_of_torchs_own_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile(fn, backend="tessel")`` knows a module that was loaded after the last compilation."""
    name = NAMES[1]
    torch.compile(lambda x: x + 1, backend="tessel")(torch.ones(2))  # torch has the backend
    place = f"transformers.models.late.modeling_late_{len(library_functions._found)}"
    module, original = types.ModuleType(place), inspect.unwrap(function(name))
    late = types.FunctionType(
        original.__code__, original.__globals__, name, original.__defaults__, original.__closure__
    )
    late.__module__ = place
    setattr(module, name, late)
    monkeypatch.setitem(sys.modules, place, module)
    notes: list[str] = []
    compile_graph = tessel.backend.compile_graph

    def keep(imported: Any, info: Any, session: Any) -> Any:
        notes.extend(info.notes)
        return compile_graph(imported, info, session)

    monkeypatch.setattr(tessel.backend, "compile_graph", keep)
    tensors, of = call(name, 0, 9)
    with torch.no_grad():
        near(torch.compile(of(late), backend="tessel")(*tensors), of(late)(*tensors), 3e-5)
    assert [n for n in notes if place in n and "is computed as tessel::linear_attention" in n]


@pytest.mark.slow
def test_the_chunked_delta_rule_is_as_exact_as_eager() -> None:
    """Gradients of decays are sums that cancel. The model computes its rule in float32 whatever its own dtype is, so
    a model in float64 repeats eager's rounding and is no oracle: by it, Tessel's gradient of ``dt_bias`` in a model of
    four layers was off by 1e-3 of its largest element. Here the rule's own casts are to float64."""
    qwen = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
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


class _Rule(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return self.run(*tensors)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str) -> None:
    tensors, of = call(name, 0, 9)
    before = function(name)
    graph = export_graph(_Rule(of(lambda *a, **k: function(name)(*a, **k))), tensors).graph
    assert [n.op.name for n in graph.nodes].count("linear_attention") == 1
    assert function(name) is before


# ---------------------------------------------------------------- experts

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "use_cache": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def model(name: str) -> Any:
    import transformers as t

    if name == "Mixtral":
        more = {"num_local_experts": 4}
    elif name == "GptOss":
        more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    else:
        more = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 8}
    torch.manual_seed(0)
    made = getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**SIZES, **HEADS, **more))
    for parameter, p in made.named_parameters():
        if "bias" in parameter:
            torch.nn.init.normal_(p)
    made.set_experts_implementation("eager")
    return made


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo of torch 2.11 makes no constant of a configuration")
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe"])
def test_loops_over_experts(name: str) -> None:
    """Which experts are hit is not asked: one graph, and one operator for all of them."""
    m, ids = model(name), torch.randint(0, 64, (2, 9))

    def fn(ids: Tensor) -> Tensor:
        return m(input_ids=ids).logits  # type: ignore[no-any-return]

    fast = tessel.compile(fn, target="cpu", fullgraph=True)
    weights = dict(m.named_parameters())
    made = []
    for run in (fast, fn):
        out = run(ids)
        grads = torch.autograd.grad(out.sin().sum(), list(weights.values()), allow_unused=True)
        made.append([out.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
    for x, y in zip(*made, strict=True):
        assert x.shape == y.shape and (x - y).abs().max() <= 2e-5 * y.abs().max() + 1e-7
    report = tessel.explain(fast)
    assert len(report.compilations) == 2
    assert [c.operator for c in report.compilations[0].calls].count("experts") == 1
    assert any("is computed as grouped products of all experts" in n for n in report.compilations[0].notes)
