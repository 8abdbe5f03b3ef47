"""The public face: what a user may do with a compiled module or function, and what bad input gets."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tessel
from tessel import TesselError


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("TESSEL_DUMP", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


class Block(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


Compile = Callable[..., Any]


@pytest.fixture(params=["cpu", "triton-interpret"])
def tc(request: pytest.FixtureRequest) -> Compile:
    """``tessel.compile`` for each target that needs no GPU."""
    return functools.partial(tessel.compile, target=request.param)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def same(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tessel.Report:
    """Compiled equals eager; the report of the compilation."""
    fast = tessel.compile(fn)
    close(fast(*args, **kwargs), fn(*args, **kwargs))
    return tessel.explain(fast)


# -- ways to call it --------------------------------------------------------------------------------


def test_module_function_and_decorators() -> None:
    x = torch.randn(3, 8)
    report = same(Block(), x)
    assert report.captured > 5 and report.name == "Block"

    @tessel.compile
    def twice(x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        return x * 2

    @tessel.compile(dynamic=True, options={"debug": 0})
    def thrice(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    assert twice.__name__ == "twice" and twice.__doc__ == "Doubles."
    close(twice(x), x * 2)
    close(thrice(x), x * 3)


def test_a_method_and_a_callable_object() -> None:
    class Thing:
        @tessel.compile
        def f(self, x: torch.Tensor, y: float = 2.0) -> torch.Tensor:
            return x * y

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    x = torch.randn(4)
    close(Thing().f(x, y=3.0), x * 3)
    close(tessel.compile(Thing())(x), x + 1)


def test_torch_compile_finds_the_backend_by_name() -> None:
    x = torch.randn(4)
    f = torch.compile(lambda x: x.exp() + 1, backend="tessel", options={"target": "cpu", "fusion": False})
    close(f(x), x.exp() + 1)
    with pytest.raises(Exception, match="has no modes"):
        torch.compile(lambda x: x + 1, backend="tessel", mode="max-autotune")(x)


def test_a_compiled_module_is_still_that_module() -> None:
    model = Block()
    fast = tessel.compile(model)
    assert isinstance(fast, nn.Module) and fast.norm is model.norm
    assert [p.data_ptr() for p in fast.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert {k.removeprefix("_orig_mod.") for k in fast.state_dict()} == set(model.state_dict())
    fast.eval()
    assert not model.training and not fast.training
    fast.extra = 5
    assert model.extra == 5
    x = torch.randn(2, 8)
    close(fast(x), model(x))
    close(copy.deepcopy(fast)(x), model(x))


# -- inputs and outputs -----------------------------------------------------------------------------


def test_keyword_nested_and_other_arguments(tc: Compile) -> None:
    def f(x: Any, *, scale: float = 1.0, more: Any = None) -> Any:
        y = x["a"] * scale + more[0][1]
        return {"y": y, "n": y.shape[0], "none": None, "pair": (y.sum(), [x["a"]])}

    x, z = torch.randn(3, 4), torch.randn(4)
    fast = tc(f)
    got = fast({"a": x}, scale=2.0, more=[(None, z)])
    want = f({"a": x}, scale=2.0, more=[(None, z)])
    assert got["n"] == 3 and got["none"] is None and got["pair"][1][0] is x
    close(got["y"], want["y"])
    close(got["pair"][0], want["pair"][0])


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24.0).reshape(4, 6)[1:, ::2],
        torch.arange(4.0).expand(3, 4),
        torch.arange(4.0)[:, None].expand(4, 3),
        torch.zeros(0, 5),
        torch.zeros(5, 0),
        torch.tensor(3.0),
        torch.ones(1),
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "expanded", "expanded-inner", "no-rows", "no-columns", "0-d", "one", "channels-last"],
)
def test_layouts(tc: Compile, x: torch.Tensor) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 2).exp(), x + 1, x.sum(-1) if x.dim() else x.sum()

    got, want = tc(f)(x), f(x)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.stride() == w.stride() and g.dtype == w.dtype
        close(g, w)


def test_outputs_that_are_inputs_or_views_of_them(tc: Compile) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, x[1:], x.t(), (x + 1)[0]

    x = torch.randn(3, 4)
    got = tc(f)(x)
    assert got[0] is x
    for g, w in zip(got[:3], f(x)[:3], strict=True):
        assert g.data_ptr() == w.data_ptr() and g.stride() == w.stride()
    got[1].zero_()
    assert float(x[1:].abs().sum()) == 0


def test_tied_weights(tc: Compile) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(i))

    model = Tied()
    i = torch.tensor([[1, 2, 3]])
    tc(model)(i).pow(2).sum().backward()
    got, model.embed.weight.grad = model.embed.weight.grad, None
    model(i).pow(2).sum().backward()
    close(got, model.embed.weight.grad)


def test_an_index_out_of_range_is_eagers_error(tc: Compile) -> None:
    embed = nn.Embedding(10, 4)
    fast = tc(embed)
    fast(torch.tensor([1]))
    with pytest.raises(IndexError, match="index out of range in self"):
        fast(torch.tensor([10]))


# -- state ------------------------------------------------------------------------------------------


def test_batchnorm_statistics_and_modes(tc: Compile) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    twin = copy.deepcopy(model)
    fast = tc(model)
    for _ in range(3):
        x = torch.randn(5, 4)
        close(fast(x), twin(x))
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        close(a, b)
    fast.eval(), twin.eval()
    close(fast(x), twin(x))


def test_mutated_inputs(tc: Compile) -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, at, x)
        return cache.sum(1)

    def swap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        old = a.clone()
        a.copy_(b)
        b.copy_(old)
        return a + 1

    cache, x = torch.zeros(2, 5, 3), torch.randn(2, 1, 3)
    twin = cache.clone()
    fast = tc(step)
    for n in range(3):
        at = torch.tensor([n])
        close(fast(cache, at, x), step(twin, at, x))
    close(cache, twin)
    a, b = torch.randn(3), torch.randn(3)
    want = (b.clone(), a.clone())
    close(tc(swap)(a, b), want[0] + 1)
    close((a, b), want)
    strided = torch.zeros(4, 6).t()[::2]  # a mutated view keeps its place in memory
    tc(lambda x: x.add_(1))(strided)
    close(strided, torch.ones(3, 4))


def test_dropout_draws_eagers_numbers(tc: Compile) -> None:
    model = Block(dropout=0.5)
    fast = tc(model)
    x = torch.randn(64, 8)
    torch.manual_seed(7)
    got = fast(x)
    torch.manual_seed(7)
    close(got, model(x))


def test_autocast_and_no_grad(tc: Compile) -> None:
    model, x = Block(), torch.randn(4, 8)
    fast = tc(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = fast(x), model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        got = fast(x)
    assert not got.requires_grad
    close(got, model(x).detach())


def test_a_hook_added_after_the_first_call_runs(tc: Compile) -> None:
    model, x = Block(), torch.randn(2, 8)
    fast = tc(model)
    fast(x)
    handle = model.up.register_forward_hook(lambda m, i, o: o * 2)
    close(fast(x), model(x))
    handle.remove()
    close(fast(x), model(x))


def test_training_loop_equals_eager(tc: Compile) -> None:
    model = nn.Sequential(Block(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    fast = tc(model)
    a = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    b = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x, y = torch.randn(6, 8), torch.randint(3, (6,))
        losses = []
        for m, o in ((fast, a), (twin, b)):
            o.zero_grad()
            loss = nn.functional.cross_entropy(m(x), y)
            loss.backward()
            o.step()
            losses.append(loss.detach())
        close(*losses)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=f"step {step}")


def test_gradients_of_inputs_and_second_use(tc: Compile) -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(x @ w, -1) * x).sum()

    x, w = (torch.randn(5, 5, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(tc(f)(x, w), (x, w))
    close(got, torch.autograd.grad(f(x, w), (x, w)))


# -- shapes -----------------------------------------------------------------------------------------


def test_one_dynamic_compile_serves_every_size_from_two_on(tc: Compile) -> None:
    model = Block()
    fast = tc(model, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3), (5, 2), (7, 11), (2, 2)):
            x = torch.randn(*shape, 8)
            close(fast(x), model(x))
    report = tessel.explain(fast)
    assert len(report.compilations) == 1 and not report.recompiles


def test_recompiles_are_counted_and_explained() -> None:
    @tessel.compile(dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    for n in (2, 3, 4):
        double(torch.ones(n))
    report = tessel.explain(double)
    assert [r.number for r in report.recompiles] == [1, 2]
    assert "size" in report.recompiles[0].reason and "double" in report.recompiles[0].function
    assert "2 recompiles" in str(report)
    # another caller's compilations of the same function are none of its own
    other = tessel.compile(double._torchdynamo_orig_callable, options={"fusion": False})
    other(torch.ones(5))
    assert not tessel.explain(other).recompiles


def test_the_recompile_limit_is_said() -> None:
    @tessel.compile(dynamic=False, options={"recompile_limit": 2})
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(2, 7):
            close(double(torch.ones(n)), torch.full((n,), 2.0))
    said = [str(w.message) for w in caught if issubclass(w.category, tessel.RecompileLimit)]
    assert len(said) == 1 and "double" in said[0] and "2 times" in said[0] and "size" in said[0]
    assert any("limit" in n for n in tessel.explain(double).notes)

    @tessel.compile(dynamic=False, fullgraph=True, options={"recompile_limit": 1})
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    triple(torch.ones(2))
    with pytest.raises(TesselError, match="triple.*limit"):
        triple(torch.ones(3))
        triple(torch.ones(4))


def test_numbers_read_from_tensors(tc: Compile) -> None:
    def f(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return x * n.item() + torch.nonzero(x > 0).float().sum()

    x = torch.randn(6)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        fast = tc(f)
        for n in (2, 3):
            close(fast(x, torch.tensor(n)), f(x, torch.tensor(n)))


# -- what is not supported runs all the same --------------------------------------------------------


def test_custom_operators_and_odd_ones_run_opaque() -> None:
    @torch.library.custom_op("tessel_test::shift", mutates_args=())
    def shift(x: torch.Tensor, by: int) -> torch.Tensor:
        return torch.roll(x, by)

    @shift.register_fake
    def _(x: torch.Tensor, by: int) -> torch.Tensor:
        return torch.empty_like(x)

    def f(x: torch.Tensor) -> Any:
        _, s, _ = torch.linalg.svd(x @ x.t() + torch.eye(3))
        return torch.ops.tessel_test.shift(x, 1) + 1, s, torch.unique_consecutive(torch.tensor([1, 1, 2]))

    x = torch.randn(3, 3)
    report = same(f, x)
    assert any("shift" in c.operator and c.reason for c in report.fallbacks)
    assert "shift" in str(report) and "custom" in str(report)


def test_graph_breaks_and_prints() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        print("here")
        return y * 2

    same(f, torch.ones(2))
    with pytest.raises(TesselError, match="fullgraph=True"):
        tessel.compile(f, fullgraph=True)(torch.ones(2))


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "h10"}, "unknown target 'h10'; did you mean 'h100'"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"target": 3}, "unknown target 3"),
        ({"options": {"fussion": True}}, "did you mean 'fusion'"),
        ({"options": {"fusion": 3}}, "fusion: expected bool"),
        ({"options": 3}, "expected Options"),
        ({"quantize": "int4"}, "quantize='int4'"),
        ({"plan": {}}, "plan={}"),
        ({"dynamic": "yes"}, "dynamic='yes'"),
        ({"fullgraph": None}, "fullgraph=None"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TesselError, match=re.escape(words)):
        tessel.compile(lambda x: x, **arguments)
    with pytest.raises(TesselError, match=re.escape(words)):
        tessel.compile(**arguments)


def test_not_callable() -> None:
    for call in (lambda: tessel.compile("model"), lambda: tessel.compile()(5), lambda: tessel.explain(5)):
        with pytest.raises(TesselError, match="expected an nn.Module or a function"):
            call()


@pytest.mark.parametrize("target", ["h100", "cuda", "mi300x"])
def test_a_device_that_the_target_is_not_for(target: str) -> None:
    fast = tessel.compile(Block(), target=target)
    with pytest.raises(TesselError, match=f"target '{target}'.*cuda.*on cpu") as caught:
        fast(torch.ones(2, 8))
    assert "\n" not in str(caught.value)
    with pytest.raises(TesselError, match="target 'cpu'.*on meta"):
        tessel.compile(lambda x: x + 1, target="cpu")(torch.ones(2, device="meta"))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x @ torch.ones(3, 7),
        lambda x: x + torch.ones(5),
        lambda x: x.reshape(7),
        lambda x: x.bogus(),
        lambda x: x[:, 99],
        lambda x: torch.cat([x, x[0]]),
        lambda x: x.to(torch.complex64) % 2,
        lambda x: x.to(torch.float8_e4m3fn) + x.to(torch.float8_e4m3fn),
        lambda x: x + torch.ones(2, 4, device="meta"),
        lambda x: nn.functional.embedding(torch.tensor([0, 99]), x),
        lambda x: nn.functional.cross_entropy(x, torch.tensor([0, 99])),
        lambda x: 1 // 0 + x,
    ],
)
def test_what_eager_refuses_gets_eagers_exception(f: Callable[..., Any]) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(Exception) as eager:
        f(x)
    with pytest.raises(type(eager.value)) as compiled:
        tessel.compile(f)(x)
    assert type(compiled.value) is type(eager.value)
    assert "Dynamo" not in str(compiled.value) and "FakeTensor" not in str(compiled.value)


def test_complex_and_float8_that_eager_allows() -> None:
    x = torch.randn(4)
    same(lambda x: (x.to(torch.complex64) * 1j).abs(), x)
    same(lambda x: x.to(torch.float8_e4m3fn).to(torch.float32) * 2, x)


def test_any_parameter_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = ["with space", "quo'te", 'double"quote', "Größe", "back\\slash", "new\nline", "日本"]
            for n in self.names:
                self.register_parameter(n, nn.Parameter(torch.randn(3)))
            self.by_key = nn.ParameterDict({"a b": nn.Parameter(torch.randn(3)), "ü'": nn.Parameter(torch.randn(3))})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for n in self.names:
                x = x * 2 + getattr(self, n)
            for k in self.by_key:
                x = x + self.by_key[k]
            return x

    report = same(Odd(), torch.randn(3))
    assert "Größe" not in report.compilations[0].host  # generated text is plain ASCII
    assert report.html().startswith("<!doctype html>")


def test_a_very_deep_model() -> None:
    class Deep(nn.Module):
        def __init__(self, inner: nn.Module | None) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if self.inner is None else self.inner(x) * 1.0

    def deep(n: int) -> nn.Module:
        model: nn.Module = Deep(None)
        for _ in range(n):
            model = Deep(model)
        return model

    x = torch.ones(2)
    with pytest.raises(RecursionError):  # as eager
        tessel.compile(deep(2000))(x)
    model = deep(150)  # not too deep for eager, but for torch's tracing
    with pytest.warns(UserWarning, match="setrecursionlimit"):
        close(tessel.compile(model)(x), model(x))


def test_many_modules_in_a_row() -> None:
    model = nn.Sequential(*(nn.Hardtanh(-9.0, 9.0) for _ in range(300)))
    same(model, torch.randn(3))


def test_a_bilinear_layer_and_its_gradients() -> None:
    layer, both = nn.Bilinear(3, 5, 4).double(), [torch.randn(7, n, dtype=torch.float64) for n in (3, 5)]
    compiled = tessel.compile(layer, target="cpu")
    got = []
    for f in (compiled, layer):
        xs = [x.clone().requires_grad_() for x in both]
        got.append(torch.autograd.grad(f(*xs).square().sum(), [*xs, *layer.parameters()]))
    torch.testing.assert_close(*got)
    assert all(not c["fallbacks"] for c in tessel.explain(compiled).to_dict()["compilations"])


# -- explain ----------------------------------------------------------------------------------------


def test_explain_leaves_no_trace_and_shows_the_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 4)
    state = torch.get_rng_state()
    report = tessel.explain(model, x)
    assert torch.equal(state, torch.get_rng_state())
    close(dict(model.state_dict()), dict(before))
    assert all(p.grad is None for p in model.parameters())
    assert {c.kind for c in report.compilations} == {"forward", "backward"}
    text, data, page = str(report), report.to_dict(), report.html()
    for c in data["compilations"]:
        assert c["passes"][0]["graph"] and c["host"].startswith('"""')
    assert "nodes captured" in text and "nothing fell back" in text
    assert page.count("<h2>") == 3 and "http" not in page.split("</style>")[1].split("<h3>")[0]
    import json

    json.dumps(data)


def test_explain_sends_arguments_of_compile_to_compile() -> None:
    with pytest.raises(TesselError, match=r"takes no 'target'.*compile\(model, target=...\)"):
        tessel.explain(nn.Linear(3, 4), torch.randn(2, 3), target="cpu")
    with pytest.raises(TesselError, match="takes no 'options'"):
        tessel.explain(tessel.compile(lambda x: x + 1), torch.randn(2), options={})
    report = tessel.explain(lambda x, target: x + target, torch.randn(2), target=torch.ones(2))  # its own
    assert len(report.compilations) == 1


def test_explain_does_not_use_up_the_recompile_limit() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    for n in range(2, 14):
        assert len(tessel.explain(f, torch.ones(n)).compilations) == 1


def test_calls_run_under_the_users_configuration() -> None:
    from torch._dynamo import config

    seen = []

    @torch._dynamo.disable
    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(config.skip_nnmodule_hook_guards)
        return x

    compiled = tessel.compile(lambda x: look(x + 1) * 2, target="cpu")
    for rows in (3, 3, 4):  # the third compiles again
        x = torch.randn(rows)
        assert torch.equal(compiled(x), (x + 1) * 2)
    assert len(seen) == 3 and seen[1] is config.skip_nnmodule_hook_guards is True


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu")]
)
def test_plain_graphs_run_directly_and_right(around: Any) -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 3)

    def fn(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.mm(a, b), a.sum(1)

    compiled = tessel.compile(fn, target="cpu", options={"matmul": "library"})
    with around():
        want = fn(a, b)
        for _ in range(2):
            got = compiled(a, b)
            for x, y in zip(got, want, strict=True):
                assert x.dtype == y.dtype and x.is_inference() == y.is_inference() and not x.requires_grad
                torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)


def test_memory_that_is_read_by_strides_lies_as_in_eager() -> None:
    def windows(x: torch.Tensor) -> torch.Tensor:
        y = (x.permute(1, 0, 2) + 1).contiguous().exp()
        return (x.permute(1, 0, 2) * 2).reshape(6, 8, 4).as_strided((3, 2, 4), (32, 8, 1)) + y.as_strided(
            (3, 2, 4), (2, 7, 1)
        )

    x = torch.randn(8, 6, 4)
    torch.testing.assert_close(tessel.compile(windows, target="cpu")(x), windows(x))
