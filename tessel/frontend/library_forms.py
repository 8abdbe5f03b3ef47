"""Functions of transformers, each with one that computes the same by Tessel's operators, and samples to compare both.

    mamba2_chunk_scan              Mamba-2's state space in chunks: also Falcon-H1, Bamba, Zamba-2, Granite, Nemotron-H
    torch_chunk_gated_delta_rule   the gated delta rule in chunks: Qwen3-Next, Qwen3.5, OLMo hybrid
    a loop over experts            the "eager" experts of any model

The first two are written out in torch in pieces of a chunk each: products within a chunk, sums of logarithms of decays,
a loop or a product over chunks. What they compute is linear attention with decays, without and with the delta rule:

    S[t] = decay[t] S[t - 1] + outer(k[t], v[t])           k = B, q = C, v = x dt, decay = exp(A dt)     (Mamba-2)

Formulas: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6; Yang, Kautz and Hatamizadeh, "Gated Delta
Networks" (arXiv 2412.06464), section 3.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .linear_attention_op import operator as linear_attention

__all__ = ["FUNCTIONS", "experts_samples", "grouped_experts"]

Tensor = torch.Tensor
# Arguments of one call of a function.
Sample = tuple[tuple[Any, ...], dict[str, Any]]


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[batch, time, groups, width], each group for as many heads in a row -> [batch, head, time, width]."""
    b, t, groups, width = x.shape
    x = x.transpose(1, 2)
    if groups == heads:
        return x
    if groups == 1:
        return x.expand(b, heads, t, width)
    return x[:, :, None].expand(b, groups, heads // groups, t, width).reshape(b, heads, t, width)


def state_space(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """``mamba2_chunk_scan``: its arguments and its results, in float32 as there. ``chunk_size`` changes nothing.

    Args:
        hidden_states: [batch, time, heads, width].
        dt: [batch, time, heads].
        A: [heads].
        B, C: [batch, time, groups, states].
        D: [heads].
        initial_states: [batch, heads, width, states].
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    x = hidden_states.float()
    k, q = _by_head(B.float(), x.shape[2]), _by_head(C.float(), x.shape[2])
    v = (x * dt[..., None]).transpose(1, 2)
    decay = torch.exp(A.float() * dt).transpose(1, 2)
    start = None if initial_states is None else initial_states.float().transpose(-1, -2)
    o, last = linear_attention(q, k, v, decay, None, start)
    out = o.transpose(1, 2)
    if D is not None:
        out = out + D[..., None] * x
    out = out.contiguous()
    return (out, last.transpose(-1, -2)) if return_final_states else out


def gated_delta_rule(
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
) -> tuple[Tensor, Tensor | None]:
    """``torch_chunk_gated_delta_rule``: its arguments and results, in float32 inside. ``chunk_size`` changes nothing.

    Args:
        query, key: [batch, time, key heads, key width].
        value: [batch, time, heads, value width].
        g, beta: [batch, time, heads].
        initial_state: [batch, heads, key width, value width].
    """
    heads = value.shape[2]
    q, k = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    decay, rates = (x.float().transpose(1, 2) for x in (g, beta))
    start = None if initial_state is None else initial_state.float()
    values = value.float().transpose(1, 2)
    o, last = linear_attention(_by_head(q, heads), _by_head(k, heads), values, decay.exp(), rates, start)
    out = o.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)
    return out, last if output_final_state else None


def _numbers() -> Callable[..., Tensor]:
    made = torch.Generator().manual_seed(0)

    def draw(*shape: int, positive: bool = False) -> Tensor:
        x = (torch.rand if positive else torch.randn)(shape, generator=made, device="cpu", dtype=torch.float32)
        return x.requires_grad_()

    return draw


def _state_space_samples() -> Iterator[Sample]:
    draw = _numbers()
    for groups, time, more in (
        (2, 11, {"D": draw(4), "dt_bias": draw(4), "dt_softplus": True, "dt_limit": (0.2, 1.5)}),
        (1, 8, {"return_final_states": True, "initial_states": draw(2, 4, 3, 5)}),
        (4, 5, {"return_final_states": True, "D": draw(4), "dt_softplus": True}),
    ):
        decays = draw(4, positive=True)
        yield (
            (draw(2, time, 4, 3), draw(2, time, 4), -decays, draw(2, time, groups, 5), draw(2, time, groups, 5)),
            {"chunk_size": 4, **more},
        )


def _gated_delta_samples() -> Iterator[Sample]:
    draw = _numbers()
    for key_heads, time, more in (
        (2, 11, {"use_qk_l2norm_in_kernel": True}),
        (4, 8, {"initial_state": draw(2, 4, 5, 3), "output_final_state": True}),
    ):
        q, k = draw(2, time, key_heads, 5), draw(2, time, key_heads, 5)
        more |= {"g": -draw(2, time, 4, positive=True), "beta": draw(2, time, 4, positive=True), "chunk_size": 4}
        yield (q, k if "use_qk_l2norm_in_kernel" in more else F.normalize(k, dim=-1), draw(2, time, 4, 3)), more


# name of a function of transformers -> (what computes the same, samples of calls)
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], Iterator[Sample]]]] = {
    "mamba2_chunk_scan": (state_space, _state_space_samples),
    "torch_chunk_gated_delta_rule": (gated_delta_rule, _gated_delta_samples),
}


# ---------------------------------------------------------------- experts

_EXPERTS = 3
_SMALL = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "moe_intermediate_size": 6,
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "moe_num_experts": _EXPERTS,
}


def grouped_experts() -> Callable[..., Any] | None:
    """The function of transformers that computes all experts by grouped products, which ``experts`` joins to one."""
    return getattr(sys.modules.get("transformers.integrations.moe"), "grouped_mm_experts_forward", None)


def experts_samples(kind: type[torch.nn.Module], config: Any) -> Iterator[Sample]:
    """Calls of a small module of this class; raises what making one raises."""
    config = copy.deepcopy(config)
    for name, size in _SMALL.items():
        if hasattr(config, name):
            setattr(config, name, size)
    draw = _numbers()
    with torch.device("cpu"):
        made = kind(config).float()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(draw(*p.shape))
    index = torch.tensor([[0, 2], [2, 0], [0, 1], [2, 1], [0, 2]], device="cpu")
    yield (made, draw(5, _SMALL["hidden_size"]), index, draw(5, 2, positive=True)), {}
    few = index[1:2]  # one expert that no token goes to
    yield (made, draw(1, _SMALL["hidden_size"]), few, draw(1, 2, positive=True)), {}
