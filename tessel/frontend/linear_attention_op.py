"""``tessel::linear_attention`` as a torch operator that no tracer opens, and the function that users call.

    linear_attention(q, k, v, decay, beta, start) -> (o, last)
    linear_attention_backward(grad, grad_last, q, k, v, decay, beta, start) -> (dq, dk, dv, ddecay, dbeta, dstart)

Shapes and meaning are those of ``ops/linear_attention.py``, whose references run here: for eager, and wherever there is
no kernel. The gradient keeps no states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ops.emit import wide_dtype
from ..ops.linear_attention import linear_attention_backward_ref, linear_attention_ref

_LIB = torch.library.Library("tessel", "FRAGMENT")
_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? start"
_LIB.define(f"linear_attention({_OPERANDS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define(
    f"linear_attention_backward(Tensor grad, Tensor? grad_last, {_OPERANDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake(q: Tensor, k: Tensor, v: Tensor, decay: Any, beta: Any, start: Any) -> tuple[Tensor, Tensor]:
    state = (*q.shape[:2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), q.new_empty(state, dtype=wide_dtype(q.dtype))


def _backward_fake(grad: Tensor, grad_last: Any, *operands: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(
        grad.new_empty(0, dtype=wide_dtype(grad.dtype)) if x is None else x.new_empty(x.shape) for x in operands
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
    operands = ctx.saved_tensors
    if grad is None and grad_last is None:
        return (None,) * 6
    if grad is None:
        grad = torch.zeros_like(operands[2])
    got = torch.ops.tessel.linear_attention_backward(grad, grad_last, *operands)
    return tuple(g if w else None for g, w in zip(got, ctx.needs_input_grad, strict=True))


_LIB.impl("linear_attention", linear_attention_ref, "CompositeExplicitAutograd")
_LIB.impl("linear_attention_backward", linear_attention_backward_ref, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::linear_attention", _fake, lib=_LIB)
torch.library.register_fake("tessel::linear_attention_backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("tessel::linear_attention", _differentiate, setup_context=_setup, lib=_LIB)

operator = torch.ops.tessel.linear_attention.default


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a decaying state, with or without the delta rule; differentiable, and one operator.

        S[t] = decay[t] * S[t - 1] + outer(k[t], u[t]),   o[t] = scale * q[t] S[t]
        u[t] = v[t]   or, with beta,   beta[t] * (v[t] - k[t] (decay[t] * S[t - 1]))

    Compiled by Tessel it runs by a chunked kernel; in plain eager it goes token by token.

    Args:
        q, k: [batch, head, time, key width], floats of one dtype with v.
        v: [batch, head, time, value width].
        decay: factors, one a token ([batch, head, time]) or one a key channel ([batch, head, time, key width]), or
            what broadcasts to these from the right rank (RetNet: [1, head, 1]); any value, zero included.
        log_decay: the same as logarithms, in place of ``decay``.
        beta: [batch, head, time], of the delta rule.
        initial_state: [batch, head, key width, value width]; zeros if left out.
        scale: of q.

    Returns:
        o in the shape and dtype of v; the last state, f32 beside halves.

    Raises:
        TesselError: both ``decay`` and ``log_decay``, or shapes and dtypes that do not fit together.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> o, last = linear_attention(one, one, one, decay=torch.tensor([0.5]).reshape(1, 1, 1))
    >>> o.flatten().tolist(), last.item()
    ([1.0, 1.5, 1.75], 1.75)
    """
    check(decay is None or log_decay is None, lambda: "linear_attention: decay and log_decay are one thing; give one")
    ranks = [x.dim() for x in (q, k, v)]
    check(ranks == [4] * 3, lambda: f"linear_attention: ranks {ranks} of q, k, v; they are [batch, head, time, width]")
    shape = q.shape
    check(k.shape == shape, lambda: f"linear_attention: k is {list(k.shape)}, it must be {list(shape)} like q")
    fits = v.shape[:3] == shape[:3]
    check(fits, lambda: f"linear_attention: v is {list(v.shape)}, it must be {list(shape[:3])} and a width")
    same = q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point
    check(
        same, lambda: f"linear_attention: q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; they must be floats of one dtype"
    )
    wide = wide_dtype(q.dtype)
    state = (*shape[:2], shape[3], v.shape[3])

    def filled(name: str, x: Tensor | None, *allowed: tuple[int, ...]) -> Tensor | None:
        if x is None:
            return None
        for to in allowed:
            if x.dim() == len(to) and all(m in (1, n) for m, n in zip(x.shape, to, strict=True)):
                return x.to(wide).expand(to)
        wanted = " or ".join(str(list(to)) for to in allowed)
        check(False, lambda: f"linear_attention: {name} is {list(x.shape)}, it must broadcast to {wanted}")
        return None

    factors = filled("decay", decay, shape[:3], shape)
    if log_decay is not None:
        logs = filled("log_decay", log_decay, shape[:3], shape)
        factors = None if logs is None else logs.exp()
    beta, start = filled("beta", beta, shape[:3]), filled("initial_state", initial_state, state)
    o, last = operator(q if scale == 1 else q * scale, k, v, factors, beta, start)
    return o, last


__all__ = ["linear_attention", "operator"]
