"""Linear attention: a state of keys times values that decays, and that a delta rule may correct.

    S' = a[t] * S[t - 1]
    u[t] = v[t]                                  or, with beta,  u[t] = beta[t] * (v[t] - k[t] S')
    S[t] = S' + outer(k[t], u[t]),   o[t] = q[t] S[t]

    q, k  [batch, head, time, k]     v, o  [batch, head, time, v]      S  [batch, head, k, v]
    decay [batch, head, time] or [batch, head, time, k]                beta  [batch, head, time]

One algebra for a family of models: no decay is linear attention (Katharopoulos et al.), one factor a head RetNet (Sun
et al.), one a head and token Mamba-2 (Dao and Gu), one a key channel gated linear attention (Yang et al.); with beta it
is DeltaNet (Schlag et al.) and Gated DeltaNet (Yang et al.). Kernels go through time in chunks: within one, with
P[t, s] = a[s + 1] * .. * a[t] and t0 the step before it,

    o[t] = (P[t, t0] q[t]) S[t0] + sum over s <= t of (q[t] P[t, s] k[s]) u[s]
    u[t] / beta[t] = v[t] - (P[t, t0] k[t]) S[t0] - sum over s < t of (k[t] P[t, s] k[s]) u[s]

The factors are given, not their logarithms, and products of them are only ever multiplied further, never divided: a
factor may be zero or negative, and what vanishes is zero rather than NaN. Halves are computed in f32; states, factors
and beta are f32 beside them.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import TensorType, dim_equal, product
from .common import arg_types, need_tensor, result, table
from .emit import wide_dtype

_STRETCH = 64  # steps whose states the reference of the backward holds at once


def linear_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition, one token after the other: o, and the last state in ``wide_dtype(q.dtype)``.

    Args:
        decay: factors; ``None``: nothing decays.
        beta: of the delta rule; ``None``: no correction.
        start: the state before the first token, ``None``: zeros.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> linear_attention_ref(one, one, one, torch.full((1, 1, 3), 0.5))[0].flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    dtype = q.dtype
    q, k, v, decay, beta, state = _widened(q, k, v, decay, beta, start)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for t in range(q.shape[2]):
        state, _, _ = _advanced(state, t, k, v, decay, beta)
        out[:, :, t] = _through(q[:, :, t], state)
    return out.to(dtype), state.clone() if start is not None and state.data_ptr() == start.data_ptr() else state


def linear_attention_backward_ref(
    grad: torch.Tensor,
    grad_last: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, decay, beta and start, by the adjoint recurrence; of what is ``None``, empty.

    States are made again a stretch of tokens at a time, from those kept where each stretch begins.

    Args:
        grad: of o, in its shape and dtype.
        grad_last: of the last state; ``None``: nothing reads that.
    """
    given = (q, k, v, decay, beta, start)
    q, k, v, decay, beta, state = _widened(*given)
    grad = grad.to(q.dtype)
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    dq, dk, dv = found
    none = q.new_empty(0)
    ddecay, dbeta = (
        none if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (decay, beta)
    )
    starts = range(0, q.shape[2], _STRETCH)
    kept = []
    for t in range(q.shape[2]):
        if t in starts:
            kept.append(state)
        state, _, _ = _advanced(state, t, k, v, decay, beta)
    ds = torch.zeros_like(state) if grad_last is None else grad_last.to(state.dtype)
    for first in reversed(starts):
        state = kept.pop()
        steps = []
        for t in range(first, min(first + _STRETCH, q.shape[2])):
            before = state
            state, u, y = _advanced(state, t, k, v, decay, beta)
            steps.append((t, before, state, u, y))
        for t, before, after, u, y in reversed(steps):
            qt, kt, dot = q[:, :, t], k[:, :, t], grad[:, :, t]
            dq[:, :, t] = _through(dot, after.mT)
            ds = ds + qt[..., None] * dot[..., None, :]
            dk[:, :, t] = _through(u, ds.mT)
            du = _through(kt, ds)
            decayed = before if decay is None else before * _over_state(decay[:, :, t])
            if beta is not None:
                dbeta[:, :, t] = (du * y).sum(-1)
                du = beta[:, :, t, None] * du
                dk[:, :, t] -= _through(du, decayed.mT)
                ds = ds - kt[..., None] * du[..., None, :]
            dv[:, :, t] = du
            if decay is not None:
                both = ds * before
                ddecay[:, :, t] = both.sum(-1) if decay.dim() == 4 else both.sum((-2, -1))
                ds = ds * _over_state(decay[:, :, t])
    last = none if start is None else ds
    return tuple(
        x.to(g.dtype) if g is not None else x for x, g in zip((dq, dk, dv, ddecay, dbeta, last), given, strict=True)
    )


def _widened(*given: torch.Tensor | None) -> list[Any]:
    """All in the type that is computed in; the state made where there is none."""
    q, k, v, decay, beta, start = given
    assert q is not None and v is not None
    wide = wide_dtype(q.dtype)
    if start is None:
        start = q.new_zeros((*q.shape[:2], q.shape[3], v.shape[3]), dtype=wide)
    return [None if x is None else x.to(wide) for x in (q, k, v, decay, beta, start)]


def _through(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return (x[..., None, :] @ state)[..., 0, :]


def _over_state(factors: torch.Tensor) -> torch.Tensor:
    """A step's factors, to be multiplied with a state."""
    return factors[..., None] if factors.dim() == 3 else factors[..., None, None]


def _advanced(state: torch.Tensor, t: int, k: torch.Tensor, v: torch.Tensor, decay: Any, beta: Any) -> Any:
    """The state after a step, what was written to it, and that before beta."""
    if decay is not None:
        state = state * _over_state(decay[:, :, t])
    kt, y = k[:, :, t], v[:, :, t]
    if beta is not None:
        y = y - _through(kt, state)
    u = y if beta is None else beta[:, :, t, None] * y
    return state + kt[..., None] * u[..., None, :], u, y


# ---------------------------------------------------------------- shapes


def _check(name: str, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any) -> torch.dtype:
    need_tensor(name, q, k, v, *(x for x in (decay, beta, start) if x is not None))
    ranks = [t.rank for t in (q, k, v)]
    check(ranks == [4, 4, 4], lambda: f"{name}: ranks {ranks} of q, k, v; they are [batch, head, time, width]")
    b, h, t, width = q.shape
    want: list[tuple[str, Any, tuple[Any, ...]]] = [("k", k, (b, h, t, width)), ("v", v, (b, h, t, v.shape[3]))]
    if decay is not None:
        want.append(("decay", decay, (b, h, t, width) if decay.rank == 4 else (b, h, t)))
    want += [("beta", beta, (b, h, t)), ("start", start, (b, h, width, v.shape[3]))]
    wrong = [(word, x, shape) for word, x, shape in want if x is not None and not _fits(x, shape)]
    check(
        not wrong, lambda: "{}: {} is {}, it must be [{}]".format(name, *wrong[0][:2], ", ".join(map(str, wrong[0][2])))
    )
    same = len({t.dtype for t in (q, k, v)}) == 1 and q.dtype.is_floating_point
    check(same, lambda: f"{name}: q, k and v are {q}, {k} and {v}; they must be floats of one dtype, cast them")
    wide = wide_dtype(q.dtype)
    others = [x for x in (decay, beta, start) if x is not None and x.dtype != wide]
    check(not others, lambda: f"{name}: {others[0]} beside q, k, v of {q.dtype}: it must be {wide}, cast it")
    return wide


def _fits(x: Any, shape: tuple[Any, ...]) -> bool:
    return x.rank == len(shape) and all(dim_equal(m, n) for m, n in zip(x.shape, shape, strict=True))


def _infer(q: Any, k: Any, v: Any, decay: Any = None, beta: Any = None, start: Any = None) -> tuple[TensorType, ...]:
    wide = _check("linear_attention", q, k, v, decay, beta, start)
    return result(v.shape, v.dtype, q), result((*q.shape[:2], q.shape[3], v.shape[3]), wide, q)


def _infer_backward(
    grad: Any, grad_last: Any, q: Any, k: Any, v: Any, decay: Any = None, beta: Any = None, start: Any = None
) -> tuple[TensorType, ...]:
    name = "linear_attention_backward"
    wide = _check(name, q, k, v, decay, beta, start)
    fits = grad.shape == v.shape and (grad_last is None or grad_last.shape == (*q.shape[:2], q.shape[3], v.shape[3]))
    check(fits, lambda: f"{name}: gradients {grad} and {grad_last} do not fit results of {q} and {v}")
    shapes = [(0,) if x is None else x.shape for x in (decay, beta, start)]
    return (*(result(x.shape, x.dtype, q) for x in (q, k, v)), *(result(s, wide, q) for s in shapes))


# ---------------------------------------------------------------- axes

_TIME = "b h t*"


def _words(q: Any, decay: Any, beta: Any, start: Any, v_word: str) -> tuple[list[str], str, str]:
    """The words of q, k, v, decay, beta and start; of a token's keys, and of the state."""
    width = "k*" if beta is not None else "k+"  # a correction needs all of a key
    keys, state = f"{_TIME} {width}", f"b h {width} {v_word}"
    words = [keys, keys, f"{_TIME} {v_word}"]
    if decay is not None:
        words.append(keys if decay.rank == 4 else _TIME)
    words += [_TIME] * (beta is not None) + [state] * (start is not None)
    return words, keys, state


def _dims(node: Node) -> str:
    q, _, _, decay, beta, start = (*arg_types(node), None, None, None)[:6]
    words, _, state = _words(q, decay, beta, start, "v")
    return f"{', '.join(words)} -> {_TIME} v, {state}"


def _dims_backward(node: Node) -> str:
    _, grad_last, q, _, _, decay, beta, start = (*arg_types(node), None, None, None)[:8]
    words, keys, state = _words(q, decay, beta, start, "v+")
    values = f"{_TIME} v+"
    given = [values, *([state] if grad_last is not None else []), *words]
    factors = "no_decay*" if decay is None else keys if decay.rank == 4 else _TIME
    grads = [
        keys,
        keys,
        values,
        factors,
        "no_beta*" if beta is None else _TIME,
        "no_start*" if start is None else state,
    ]
    return f"{', '.join(given)} -> {', '.join(grads)}"


def _flops(node: Node) -> Any:
    """Of the states' products, token by token: what is kept, what is read, what the delta rule looks up."""
    backward = node.op.name != "linear_attention"
    types = (*arg_types(node), None, None, None)[2 if backward else 0 :]
    products = (5 if types[4] is None else 8) if backward else (2 if types[4] is None else 3)
    return product((2 * products, *types[0].shape, types[2].shape[3]))


LINEAR_ATTENTION = table(
    Op(
        "linear_attention",
        "library",
        dims=_dims,
        ref=linear_attention_ref,
        infer=_infer,
        flops=_flops,
        cost=1000,
        doc="linear_attention(q, k, v, decay|None, beta|None, start|None) -> (o, last state)",
    ),
    Op(
        "linear_attention_backward",
        "library",
        dims=_dims_backward,
        ref=linear_attention_backward_ref,
        infer=_infer_backward,
        flops=_flops,
        cost=1000,
        doc="linear_attention_backward(grad, grad_last|None, q, k, v, decay|None, beta|None, start|None)"
        " -> (dq, dk, dv, ddecay, dbeta, dstart), empty for None",
    ),
)

__all__ = ["LINEAR_ATTENTION", "linear_attention_backward_ref", "linear_attention_ref"]
