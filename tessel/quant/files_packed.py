"""Matrices of integers in the compressed-tensors layout ("pack-quantized"): their tensors, and the words for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TesselError, check
from .formats import WHOLE_ROW, Format, Quantized, integers
from .linear import pack, unpack

__all__ = [
    "PARTS",
    "PARTS_TOO",
    "activation_of",
    "group_of",
    "has_words",
    "packed_tensors",
    "read_packed",
    "says_quantized",
    "words_of",
]

PARTS = ("weight_packed", "weight_scale", "weight_shape")
"""Tensors of a matrix that must be there; ``PARTS_TOO`` may be."""
PARTS_TOO = ("weight_zero_point", "weight_g_idx")


def has_words(f: Format) -> bool:
    """Whether the layout has words for a format: integers of 4 and 8 bits, with a whole zero if any."""
    return f.kind == "int" and f.bits in (4, 8) and not f.minimum


def packed_tensors(
    words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, k: int, order: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of a matrix ``[n, k]``, stored as ``linear.stored`` says; channels in an ``order`` go back to their
    places, and each says which group it is in."""
    if order is not None:
        words = pack(unpack(words, bits, k)[:, order.argsort()], bits)
    out = {
        "weight_packed": words.contiguous(),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor([words.shape[0], k]),
    }
    if zero is not None:
        out["weight_zero_point"] = pack(zero.t().round().long(), bits).t().contiguous()
    if order is not None:
        out["weight_g_idx"] = (order.argsort() // (k // scale.shape[1])).int()
    return out


def words_of(weight: Format, activation: Format | None, targets: list[str], ordered: bool = False) -> dict[str, Any]:
    """A group of the configuration: matrices of one format whose inputs are of one, in ``ordered`` channels or not."""
    f = weight
    strategy = "channel" if f.group == WHOLE_ROW else "group" if f.group > 0 else "tensor"
    own = {"num_bits": f.bits, "type": "int", "symmetric": f.symmetric, "strategy": strategy, "dynamic": False}
    own |= {"group_size": f.group if f.group > 0 else None}
    own |= {"actorder": "group"} if ordered else {}
    inputs = None
    if activation is not None:
        inputs = {"num_bits": activation.bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"targets": targets, "weights": own, "input_activations": inputs}


def group_of(name: str, said: dict[str, Any]) -> dict[str, Any]:
    """The group that a layer of this name is in.

    Raises:
        TesselError: in none.
    """
    groups = said.get("config_groups")
    known = isinstance(groups, dict) and all(isinstance(g, dict) for g in groups.values())
    check(known, lambda: f"load_quantized: config_groups is {groups!r}; groups by name are what can be read")
    assert isinstance(groups, dict)
    for group in groups.values():
        if _meant(name, group.get("targets") or ()):
            if not isinstance(group.get("weights"), dict):
                raise TesselError(f"load_quantized: {name}: weights {group.get('weights')!r} in config_groups")
            return group  # type: ignore[no-any-return]
    raise TesselError(f"load_quantized: config_groups say nothing of {name}")


def says_quantized(name: str, said: dict[str, Any]) -> bool:
    """Whether a linear layer of this name is in a group, and not among those to ignore."""
    sparse = said.get("sparsity_config")
    if isinstance(sparse, dict) and _meant(name, sparse.get("targets") or ()):
        return not _meant(name, sparse.get("ignore") or ())
    groups = said.get("config_groups")
    named = isinstance(groups, dict) and any(_meant(name, g.get("targets") or ()) for g in groups.values())
    return named and not _meant(name, said.get("ignore") or ())


def _meant(name: str, targets: Sequence[str]) -> bool:
    """Whether a list of names, patterns after ``re:`` and classes has a linear layer of this name."""
    return any(t in (name, "Linear") or (t.startswith("re:") and re.match(t[3:], name)) for t in targets)


def activation_of(name: str, group: dict[str, Any]) -> Format | None:
    """What a group's inputs are rounded to.

    Raises:
        TesselError: in a way that is not known.
    """
    said = group.get("input_activations")
    if not said:
        return None
    known = said.get("type", "int") == "int" and said.get("symmetric", True) and said.get("dynamic", False)
    known = known and said.get("strategy", "token") == "token" and said.get("num_bits") in range(2, 9)
    check(bool(known), lambda: f"load_quantized: {name}: inputs {said}; integers a token, dynamic, can be read")
    return integers(int(said["num_bits"]))


def read_packed(
    name: str, parts: dict[str, Tensor | None], said: dict[str, Any], size: tuple[int, int]
) -> tuple[Quantized, Format | None, Tensor | None]:
    """A matrix out of its tensors, what its inputs are rounded to, and the order of its channels if they are moved.

    Args:
        said: the words of the configuration.
        size: n and k of the matrix in the model.

    Raises:
        TesselError: tensors are missing, do not fit together or the words for them, or hold no numbers.
    """
    absent = [p for p in PARTS if parts[p] is None]
    check(not absent, lambda: f"load_quantized: {name} has no {' and no '.join(absent)}")
    words, scale, shape = (parts[p] for p in PARTS)
    assert words is not None and scale is not None and shape is not None
    group = group_of(name, said)
    weights = group["weights"]
    bits, symmetric = weights.get("num_bits"), bool(weights.get("symmetric", True))
    check(bits in (4, 8) and weights.get("type", "int") == "int", lambda: f"load_quantized: {name}: weights {weights}")
    check(shape.numel() == 2, lambda: f"load_quantized: {name}: a weight_shape of {shape.numel()} numbers")
    n, k = (int(x) for x in shape.flatten())
    check(
        (n, k) == size, lambda: f"load_quantized: {name} is {n} x {k} in the file, {size[0]} x {size[1]} in the model"
    )
    per, groups = 32 // bits, scale.shape[-1] if scale.dim() else 0
    check(
        words.dtype == torch.int32 and tuple(words.shape) == (n, -(-k // per)) and scale.dim() == 2
        and scale.shape[0] in (1, n) and groups > 0 and k % groups == 0,
        lambda: f"load_quantized: {name}: words {tuple(words.shape)} and scales {tuple(scale.shape)} of {n} x {k}",
    )  # fmt: skip
    group_size = weights.get("group_size")
    check(
        weights.get("strategy") != "group" or not group_size or group_size * groups == k,
        lambda: f"load_quantized: {name}: {groups} scales a row of {k} values, in groups of {group_size} as it says",
    )
    zero = parts["weight_zero_point"]
    check(zero is not None or symmetric, lambda: f"load_quantized: {name} is asymmetric and has no weight_zero_point")
    check(
        zero is None or not symmetric or not bool(zero.any()),
        lambda: f"load_quantized: {name} is symmetric and has a weight_zero_point that is not zero",
    )
    check(bool(torch.isfinite(scale.float()).all()), lambda: f"load_quantized: {name}: scales that are NaN or infinite")
    order = _order(name, parts["weight_g_idx"], k, groups)
    codes = unpack(words, bits, k).float()
    codes = codes if order is None else codes[:, order]
    format = integers(bits, WHOLE_ROW if groups == 1 else k // groups, symmetric)
    activation = activation_of(name, group)
    if symmetric:
        return Quantized(codes - 2 ** (bits - 1), scale.float(), format), activation, order
    assert zero is not None
    rows = -(-n // per)
    check(
        zero.dtype == torch.int32 and tuple(zero.shape) == (rows, groups),
        lambda: f"load_quantized: {name}: zero points {tuple(zero.shape)} of {n} x {k} in {groups} groups",
    )
    zeros = unpack(zero.t().contiguous(), bits, n).t().float()
    return Quantized(codes, scale.float(), format, zeros), activation, order


def _order(name: str, group: Tensor | None, k: int, groups: int) -> Tensor | None:
    """The channels, those of the first group first; None where they lie so."""
    if group is None or bool((group == -1).all()):  # other writers fill it with -1 where channels are in no order
        return None
    fits = group.shape == (k,) and not group.is_floating_point() and int(group.min()) >= 0 and int(group.max()) < groups
    even = fits and bool((group.long().bincount(minlength=groups) == k // groups).all())
    check(even, lambda: f"load_quantized: {name}: weight_g_idx does not put {k} channels in {groups} equal groups")
    order = group.long().argsort(stable=True)
    return None if torch.equal(order, torch.arange(k, device=order.device)) else order
