"""Real models from transformers, random weights, against a float64 run: the same numbers, gradients and tokens.

A tensor passes if its relative L2 error against float64 is at most 3 times eager's own, or 2e-6, in
float32, and at most twice eager's in bfloat16. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tessel
from tessel.errors import TesselError
from tessel.models import load_model
from tessel.wrapper import session_of

MODELS = (
    "llama",
    "qwen2",
    "mistral",
    "gemma3",
    "mixtral",
    "gpt2",
    "bert",
    "t5",
    "vit",
    "clip",
    "whisper",
    "mamba",
    "deepseek_v3",
)
TRAINED = ("llama", "gpt2", "bert", "vit", "mixtral")
EXPERTS = ("mixtral", "deepseek_v3")  # their float64 run needs the plain loop over experts
LAYERS = {"llama": 2, "deepseek_v3": 2}  # else one; the first of deepseek has no experts
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load(
    name: str, batch: int = 2, seq: int = 9, dtype: str = "f32", layers: int | None = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    layers = layers or LAYERS.get(name, 1)
    module, _, kwargs = load_model(f"hf:{name}", batch=batch, seq=seq, dtype=dtype, layers=layers, device="cpu")
    return module.eval(), kwargs


def double(name: str, module: torch.nn.Module, kwargs: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The same weights and inputs in float64."""
    exact = copy.deepcopy(module).double()
    if name in EXPERTS:
        exact.set_experts_implementation("eager")
    return exact, {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a model output, by name."""
    return {k: v for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 error; NaN counts as infinitely wrong."""
    distance = (got.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    return float(distance) if distance == distance else float("inf")


def same(
    got: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], half: bool
) -> None:
    assert got.keys() == eager.keys() == exact.keys() and got
    for name, want in exact.items():
        assert got[name].dtype == eager[name].dtype and got[name].shape == eager[name].shape, name
        ours, theirs = error(got[name], want), error(eager[name], want)
        bound = 2 * theirs if half else max(3 * theirs, 2e-6)
        assert ours <= bound, f"{name}: error {ours:.3g}, eager's own {theirs:.3g}"


def captures_whole(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether torch.compile itself has no graph break on the model."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(module)(**kwargs)
    torch._dynamo.reset()
    return found.graph_break_count == 0


@pytest.mark.parametrize("name", MODELS)
def test_inference(name: str) -> None:
    module, kwargs = load(name, layers=2)
    exact, exact_kwargs = double(name, module, kwargs)
    with torch.no_grad():
        fast = tessel.compile(module, target="triton-interpret", fullgraph=True)
        try:
            got = fast(**kwargs)
        except TesselError as e:
            assert not captures_whole(module, kwargs), f"the graph was broken where torch.compile does not: {e}"
            fast = tessel.compile(module, target="triton-interpret")
            got = fast(**kwargs)
        same(tensors(got), tensors(module(**kwargs)), tensors(exact(**exact_kwargs)), half=False)
    assert session_of(fast).report.kernels, "nothing was generated"


@pytest.mark.parametrize("name", MODELS)
def test_dynamic(name: str) -> None:
    """With dynamic=True the kernels of the first call serve other batches and lengths, where Dynamo's capture does."""
    module, kwargs = load(name)
    calls = (kwargs, load(name, 3, 5)[1])
    fast = tessel.compile(module, target="triton-interpret", dynamic=True)
    with torch.no_grad():
        for given in calls:
            exact, exact_given = double(name, module, given)
            same(tensors(fast(**given)), tensors(module(**given)), tensors(exact(**exact_given)), half=False)
    report = session_of(fast).report
    if len(report.compilations) > 1:
        assert name == "mamba", f"compiled again: {report.recompiles}"  # where its scan is unrolled by length
        captures = CompileCounter()
        plain = torch.compile(module, backend=captures, dynamic=True)
        with torch.no_grad():
            for given in calls:
                plain(**given)
        assert len(report.compilations) <= captures.frame_count, f"compiled again: {report.recompiles}"


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt2", "bert", "vit", "t5"))
def test_bfloat16(name: str) -> None:
    module, kwargs = load(name, dtype="bf16")
    exact, exact_kwargs = double(name, module, kwargs)
    with torch.no_grad():
        fast = tessel.compile(module, target="triton-interpret")
        same(tensors(fast(**kwargs)), tensors(module(**kwargs)), tensors(exact(**exact_kwargs)), half=True)


def loss_of(output: Any) -> torch.Tensor:
    return next(iter(tensors(output).values())).square().mean()


@pytest.mark.parametrize("name", TRAINED)
def test_training_step(name: str) -> None:
    """One step: the gradient of every parameter."""
    module, kwargs = load(name)
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    exact, exact_kwargs = double(name, module, kwargs)
    gradients = []
    fast = tessel.compile(module, target="triton-interpret")
    for run, owner, inputs in ((fast, module, kwargs), (module, module, kwargs), (exact, exact, exact_kwargs)):
        owner.zero_grad()
        loss_of(run(**inputs)).backward()
        gradients.append({n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None})
    same(*gradients, half=False)
    kinds = {c.kind for c in session_of(fast).report.compilations}
    assert kinds == {"forward", "backward"}


def test_generation_with_a_static_cache_gives_eagers_tokens() -> None:
    module, kwargs = load("llama", batch=2, seq=5)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
        "use_cache": True,
        "pad_token_id": 0,
    }
    want = module.generate(**kwargs, **settings)
    plain = module.forward
    fast = tessel.compile(module.forward, target="triton-interpret")
    calls = []

    def forward(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        return fast(*args, **kw)

    module.forward = forward  # type: ignore[method-assign]
    try:
        got = module.generate(**kwargs, **settings)
    finally:
        module.forward = plain  # type: ignore[method-assign]
    assert len(calls) == 6
    assert torch.equal(got, want)
