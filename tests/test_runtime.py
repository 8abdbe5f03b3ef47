"""The run time: host program text, memory plan, launching, and what holds when memory is full of garbage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from memory_graphs import drawn

from tessel import TesselError
from tessel.codegen.bindings import bindings
from tessel.codegen.host import render_host
from tessel.codegen.steps import Called, Launch
from tessel.codegen.triton import render
from tessel.ir.node import Builder, Graph, Node, Value, make_input
from tessel.ir.parse import parse_graph
from tessel.ir.types import SymType, TensorType, symbol
from tessel.ops import OPS
from tessel.passes.pipeline import run_pipeline
from tessel.runtime.buffers import plan_buffers, span_bytes
from tessel.runtime.kernels import Kernels, by_torch
from tessel.runtime.launch import Launcher, _wide_rule, interpreting, load
from tessel.runtime.library import called
from tessel.runtime.modules import execute, place
from tessel.runtime.program import build, fit, reuse
from tessel.runtime.replay import Replayed, check_replayable
from tessel.targets import get_target
from tessel.tiles.cost import bytes_moved
from tessel.tiles.lower import lower

INTERPRET = get_target("triton-interpret")


def graph(text: str) -> Graph:
    return parse_graph(text, OPS)


def run(g: Graph, tmp_path: Path, *args: Any, fuse: bool = True, poison: bool = False) -> tuple[list[Any], Any]:
    """The outputs of a graph through the whole of code generation, and the program."""
    kernels = Kernels(INTERPRET, tmp_path)
    if fuse:
        g = run_pipeline(g)
        kernels.render_all(g)
        kernels.load()
        assert not kernels.failed

    def call(node: Node) -> Called | Launch:
        return kernels.at[node] if node in kernels.at else called(node)

    program = build(g, call, kernels.launchers, tmp_path, around=interpreting, poison=poison)
    given = list(args)
    return program(given), program


# -- the text ---------------------------------------------------------------------------------------


def test_the_host_program_reads_as_one(tmp_path: Path) -> None:
    g = graph(
        """
graph "forward"
  %0: f32[s0,8] = input "x"
  %1: f32[8] = param "w"
  %2: f32[s0,8] = mul(%0, %1)
  %3: f32[s0,8] = exp(%2)
  %4: f32[8,s0]<1,8> = permute(%3, dims=(1, 0))
  return %4, %0, s0 + 1, None
"""
    )
    x, w = torch.randn(3, 8), torch.randn(8)
    args = [x, w]
    got, program = run(g, tmp_path, *args)
    assert torch.allclose(got[0], (x * w).exp().t()) and got[1] is x and got[2:] == [4, None]
    assert got[0].stride() == (1, 8)
    text = program.source.text
    assert re.search(r"def forward\(args\):", text)
    for line in (
        "a0, a1 = args[0:16]",
        "s0 = a0.size(0)",
        "empty((s0, 8), (8, 1), torch.float32)",
        "return [v1, a0, s0+1, None]",
    ):
        assert line in text, text
    assert text.count("empty(") == 1 and text == program.path.read_text()
    assert not re.search(r"[^\x00-\x7f]", text)


def test_the_list_of_arguments_is_emptied(tmp_path: Path) -> None:
    g = graph('graph "g"\n  %0: f32[4] = input "x"\n  %1: f32[4] = exp(%0)\n  return %1\n')
    _, program = run(g, tmp_path, torch.ones(4))
    args = [torch.ones(4)]
    program(args)
    assert args == []


def test_a_traceback_shows_the_generated_line(tmp_path: Path) -> None:
    g = graph('graph "g"\n  %0: f32[4] = input "x"\n  %1: f32[4] = exp(%0)\n  return %1\n')
    _, program = run(g, tmp_path, torch.ones(4), fuse=False)
    import traceback

    try:
        program(["not a tensor"])
    except AttributeError:
        assert "a0.stride()" in traceback.format_exc()
    else:
        pytest.fail("a string went through")


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        (((symbol("s0"), 4),), {"s0": "a0.size(0)"}),
        (((2 * symbol("s0"), 4), (symbol("s0"),)), {"s0": "a1.size(0)"}),
        (((2 * symbol("s0") + 3, symbol("s1")),), {"s0": "(a0.size(0) - 3) // 2", "s1": "a0.size(1)"}),
    ],
)
def test_where_sizes_come_from(sizes: tuple[tuple[Any, ...], ...], want: dict[str, str]) -> None:
    inputs = [make_input(f"x{i}", TensorType(s, torch.float32)) for i, s in enumerate(sizes)]
    g = Builder(inputs).finish([i.out for i in inputs])
    assert dict(bindings(g, {n.out: f"a{i}" for i, n in enumerate(inputs)})) == want


def test_a_size_nobody_tells_is_refused_in_words() -> None:
    x = make_input("x", TensorType((symbol("s0") * symbol("s1"),), torch.float32))
    with pytest.raises(TesselError, match="graph g: the sizes s0, s1 are used, but no input tells them"):
        render_host(Builder([x]).finish([x.out], name="g"), called)
    n = make_input("n", SymType(symbol("s0")))
    m = make_input("m", SymType(symbol("s1")))
    assert "s0 = a1" in render_host(Builder([x, n, m]).finish([x.out], name="g"), called).text


def test_numbers_read_from_tensors_and_asserts(tmp_path: Path) -> None:
    g = graph(
        """
graph "g"
  %0: i64[] = input "n"
  %1: f32[4] = input "x"
  item(%0, symbol="u0")
  assert_scalar(u0 > 1, message="too small")
  %2: f32[4] = mul(%1, u0)
  return %2, u0 * 2
"""
    )
    got, _ = run(g, tmp_path, torch.tensor(3), torch.ones(4))
    assert torch.equal(got[0], torch.full((4,), 3.0)) and got[1] == 6
    with pytest.raises(RuntimeError, match="too small"):
        run(g, tmp_path, torch.tensor(1), torch.ones(4))


# -- effects and aliases ----------------------------------------------------------------------------


def test_effects_see_the_values_from_before_them(tmp_path: Path) -> None:
    a, b = (make_input(n, TensorType((3,), torch.float32)) for n in "ab")
    swap = Builder([a, b]).finish([a.out], ((a, b.out), (b, a.out)))
    x, y = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])
    (old,), _ = run(swap, tmp_path, x, y)
    assert x.tolist() == [4, 5, 6] and y.tolist() == [1, 2, 3] and old.tolist() == [1, 2, 3]


def test_an_input_in_other_strides_is_copied_but_written_in_place(tmp_path: Path) -> None:
    x = make_input("x", TensorType((2, 3), torch.float32))
    b = Builder([x])
    y = b.add(OPS["add"], x.out, 1.0)
    given = torch.zeros(3, 2).t()
    got, program = run(b.finish([y], ((x, y),)), tmp_path, given)
    assert "fit(a0, (3, 1))" in program.source.text
    assert torch.equal(given, torch.ones(2, 3)) and torch.equal(got[0], torch.ones(2, 3))


def test_fit_and_reuse() -> None:
    x = torch.randn(4, 1, 3)
    assert fit(x, (3, 77, 1)) is x  # the stride of a size of one does not count
    y = fit(x, (1, 4, 4))
    assert y.stride() == (1, 4, 4) and torch.equal(x, y)
    assert fit(torch.ones(2, 3), (0, 1)).stride() == (0, 1)
    assert fit(torch.zeros(0, 5), (1, 1)).shape == (0, 5)
    z = torch.zeros(8, dtype=torch.float64)
    w = reuse(z, (4, 3), (3, 1), torch.float32)
    assert w.data_ptr() == z.data_ptr() and w.shape == (4, 3) and w.dtype == torch.float32


# -- memory -----------------------------------------------------------------------------------------


def chain(n: int, width: int = 64) -> Graph:
    x = make_input("x", TensorType((width, width), torch.float32))
    b = Builder([x])
    v: Value = x.out
    for _ in range(n):
        v = b.add(OPS["matmul"], v, x.out)
    return b.finish([v])


def test_memory_of_a_chain_does_not_grow() -> None:
    g = chain(10)
    plan = plan_buffers(g, lambda n: True, lambda n: True)
    # Two buffers take turns; the result has its own.
    assert plan.peak_bytes == 2 * 64 * 64 * 4 and len(plan.reuse) == 7
    assert plan_buffers(g, lambda n: True, lambda n: True, reuse=False).peak_bytes == plan.peak_bytes
    assert g.outputs[0] not in plan.reuse
    assert g.inputs[0].out not in plan.reuse.values()


def test_a_view_keeps_its_base_and_an_opaque_call_its_argument() -> None:
    x = make_input("x", TensorType((4, 4), torch.float32))
    b = Builder([x])
    base = b.add(OPS["exp"], x.out)
    view = b.add(OPS["permute"], base, dims=(1, 0))
    other = b.add(OPS["exp"], x.out)  # base is not read again, but its view is
    last = b.add(OPS["matmul"], view, other)
    g = b.finish([last])
    assert base not in plan_buffers(g, lambda n: True, lambda n: True).reuse.values()

    b = Builder([x])
    base = b.add(OPS["exp"], x.out)
    maybe = b.node(OPS["call"], base, types=(base.type,), target="aten.contiguous.default").out
    later = b.add(OPS["exp"], x.out)
    g = b.finish([b.add(OPS["add"], maybe, b.add(OPS["exp"], later))])

    def kernel(n: Node) -> bool:
        return n.op.name != "call"

    assert base not in plan_buffers(g, kernel, lambda n: False).reuse.values()
    assert base in plan_buffers(g, kernel, lambda n: True).reuse.values()


def simulated_peak(g: Graph, plan: Any) -> int:
    """Bytes alive at once when names are bound and dropped as the plan says, memory counted by its references."""
    memory: dict[Value, list[int]] = {}
    held: dict[Value, list[int]] = {}
    most = 0
    for at, node in enumerate(g.nodes):
        for v in node.outs:
            t = v.type
            assert isinstance(t, TensorType)
            if node.op.kind == "view":
                memory[v] = memory.get(node.operands[0], [])
            else:
                memory[v] = memory[plan.reuse[v]] if v in plan.reuse else [int(span_bytes(t))]
            held[v] = memory[v]
        most = max(most, sum(m[0] for m in {id(m): m for m in held.values() if m}.values()))
        for v in plan.frees.get(at, ()):
            held.pop(v, None)
    return most


def test_reuse_never_raises_the_peak() -> None:
    saved = 0
    for seed in range(60):
        g = drawn(seed)
        plan = plan_buffers(g, lambda n: n.op.kind != "view", lambda n: True)
        plain = plan_buffers(g, lambda n: n.op.kind != "view", lambda n: True, reuse=False)
        saved += len(plan.reuse)
        assert plan.peak_bytes == plain.peak_bytes == simulated_peak(g, plain), seed
        assert simulated_peak(g, plan) <= plan.peak_bytes, seed
    assert saved > 50


def test_memory_is_not_kept_across_a_peak() -> None:
    x = make_input("x", TensorType((64, 64), torch.float32))
    b = Builder([x])
    a = b.add(OPS["exp"], x.out)
    row = b.add(OPS["sum"], a, dims=(1,), keepdim=True)  # a is dead
    big = b.add(OPS["cat"], (x.out, x.out, x.out), dim=0)  # the peak
    small = b.add(OPS["sum"], big, dims=(0,), keepdim=True)
    late = b.add(OPS["add"], row, small)
    g = b.finish([b.add(OPS["neg"], b.add(OPS["neg"], late))])
    plan = plan_buffers(g, lambda n: True, lambda n: True)
    assert late not in plan.reuse and plan.peak_bytes == 3 * 64 * 64 * 4 + 2 * 64 * 4


def test_sizes_are_compared_as_expressions() -> None:
    s = symbol("s0")
    x = make_input("x", TensorType((s, 4), torch.float32))
    b = Builder([x])
    one = b.add(OPS["exp"], x.out)
    two = b.add(OPS["exp"], one)
    flat = b.add(OPS["cast"], b.add(OPS["reshape"], two, shape=(4 * s,)), dtype=torch.int32)
    wide = b.add(OPS["cast"], flat, dtype=torch.float64)
    g = b.finish([b.add(OPS["neg"], wide)])
    plan = plan_buffers(g, lambda n: n.op.kind != "view", lambda n: True, {"s0": 10})
    assert plan.reuse[flat] == one and wide not in plan.reuse
    assert plan.peak_bytes == 2 * 10 * 4 * 8  # at the last node: its operand and itself, in float64
    assert span_bytes(TensorType((s, 4), torch.float32, (8, 1))) == sympy.expand((8 * (s - 1) + 3 + 1) * 4)


@pytest.mark.parametrize("fuse", [True, False])
def test_no_value_depends_on_what_memory_held(fuse: bool, tmp_path: Path) -> None:
    g = graph(
        """
graph "g"
  %0: f32[6,10] = input "x"
  %1: f32[10,10] = param "w"
  %2: f32[6,10] = softmax(%0, dim=1)
  %3: f32[6,10] = matmul(%2, %1)
  %4: f32[6,10], %5: f32[6,1], %6: f32[6,1] = layer_norm(%3, None, None, ndim=1, eps=1e-05)
  %7: f32[6,10] = matmul(%4, %1)
  %8: f32[10,6]<1,10> = permute(%7, dims=(1, 0))
  %9: f32[10,10] = matmul(%8, %7)
  %10: f32[10,10] = add(%9, %1)
  %11: f32[10] = sum(%10, dims=(0,), keepdim=False)
  %12: f32[10,10] = matmul(%10, %10)
  %13: f32[10,10] = exp(%12)
  %14: f32[10] = amax(%13, dims=(1,), keepdim=False)
  %15: f32[10] = add(%14, %11)
  return %15, %8
"""
    )
    x, w = torch.randn(6, 10), torch.randn(10, 10) / 10
    (a, b), program = run(g, tmp_path, x, w, fuse=fuse, poison=True)
    (c, d), _ = run(g, tmp_path, x, w, fuse=False)
    torch.testing.assert_close((a, b), (c, d), rtol=1e-4, atol=1e-5)
    if fuse:
        assert program.buffers.reuse and "again(" in program.source.text


# -- launching --------------------------------------------------------------------------------------


def kernel_nodes(g: Graph) -> list[Node]:
    return [n for n in run_pipeline(g).nodes if n.op.kind == "kernel"]


def test_equal_kernels_are_rendered_once_and_name_every_place(tmp_path: Path) -> None:
    x = make_input("x", TensorType((8, 16), torch.float32))
    b = Builder([x])
    v: Value = x.out
    for _ in range(3):  # a matmul between them keeps the norms apart
        v = b.add(
            OPS["softmax"],
            b.add(OPS["matmul"], v, b.add(OPS["full"], shape=(16, 16), value=0.1, dtype=torch.float32)),
            dim=1,
        )
    g = run_pipeline(b.finish([v]))
    kernels = Kernels(INTERPRET, tmp_path)
    kernels.render_all(g)
    kernels.load()
    norms = [n for n, s in kernels.sites.items() if kernels.sources[n].kernel.family == "reduction"]
    assert len(norms) == 1 and len(kernels.sites[norms[0]]) == 3
    text = kernels.sources[norms[0]].text
    assert "# launched at 3 places" in text and text == kernels.launchers[norms[0]].path.read_text()


def test_offsets_are_64_bit_where_sizes_ask_for_it() -> None:
    s = symbol("s0")
    x = make_input("x", TensorType((s, 4096), torch.float32))
    b = Builder([x])
    (node,) = kernel_nodes(b.finish([b.add(OPS["exp"], x.out)]))
    wide = _wide_rule(render(lower(node), INTERPRET))
    assert not wide(2**17) and wide(2**19 + 1)
    big = make_input("x", TensorType((2**20, 4096), torch.float32))
    b = Builder([big])
    (node,) = kernel_nodes(b.finish([b.add(OPS["exp"], big.out)]))
    assert _wide_rule(render(lower(node), INTERPRET))()


def test_a_gpu_launch_is_compiled_once_a_variant(tmp_path: Path) -> None:
    """With a stand-in for Triton's own launch: what it is told, and that it is asked once a variant."""
    s = symbol("s0")
    x = make_input("x", TensorType((s, 4), torch.float32))
    b = Builder([x])
    (node,) = kernel_nodes(b.finish([b.add(OPS["exp"], x.out)]))
    source = render(lower(node), get_target("h100"))
    launcher = load(source, tmp_path)
    assert isinstance(launcher, Launcher)
    asked: list[Any] = []
    reused: list[Any] = []

    class Variant:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: reused.append((grid, args))

    class Fn:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **options: Any) -> Variant:
                asked.append((grid, args, options))
                return Variant()

            return launch

    launcher.fn = Fn()
    x_, y_ = torch.zeros(64), torch.zeros(64)
    launcher((0,), x_, y_, 0)
    for n in (16, 32, 48):
        launcher((n,), x_, y_, n)
    launcher((5,), x_, y_, 5)  # 5 is not a multiple of 16
    launcher((16,), x_[1:], y_, 16)  # not aligned to 16 bytes
    assert [a[1][2] for a in asked] == [16, 5, 16] and [r[0] for r in reused] == [(32, 1, 1), (48, 1, 1)]
    assert "num_warps" in asked[0][2] and str(asked[0][2]["INDEX"]) == "int32"
    # the kept variant takes every parameter of the function, in order
    assert len(reused[0][1]) == len(execute(source.text, launcher.path)[source.name].arg_names)


def test_nothing_is_launched_for_an_empty_tensor(tmp_path: Path) -> None:
    s = symbol("s0")
    x = make_input("x", TensorType((s, 4), torch.float32))
    b = Builder([x])
    got, _ = run(b.finish([b.add(OPS["exp"], x.out)]), tmp_path, torch.zeros(0, 4))
    assert got[0].shape == (0, 4)


def test_an_index_out_of_range_is_eagers_exception(tmp_path: Path) -> None:
    w = make_input("w", TensorType((5, 4), torch.float32))
    i = make_input("i", TensorType((3,), torch.int64))
    b = Builder([w, i])
    g = b.finish([b.add(OPS["embedding"], w.out, i.out)])
    table = torch.randn(5, 4)
    (got,), _ = run(g, tmp_path, table, torch.tensor([0, 4, 2]))
    assert torch.equal(got, table[[0, 4, 2]])
    for bad in (5, -1):
        with pytest.raises(IndexError, match="index out of range in self"):
            run(g, tmp_path, table, torch.tensor([0, bad, 2]))


def test_a_kernel_by_torch_gives_the_same(tmp_path: Path) -> None:
    s = symbol("s0")
    x = make_input("x", TensorType((s, 6), torch.float32))
    b = Builder([x])
    y = b.add(OPS["softmax"], x.out, dim=1)
    n = b.add(OPS["mul"], y, s)
    (node,) = kernel_nodes(b.finish([n]))
    what = by_torch(node, called, tmp_path, "cpu")
    x_ = torch.randn(3, 6)
    (got,) = what.fn(x_, sizes=(3,))
    torch.testing.assert_close(got, x_.softmax(1) * 3)


# -- CUDA graphs, refused where they cannot be ------------------------------------------------------


def test_cuda_graphs_are_refused_in_words() -> None:
    with pytest.raises(TesselError, match="cuda_graphs=True: the graph is on cpu, not on cuda"):
        check_replayable(chain(1), "cpu")
    x = make_input("x", TensorType((symbol("s0"),), torch.float32))
    with pytest.raises(TesselError, match="symbolic sizes s0.*dynamic=False"):
        check_replayable(Builder([x]).finish([x.out]), "cuda:0")
    b = Builder([x := make_input("x", TensorType((4,), torch.float32))])
    b.node(OPS["rand_like"], x.out, types=(x.type,))
    with pytest.raises(TesselError, match="rand_like"):
        check_replayable(b.finish([x.out]), "cuda:0")
    check_replayable(chain(2), "cuda:0")


def test_calls_before_the_recording_run_as_they_are() -> None:
    replayed = Replayed(lambda args: [args[0] + 1], ())
    assert replayed([torch.ones(1)])[0].item() == 2 and replayed.graph is None


# -- files and counts -------------------------------------------------------------------------------


def test_generated_text_runs_without_its_file(tmp_path: Path) -> None:
    path = place("thing", "x = 1 + 1\n", tmp_path / "new")
    assert path.read_text() == "x = 1 + 1\n" and (tmp_path / "new").stat().st_mode & 0o077 == 0
    path.write_text("x = 'another'\n")  # what lies on disk is not what runs
    assert execute("x = 1 + 1\n", path)["x"] == 2
    assert place("thing", "x = 1 + 1\n", tmp_path / "new").read_text() == "x = 1 + 1\n"
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        path = place("thing", "x = 3\n", blocked / "below")
    assert execute("x = 3\n", path)["x"] == 3


def test_bytes_are_counted_by_one_rule() -> None:
    x = make_input("x", TensorType((10, 10), torch.float32))
    b = Builder([x])
    t = b.add(OPS["permute"], x.out, dims=(1, 0))
    y = b.add(OPS["matmul"], x.out, t)  # the same tensor twice: read once
    row = b.add(OPS["slice"], y, dim=0, start=0, size=1, step=1)
    wide = b.add(OPS["expand"], row, shape=(10, 10))
    z = b.add(OPS["exp"], wide)  # a repeated row is read once
    g = b.finish([z], ((x, z),))
    assert bytes_moved(g) == (400 + 400) + (40 + 400) + 2 * 400
    s = make_input("x", TensorType((symbol("s0"), 4), torch.float32))
    b = Builder([s])
    assert bytes_moved(b.finish([b.add(OPS["exp"], s.out)]), {"s0": 5}) == 160
