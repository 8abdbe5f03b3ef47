"""A layer of experts in one operator: gather by expert, gated linear, linear, weighted sum into the tokens.

    slot (t, c): expert index[t, c], weight scale[t, c]
    pre = x[t] @ gate_up[expert] + bias          2 * i wide: gate and up, one after the other or alternating
    out[t] = sum over c of scale * (gated(pre) @ down[expert] + bias)

Nothing is padded. A slot whose expert is not here (``index - offset`` outside the matrices at hand) adds nothing, so
that a split over experts is a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import TesselError, check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, dim_equal, product
from .common import arg_types, need_tensor, result, table
from .dims import Piece
from .emit import wide_dtype
from .fold import need_float

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "limited")
"""What is done to gate and up: ``act(gate) * up``, and GPT-OSS's ``limited`` (clamped, with ``alpha`` in a sigmoid)."""

_ACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def gated(pre: torch.Tensor, act: str, interleaved: bool, alpha: float, limit: float) -> torch.Tensor:
    """``[rows, 2 i]`` of gate and up to ``[rows, i]``."""
    gate, up = (pre[:, ::2], pre[:, 1::2]) if interleaved else pre.chunk(2, -1)
    if act != "limited":
        return _ACT[act](gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def by_expert(index: torch.Tensor, experts: int, offset: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Experts that have slots, and which, in order."""
    flat = index.reshape(-1) - offset
    for e in range(experts):
        slots = torch.nonzero(flat == e)[:, 0]
        if slots.numel():
            yield e, slots


def experts_ref(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    index: torch.Tensor,
    scale: torch.Tensor,
    act: str = "silu",
    interleaved: bool = False,
    turned: bool = False,
    alpha: float = 1.0,
    limit: float = 0.0,
    keep: bool = False,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer by its definition, one expert after another.

    Args:
        x: [t, h]; gate_up: [e, 2i, h] and its bias [e, 2i] or None; down: [e, o, i] and its bias [e, o] or None.
        index, scale: [t, c]: the experts of each token and their weights.
        act: one of ``ACTS``; ``alpha`` and ``limit`` are of "limited".
        interleaved: columns of gate and up alternate.
        turned: the matrices are [e, h, 2i] and [e, i, o].
        keep: the second result is ``pre`` [t * c, 2i] in the order of the slots, else empty.
        offset: the number of the first expert here.
    """
    wide = wide_dtype(x.dtype)
    choices, flat_scale = index.shape[1], scale.reshape(-1)
    width = gate_up.shape[2 if turned else 1]
    rows = x.new_zeros((index.numel(), down.shape[2 if turned else 1]), dtype=wide)
    pre = x.new_zeros((index.numel(), width) if keep else (0,))
    for e, slots in by_expert(index, gate_up.shape[0], offset):
        first, second = (gate_up[e], down[e]) if turned else (gate_up[e].t(), down[e].t())
        made = x[slots // choices] @ first
        if gate_up_bias is not None:
            made = made + gate_up_bias[e]
        if keep:
            pre[slots] = made
        got = (gated(made, act, interleaved, alpha, limit) @ second).to(wide)
        if down_bias is not None:
            got = got + down_bias[e].to(wide)
        rows[slots] = got * flat_scale[slots, None].to(wide)
    return rows.unflatten(0, (-1, choices)).sum(1).to(x.dtype), pre


def experts_backward_ref(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    index: torch.Tensor,
    scale: torch.Tensor,
    pre: torch.Tensor,
    act: str = "silu",
    interleaved: bool = False,
    turned: bool = False,
    alpha: float = 1.0,
    limit: float = 0.0,
    offset: int = 0,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, gate_up, its bias, down, its bias and scale, given that of the result.

    Args:
        pre: what the forward kept.
        wanted: x, the experts' matrices and biases together, scale; what is not wanted is empty.
    """
    wide, choices = wide_dtype(x.dtype), index.shape[1]
    flat_scale = scale.reshape(-1).to(wide)
    want_x, want_experts, want_scale = wanted

    def room(like: torch.Tensor | None, want: bool) -> torch.Tensor:
        return x.new_zeros(0) if like is None or not want else torch.zeros_like(like)

    rows = x.new_zeros((index.numel() if want_x else 0, x.shape[1]), dtype=wide)
    gates, biases, downs, down_biases = (room(t, want_experts) for t in (gate_up, gate_up_bias, down, down_bias))
    scales = scale.new_zeros(index.numel() if want_scale else 0)
    for e, slots in by_expert(index, gate_up.shape[0], offset):
        first, second = (gate_up[e], down[e]) if turned else (gate_up[e].t(), down[e].t())
        tokens = slots // choices
        back = grad[tokens]
        with torch.enable_grad():
            made = pre[slots].to(wide).requires_grad_()
            h = gated(made, act, interleaved, alpha, limit)
        by_h = (back @ second.t()).to(wide)
        by = flat_scale[slots, None]
        (dpre,) = torch.autograd.grad(h, made, by_h * by)
        dpre = dpre.to(x.dtype)
        if want_scale:
            through_bias = 0 if down_bias is None else (back.to(wide) * down_bias[e].to(wide)).sum(1)
            scales[slots] = ((by_h * h.detach()).sum(1) + through_bias).to(scale.dtype)
        if want_x:
            rows[slots] = (dpre @ first.t()).to(wide)
        if want_experts:
            held = (h.detach() * by).to(x.dtype)
            gates[e] = x[tokens].t() @ dpre if turned else dpre.t() @ x[tokens]
            downs[e] = held.t() @ back if turned else back.t() @ held
            if gate_up_bias is not None:
                biases[e] = dpre.sum(0)
            if down_bias is not None:
                down_biases[e] = (back.to(wide) * by).sum(0).to(x.dtype)
    dx = rows.unflatten(0, (-1, choices)).sum(1).to(x.dtype) if want_x else x.new_zeros(0)
    return dx, gates, biases, downs, down_biases, scales.view_as(scale) if want_scale else scales


# ---------------------------------------------------------------- tokens that are sent to their experts


def room(tokens: int, choices: int, parts: int, capacity: float) -> int:
    """How many tokens one device may send to one of the devices that hold the experts.

    Args:
        tokens: of the sender.
        choices: experts a token has.
        parts: devices, each with equally many experts.
        capacity: times the even share; never more than all tokens, and then nothing can overflow.

    >>> room(64, 2, 8, 1.25), room(64, 2, 2, 2.0)
    (20, 64)
    """
    return math.ceil(min(tokens, capacity * tokens * min(choices, parts) / parts))


def dispatch_ref(index: torch.Tensor, experts: int, parts: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens go where: each once to every device that holds one of its experts.

    Args:
        index: [t, c]: the experts of each token; device ``d`` holds those from ``d * experts`` on.
        experts: of one device.
        parts: devices.
        room: tokens that one device may send to another; see ``room``.

    Returns:
        ``tokens`` [parts * room], for each place in what is sent the token, -1 where none is, and ``places``
        [t, parts], for each token its place, -1 where it does not go.

    Raises:
        TesselError: more tokens go to one device than there is room for; both numbers are named.
    """
    goes = torch.stack([((index // experts) == d).any(1) for d in range(parts)], 1)
    most = int(goes.sum(0).max()) if goes.numel() else 0
    if most > room:
        raise TesselError(
            f"experts: {most} of a device's {len(index)} tokens go to one device, there is room for {room}: plan with "
            "a larger capacity, or without one"
        )
    places = goes.cumsum(0) - 1 + torch.arange(parts, device=index.device) * room
    tokens = index.new_full((parts * room,), -1, dtype=torch.int64)
    numbers = torch.arange(len(index), device=index.device)[:, None].expand_as(goes)
    tokens[places[goes]] = numbers[goes]
    return tokens, places.where(goes, -1)


def _dispatch_infer(index: Any, experts: int, parts: int, room: int) -> tuple[TensorType, ...]:
    need_tensor("dispatch", index)
    check(index.rank == 2 and index.dtype == torch.int64, lambda: f"dispatch: the index is {index}, not i64[t, c]")
    return result((parts * room,), torch.int64, index), result((index.shape[0], parts), torch.int64, index)


# ---------------------------------------------------------------- types


def _check(name: str, x: Any, gate_up: Any, gub: Any, down: Any, db: Any, index: Any, scale: Any, attrs: Any) -> None:
    need_float(name, x)
    need_tensor(name, gate_up, down, index, scale)
    turned = attrs.get("turned", False)
    fits = x.rank == index.rank == scale.rank == 2 and gate_up.rank == down.rank == 3
    fits = fits and x.dtype == gate_up.dtype == down.dtype and index.dtype == torch.int64
    check(fits, lambda: f"{name}: {x}, {gate_up}, {down}, {index} and {scale} are not of the ranks and dtypes it takes")
    wide, hidden = gate_up.shape[1:][:: -1 if turned else 1]
    out, inner = down.shape[1:][:: -1 if turned else 1]
    equal = [(x.shape[1], hidden), (2 * inner, wide), (gate_up.shape[0], down.shape[0]), (x.shape[0], index.shape[0])]
    equal += list(zip(index.shape, scale.shape, strict=True))
    equal += [] if gub is None else [(gub.shape[1], wide)]
    equal += [] if db is None else [(db.shape[1], out)]
    sizes = all(dim_equal(a, b) for a, b in equal)
    check(sizes, lambda: f"{name}: the sizes of {x}, {gate_up}, {down}, {index} and {scale} do not fit together")
    act = attrs.get("act", "silu")
    check(act in ACTS, lambda: f"{name}: act {act!r} is none of {', '.join(ACTS)}")


def _infer(x: Any, gate_up: Any, gub: Any, down: Any, db: Any, index: Any, scale: Any, **attrs: Any) -> Any:
    _check("experts", x, gate_up, gub, down, db, index, scale, attrs)
    turned = attrs.get("turned", False)
    pre: tuple[Dim, ...] = (0,)
    if attrs.get("keep"):
        pre = (product(index.shape), gate_up.shape[2 if turned else 1])
    return result((x.shape[0], down.shape[2 if turned else 1]), x.dtype, x), result(pre, x.dtype, x)


def _backward_infer(
    grad: Any, x: Any, gate_up: Any, gub: Any, down: Any, db: Any, index: Any, scale: Any, pre: Any, **attrs: Any
) -> tuple[TensorType, ...]:
    _check("experts_backward", x, gate_up, gub, down, db, index, scale, attrs)
    need_tensor("experts_backward", grad, pre)
    want_x, want_experts, want_scale = attrs.get("wanted", (True,) * 3)
    wants = (want_x, *(want_experts,) * 4, want_scale)
    given = (x, gate_up, gub, down, db, scale)
    return tuple(
        result((0,) if t is None or not w else t.shape, scale.dtype if i == 5 else x.dtype, x)
        for i, (t, w) in enumerate(zip(given, wants, strict=True))
    )


# ---------------------------------------------------------------- axes


def _words(node: Node, gub: Any, db: Any) -> tuple[str, str, str, str]:
    """gate_up, its bias, down, its bias."""
    pair = "(i+ w*)" if node.attrs.get("interleaved") else "(w* i+)"
    if node.attrs.get("turned"):
        first, second = f"e+ h* {pair}", "e+ i+ o*"
    else:
        first, second = f"e+ {pair} h*", "e+ o* i+"
    return first, f"e+ {pair}" if gub is not None else "", second, "e+ o*" if db is not None else ""


def _dims(node: Node) -> str:
    _, _, gub, _, db = arg_types(node)[:5]
    first, first_bias, second, second_bias = _words(node, gub, db)
    pair = "(i+ w*)" if node.attrs.get("interleaved") else "(w* i+)"
    given = ["t h*", first, first_bias, second, second_bias, "t c*", "t c*"]
    pre = f"(t c*) {pair}" if node.attrs.get("keep") else "no_pre*"
    return f"{', '.join(filter(None, given))} -> t o*, {pre}"


def _backward_dims(node: Node) -> str:
    _, _, _, gub, _, db = arg_types(node)[:6]
    first, first_bias, second, second_bias = _words(node, gub, db)
    pair = "(i+ w*)" if node.attrs.get("interleaved") else "(w* i+)"
    if db is not None:  # its gradient is the same for every piece of the inner width
        first, first_bias, second, pair = (w.replace("i+", "i*") for w in (first, first_bias, second, pair))
    given = ["t+ o*", "t+ h*", first, first_bias, second, second_bias, "t+ c*", "t+ c*", f"(t+ c*) {pair}"]
    want_x, want_experts, want_scale = node.attrs.get("wanted", (True,) * 3)
    experts = [w if want_experts and w else f"no{i}*" for i, w in enumerate((first, first_bias, second, second_bias))]
    results = ["t+ h*" if want_x else "no_x*", *experts, "t+ c*" if want_scale else "no_scale*"]
    return f"{', '.join(filter(None, given))} -> {', '.join(results)}"


def _split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """A piece of the experts knows where it begins; one piece of their inner width adds the bias of down."""
    if factor == "e":
        return Piece({"offset": node.attrs.get("offset", 0) + start})
    types = arg_types(node)
    if factor == "i" and node.op.name == "experts" and types[4] is not None:
        return Piece(once=(sum(t is not None for t in types[:4]),))
    return Piece()


def _flops(node: Node) -> Dim:
    backward = node.op.name == "experts_backward"
    types = arg_types(node)[1 if backward else 0 :]
    slots = product(types[5].shape)
    once = product((2, slots, product(types[1].shape[1:]))) + product((2, slots, product(types[3].shape[1:])))
    return (2 if backward else 1) * once


EXPERTS = table(
    Op(
        "experts",
        "library",
        dims=_dims,
        ref=experts_ref,
        infer=_infer,
        flops=_flops,
        split=_split,
        cost=1000,
        doc="experts(x, gate_up, bias|None, down, bias|None, index, scale, act=, interleaved=, turned=, keep=) "
        "-> (out, pre)",
    ),
    Op(
        "experts_backward",
        "library",
        dims=_backward_dims,
        ref=experts_backward_ref,
        infer=_backward_infer,
        flops=_flops,
        split=_split,
        cost=1000,
        doc="experts_backward(grad, x, gate_up, bias|None, down, bias|None, index, scale, pre, ...) "
        "-> (dx, dgate_up, dbias, ddown, dbias, dscale)",
    ),
    Op(
        "dispatch",
        "library",
        dims=lambda node: "t* c* -> n*, t2* p*",
        ref=dispatch_ref,
        infer=_dispatch_infer,
        cost=1000,
        doc="dispatch(index, experts=, parts=, room=) -> (tokens, places): which tokens go to which device",
    ),
)
