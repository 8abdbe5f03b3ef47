"""Changes of a layer that leave its result as it is and make its tensors easier to round.

``x W^T = (x / s) (W s)^T`` moves the size of a channel of the inputs into the weight (SmoothQuant, AWQ);
``x W^T = (x R)(W R)^T`` for an orthogonal R spreads a channel that sticks out over all of them (QuIP, QuaRot).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import check
from .formats import Format, quantize

__all__ = ["awq_scales", "channel_order", "hadamard", "outliers", "rotate", "signs", "smooth_scales"]


def smooth_scales(largest: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """What each input channel is divided by: ``max|x|^alpha / max|w|^(1-alpha)`` (Xiao et al., "SmoothQuant").

    Args:
        largest: ``[k]``, the largest magnitude of each channel in the calibration data.
        weight: ``[n, k]``; multiply its columns by the result.
        alpha: how much of the difficulty moves to the weight: 0 none, 1 all.

    >>> smooth_scales(torch.tensor([100.0, 1.0]), torch.ones(3, 2))
    tensor([10.,  1.])
    """
    check(0 <= alpha <= 1, lambda: f"smooth_scales: alpha {alpha} is not between 0 and 1")
    check(
        largest.shape == weight.shape[1:],
        lambda: f"smooth_scales: {largest.shape[0]} channels of inputs for a weight of {weight.shape[1]}",
    )
    check(bool(torch.isfinite(largest).all()), lambda: "smooth_scales: the calibration data holds NaN or infinity")
    top = weight.abs().amax(0).float().clamp(min=1e-8)
    scales = largest.clamp(min=1e-8) ** alpha / top ** (1 - alpha)
    return torch.where(largest > 0, scales, torch.ones_like(scales)).clamp(1e-5, 1e5)


def awq_scales(inputs: Tensor, weight: Tensor, format: Format, steps: int = 20) -> Tensor:
    """What each input channel is divided by so that the rounded weight errs least on these inputs.

    Of ``mean|x|^a``, a from 0 to 1 in ``steps`` steps, the one with the least ``|(W - Q(W s) / s) x|^2`` (Lin et al.,
    "AWQ"). a = 0 leaves the layer as it is, so the result is never worse than rounding to nearest.

    Args:
        inputs: ``[tokens, k]`` calibration data.
        weight: ``[n, k]``.
        format: the weight's.
    """
    size = inputs.abs().float().mean(0).clamp(min=1e-8)
    gram = inputs.double().T @ inputs.double()
    best, least = torch.ones_like(size), math.inf
    for i in range(steps + 1):
        s = size ** (i / steps)
        s = s / (s.max() * s.min()).sqrt()
        error = (weight - quantize(weight * s, format).dequantize() / s).double()
        loss = float(((error @ gram) * error).sum())
        if loss < least:
            best, least = s, loss
    return best


def signs(size: int, seed: int = 0) -> Tensor:
    """``size`` signs, the same ones for a seed: they keep a rotation from meeting the data's own pattern."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def rotate(x: Tensor, sign: Tensor | None = None) -> Tensor:
    """``x R`` with R = diag(sign) times an orthogonal Hadamard matrix, along the last dimension.

    Of a size ``m 2^p``, m odd, R is m blocks side by side of the fast Walsh-Hadamard transform of ``2^p`` values: an
    outlier spreads over its block.

    >>> rotate(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    tensor([1., 1., 1., 1.])
    """
    size = x.shape[-1]
    block = size & -size  # the largest power of two that divides it
    y = (x if sign is None else x * sign).reshape(*x.shape[:-1], size // block, block)
    width = 1
    while width < block:
        pair = y.reshape(*y.shape[:-1], block // (2 * width), 2, width)
        a, b = pair[..., 0, :], pair[..., 1, :]
        y = torch.stack((a + b, a - b), -2).reshape(y.shape)
        width *= 2
    return (y / math.sqrt(block)).reshape(x.shape)


def hadamard(size: int, sign: Tensor | None = None) -> Tensor:
    """The matrix R of ``rotate``, ``[size, size]``: ``rotate(x, sign) == x @ hadamard(size, sign)``."""
    return rotate(torch.eye(size), sign)


def channel_order(weight: Tensor, shards: int = 1) -> Tensor:
    """The channels of a weight ``[n, k]``, the largest (by energy) first, each in its own of ``shards`` parts of k.

    What shares a scale is then of like size: a channel that sticks out costs others of its size few bits, and small
    ones none. A scale whose group holds one large channel rounds the rest of it to nothing.

    Raises:
        TesselError: the parts do not divide k.

    >>> channel_order(torch.tensor([[1.0, 9.0, 2.0, 8.0]])), channel_order(torch.tensor([[1.0, 9.0, 2.0, 8.0]]), 2)
    (tensor([1, 3, 2, 0]), tensor([1, 0, 3, 2]))
    """
    k = weight.shape[1]
    check(k % shards == 0, lambda: f"channel_order: {shards} shards do not divide {k} channels")
    energy = weight.float().square().sum(0).view(shards, k // shards)
    places = energy.argsort(dim=1, descending=True, stable=True)
    return (places + torch.arange(0, k, k // shards, device=places.device)[:, None]).flatten()


def outliers(size: Tensor, most: int = 8) -> Sequence[tuple[int, float]]:
    """The channels that stick out, of their largest magnitudes ``[k]``: number and how often the median channel's size,
    largest first.

    >>> outliers(torch.tensor([1.0, 9.0, 1.0]))
    [(1, 9.0)]
    """
    ratio = size / size.median().clamp(min=1e-12)
    order = torch.argsort(ratio, descending=True, stable=True)[:most]
    return [(int(i), round(float(ratio[i]), 2)) for i in order if ratio[i] > 4]
