"""The attention operator: partial results merge in any order, gradients are those of autograd, odd rows are zeros."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessel.errors import TesselError
from tessel.frontend.attention_op import attention
from tessel.ops import OPS
from tessel.ops.attention import attention_backward_ref, attention_ref
from tessel.ops.combine import merge_attention

F64 = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def close(got: Any, want: Any, tol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol, equal_nan=True)


@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=3), st.booleans(), st.integers(-3, 4), st.permutations(range(3))
)
@settings(max_examples=25, deadline=None)
def test_parts_of_the_keys_merge_in_any_order(sizes: list[int], causal: bool, offset: int, order: list[int]) -> None:
    q, k, v = rand(2, 4, 5, 3), rand(2, 2, sum(sizes), 3, seed=1), rand(2, 2, sum(sizes), 6, seed=2)
    starts = [0, *itertools.accumulate(sizes)][:3]
    parts = []
    for start, size in zip(starts, sizes, strict=True):
        kk, vv = (x[:, :, start : start + size] for x in (k, v))
        parts.append(attention_ref(q, kk, vv, causal=causal, offset=offset - start, window=4))
    want = attention_ref(q, k, v, causal=causal, offset=offset, window=4)
    a, b, c = (parts[i] for i in order)
    left, right = merge_attention(merge_attention(a, b), c), merge_attention(a, merge_attention(b, c))
    close(left, want)
    close(right, want)
    close(merge_attention(*parts), want)


def test_nothing_is_neutral() -> None:
    some = rand(2, 3, 4), rand(2, 3)
    nothing = torch.zeros(2, 3, 4, dtype=F64), torch.full((2, 3), -math.inf, dtype=F64)
    close(merge_attention(some, nothing), some)
    close(merge_attention(nothing, nothing), nothing)
    with pytest.raises(TesselError, match="no partial results"):
        merge_attention()


EDITS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 2},
    "both_sides": {"window": 2, "offset": 1},
    "nothing_seen": {"causal": True, "offset": -3},
    "softcap": {"softcap": 0.6, "scale": 0.9},
}


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_gradients_are_autograds(edits: str, masked: bool, with_sink: bool) -> None:
    """The operator's own backward against autograd through the definition."""
    q, k, v = rand(2, 4, 5, 3), rand(2, 2, 6, 3, seed=1), rand(2, 2, 6, 4, seed=2)
    mask = rand(4, 1, 6) if masked else None
    sink = rand(4) if with_sink else None
    leaves = [x.requires_grad_() for x in (q, k, v, mask, sink) if x is not None]
    how = {"causal": False, "scale": None, **EDITS[edits]}
    out, lse = attention_ref(q, k, v, mask, sink, **how)
    grad = rand(*out.shape, seed=5)
    want = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    got = attention_backward_ref(grad, q, k, v, mask, sink, out, lse, **how, mask_grad=masked)
    close(got, want)
    given_ = {"mask": mask, "sink": sink, **how}
    fast, row = attention(q, k, v, **given_)
    close((fast, row), (out, lse))
    close(torch.autograd.grad(fast, leaves, grad), want)


def test_gradcheck() -> None:
    q, k, v, mask, sink = (
        x.requires_grad_() for x in (rand(1, 2, 3, 2), rand(1, 1, 4, 2), rand(1, 1, 4, 3), rand(3, 4), rand(2))
    )

    def fn(*x: torch.Tensor) -> Any:
        return attention(x[0], x[1], x[2], x[3], True, 0.7, x[4], 1, 3, 1.1)[0]

    assert torch.autograd.gradcheck(fn, (q, k, v, mask, sink))


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"window": 0}, ["window=0", "1 or more"]),
        ({"softcap": -1.0}, ["softcap=-1.0", "positive"]),
    ],
)
def test_impossible_attributes(attrs: dict[str, Any], words: list[str]) -> None:
    from tessel.ir.types import TensorType

    t = TensorType((1, 2, 3, 4), torch.float32)
    infer = OPS["attention"].infer
    assert infer is not None
    with pytest.raises(TesselError) as e:
        infer(t, t, t, **attrs)
    assert all(w in str(e.value) for w in words)
    with pytest.raises(TesselError, match="sink"):
        infer(t, t, t, None, TensorType((3,), torch.float32))
