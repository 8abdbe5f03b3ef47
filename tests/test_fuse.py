"""The fuse pass on random graphs, kernel by kernel, and what must hold of every result."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from fuse_graphs import SIZES, check_kernels, inputs_of, random_graph

from tessel.config import Options
from tessel.ir.interp import bind_symbols, interpret
from tessel.ir.node import Builder, Graph, Value, make_input
from tessel.ir.text import parse_graph, print_graph
from tessel.ir.types import TensorType, substitute
from tessel.ir.verify import verify
from tessel.ops import OPS
from tessel.passes import fuse
from tessel.tiles.cost import bytes_moved
from tessel.tiles.index import Index
from tessel.tiles.kernel import Access, Kernel, Load, Store
from tessel.tiles.lower import lower

NO_FUSION = Options(fusion=False)


def computing(graph: Graph) -> Counter[str]:
    """How often each operator that computes is in a graph, kernels opened."""
    nodes = [m for n in graph.nodes for m in (n.regions[0].nodes if n.op.name == "kernel" else (n,))]
    return Counter(n.op.name for n in nodes if n.op.kind not in ("view", "generate"))


@pytest.mark.parametrize("start", range(0, 300, 20))
def test_random_graphs(start: int) -> None:
    for seed in range(start, start + 20):
        before = random_graph(seed)
        inputs = inputs_of(before, seed)
        after = fuse.run(before)
        verify(after, OPS)
        text = print_graph(after)
        assert print_graph(parse_graph(text, OPS)) == text
        assert print_graph(fuse.run(after)) == text, "twice changes more"
        want, got = interpret(before, inputs), interpret(after, inputs)
        assert all(map(torch.equal, want, got)), f"the numbers changed:\n{before}\n{after}"
        alone = fuse.run(before, NO_FUSION)
        assert computing(after) == computing(alone), "each value is computed by one node"
        assert bytes_moved(after, SIZES) <= bytes_moved(alone, SIZES)
        assert len(after.nodes) <= len(alone.nodes)


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_kernels_of_random_graphs(seed: int) -> None:
    """Every kernel through lowering, rendering and Triton's interpreter, into poisoned outputs."""
    before = random_graph(seed)
    check_kernels(fuse.run(before), inputs_of(before, seed))


# ---------------------------------------------------------------------- accesses, by brute force


def evaluate(a: Index, point: dict[str, int], sizes: dict[str, int]) -> int | None:
    """The index at a point; ``None`` where it depends on a value from memory."""
    total = substitute(a.const, sizes)
    for atom, c in a.terms:
        if atom.kind == "value":
            return None
        if atom.arg is None:
            got = point[atom.name]
        else:
            inner, n = evaluate(atom.arg, point, sizes), substitute(atom.n, sizes)
            if inner is None:
                return None
            got = inner // n if atom.kind == "div" else inner % n
        total += substitute(c, sizes) * got
    return total


def check_accesses(kernel: Kernel, sizes: dict[str, int]) -> None:
    """Inside the mask every coordinate lies in its dim; every element of an output is written once."""
    extents = {a.name: substitute(a.extent, sizes) for a in kernel.axes}
    written: dict[int, Counter[tuple[Any, ...]]] = {}

    def visit(access: Access, names: set[str], count: bool) -> None:
        shape = [substitute(n, sizes) for n in kernel.params[access.param].type.shape]
        assert len(shape) == len(access.coords)
        for at in itertools.product(*(range(extents[n]) for n in sorted(names))):
            point = dict(zip(sorted(names), at, strict=True))
            inside = True
            for c in access.mask:
                x = evaluate(c.index, point, sizes)
                low, high = (None if b is None else substitute(b, sizes) for b in (c.low, c.high))
                inside &= x is None or ((low is None or low <= x) and (high is None or x < high))
            coords = [evaluate(c, point, sizes) for c in access.coords]
            if inside:
                assert all(c is None or 0 <= c < n for c, n in zip(coords, shape, strict=True)), (access, point)
                if count:
                    written.setdefault(access.param, Counter())[tuple(coords)] += 1

    every = {a.name for a in kernel.axes}
    for stmt in kernel.statements():
        if isinstance(stmt, Load | Store):
            names = {n for i in (*stmt.access.coords, *(c.index for c in stmt.access.mask)) for n in i.variables()}
            assert names <= every
            visit(stmt.access, names, isinstance(stmt, Store))
    for number, p in enumerate(kernel.params):
        if p.out:
            elements = Counter(itertools.product(*(range(substitute(n, sizes)) for n in p.type.shape)))
            assert written.get(number, Counter()) == elements, f"{p.name} of {kernel.name}"


@pytest.mark.parametrize("start", range(2000, 2080, 20))
def test_accesses(start: int) -> None:
    for seed in range(start, start + 20):
        before = random_graph(seed)
        sizes = bind_symbols(before, inputs_of(before, seed))
        for node in fuse.run(before).nodes:
            if node.op.name == "kernel":
                check_accesses(lower(node), sizes)


# ---------------------------------------------------------------------- large graphs


def _network(layers: int) -> Graph:
    """Norms, products, a table read by all layers, calls and concatenations, with residuals."""
    f32 = torch.float32
    x, w, m = (make_input(n, TensorType(s, f32)) for n, s in (("x", (8, 64)), ("w", (64, 64)), ("m", (8, 64))))
    b = Builder((x, w, m))
    v, table = x.out, b.add(OPS["cos"], m.out)
    for _ in range(layers):
        h: Value = b.add(OPS["sub"], v, b.add(OPS["sum"], v, dims=(1,), keepdim=True))
        h = b.add(OPS["relu"], b.add(OPS["mul"], b.add(OPS["matmul"], h, w.out), table))
        h = b.node(OPS["call"], h, types=(h.type,), target="aten.neg.default").out
        left, right = (b.add(OPS["slice"], h, dim=1, start=s, size=32, step=1) for s in (0, 32))
        v = b.add(OPS["add"], v, b.add(OPS["cat"], (right, left), dim=1))
    return b.finish((v,))


def test_five_thousand_nodes_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    plain = fuse._Fuser._before

    def count(self: Any, group: Any) -> Any:
        nonlocal looked
        looked += 1
        return plain(self, group)

    monkeypatch.setattr(fuse._Fuser, "_before", count)
    fuse.run(_network(60))
    small, looked = looked, 0
    after = fuse.run(_network(480))
    assert looked <= 9 * small, "eight times the layers, eight times the work"
    assert sum(n.op.name == "kernel" for n in after.nodes) == 1 + 2 * 480


def test_five_thousand_nodes_in_a_row() -> None:
    x = make_input("x", TensorType((8,), torch.float32))
    b = Builder((x,))
    v = x.out
    for i in range(5000):
        v = b.add(OPS[("neg", "exp", "sin")[i % 3]], v)
    after = fuse.run(b.finish((v,)))
    assert 5000 / 48 <= len(after.nodes) <= 120
    assert sum(computing(after).values()) == 5000


# ---------------------------------------------------------------------- single cases


def kernels(text: str, options: Options | None = None) -> list[str]:
    """The families of the kernels of a graph, other nodes by name."""
    after = fuse.run(parse_graph(text, OPS), options)
    return [n.attrs.get("family", n.op.name) for n in after.nodes if n.op.kind != "view"]


def test_a_reshape_of_row_major_memory_is_no_copy() -> None:
    text = 'graph "g"\n %x: f32[s0,8] = input "x"\n %a = exp(%x)\n %b = reshape(%a, shape=(8*s0,))\n'
    assert kernels(text + " return %b") == ["pointwise"]
    text += ' %c: f32[8*s0] = call(%b, target="aten.neg.default")\n return %c'
    assert kernels(text) == ["pointwise", "call"]


def test_options_send_products_to_torch() -> None:
    text = 'graph "g"\n %x: f32[8,8] = input "x"\n %a = matmul(%x, %x)\n %b = exp(%a)\n return %b'
    assert kernels(text) == ["matmul"]
    assert kernels(text, Options(matmul="library")) == ["matmul", "pointwise"]
    assert kernels(text, NO_FUSION) == ["matmul", "pointwise"]


def test_two_orders_of_one_argmax_are_not_one_loop() -> None:
    text = """graph "g"
  %x: f32[4,6] = input "x"
  %a = reshape(%x, shape=(24,))
  %b = argmax(%a, dims=(0,), keepdim=False)
  %t = permute(%x, dims=(1, 0))
  %c = reshape(%t, shape=(24,))
  %d = argmax(%c, dims=(0,), keepdim=False)
  %e = sum(%c, dims=(0,), keepdim=False)
  return %b, %d, %e
"""
    graph = parse_graph(text, OPS)
    x = torch.zeros(4, 6)
    x[1, 3] = x[3, 1] = 5.0
    assert kernels(text) == ["reduction", "reduction"]
    check_kernels(fuse.run(graph), [x])
    swapped = parse_graph(text.replace("return %b, %d, %e", "return %e, %d"), OPS).live()
    check_kernels(fuse.run(swapped), [x])


def test_a_view_read_directly_and_through_another() -> None:
    text = """graph "g"
  %x: i64[4,6,4] = input "x"
  %s = sum(%x, dims=(2,), keepdim=True)
  %a = slice(%s, dim=2, start=0, size=1, step=1)
  %b = permute(%a, dims=(2, 1, 0))
  %c = add(%b, %a)
  return %c, %s
"""
    graph = parse_graph(text, OPS)
    assert kernels(text) == ["reduction", "pointwise"]
    check_kernels(fuse.run(graph), inputs_of(graph, 0))
