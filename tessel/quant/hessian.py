"""Weights rounded one after another, each error made up for by the weights not yet rounded.

The loss of a linear layer ``y = x W^T`` whose weight ``[n, k]`` becomes Q is ``tr((W - Q) H (W - Q)^T)`` with the
Hessian ``H = 2 sum x x^T`` ``[k, k]``. With U the upper Cholesky factor of H's inverse (``H^-1 = U^T U``), rounding
column j and spreading its error ``e = (w_j - q_j) / U_jj`` over the columns after it, ``w_i -= e U_ji``, leaves exactly
``sum e^2`` (Frantar et al., "GPTQ"; the recursion is that of "Optimal Brain Surgeon").

Where rows matter to each other, as those of a query and a key projection do, the loss is ``tr(G (W - Q) H (W - Q)^T)``
with a second Hessian G ``[n, n]`` over the outputs. Then rows are rounded some at a time and the others make up for
them (Kim et al., "BoA" and "TurboBoA"): the best change of the rows R left, for an error E of the rows B done, is
``-G_RR^-1 G_RB E`` whatever the columns are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TesselError, check
from .formats import Format, Quantized, quantize, scales_of, to_codes

__all__ = ["Rounded", "damped", "gptq", "hessian", "inverse_factor", "rows_gain", "turboboa"]

DAMPING = 0.01
"""Times the mean of its diagonal, added to a Hessian's diagonal, as GPTQ does."""

BLOCK = 128
"""Columns whose errors are gathered before the columns after them are changed: one product for all."""


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        weight: codes and scales.
        loss: ``tr(G (W - Q) H (W - Q)^T)``, G the identity for ``gptq``.
        fallback: why the weight was rounded to nearest after all; empty if it was not.
    """

    weight: Quantized
    loss: float
    fallback: str = ""


def hessian(inputs: Tensor) -> Tensor:
    """``2 sum x x^T`` of a layer's inputs ``[..., k]``, float64, not damped.

    Raises:
        TesselError: there are no inputs, or some are NaN or infinite.
    """
    flat = inputs.reshape(-1, inputs.shape[-1]).double()
    check(flat.shape[0] > 0, lambda: "hessian: there is no calibration data: 0 rows of inputs")
    check(bool(torch.isfinite(flat).all()), lambda: "hessian: the calibration data holds NaN or infinite values")
    return 2 * flat.T @ flat


def damped(h: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian with ``damping`` of its mean diagonal added to its diagonal; inputs that are always zero get one."""
    diagonal = h.diagonal()
    added = damping * diagonal.mean() + (diagonal == 0)
    return h + torch.diag(added.to(h.dtype))


def gptq(weight: Tensor, h: Tensor, format: Format, damping: float = DAMPING) -> Rounded:
    """Round a weight column by column, most of each error made up for by the columns after it.

    Args:
        weight: ``[n, k]``, floating.
        h: ``[k, k]``, see ``hessian``.
        format: symmetric, with groups along k; a group's scale is taken when its first column is reached.
        damping: see ``damped``.

    Returns:
        The codes. Where the Hessian has no Cholesky factor the weight is rounded to nearest, and ``fallback`` says so.

    Raises:
        TesselError: sizes that do not fit, an asymmetric format, values that are no numbers.
    """
    _check(weight, h, format)
    w, hd = weight.double(), damped(h.double(), damping)
    try:
        factor = inverse_factor(hd)
    except torch.linalg.LinAlgError as e:
        return _to_nearest(w, hd, None, format, e)
    codes, scale, errors = _columns(w, factor, format, None)
    return Rounded(Quantized(codes.float(), scale.float(), format), float(errors.square().sum()))


def turboboa(weight: Tensor, h: Tensor, g: Tensor, format: Format, rows: int = 16, damping: float = DAMPING) -> Rounded:
    """Round ``rows`` rows at a time as ``gptq`` does; the rows left make up for what the columns could not.

    Args:
        weight: ``[n, k]``, floating.
        h: ``[k, k]`` over the inputs, see ``hessian``.
        g: ``[n, n]`` over the outputs: for a query projection ``K^T K`` of the keys that its head meets.
        format: as for ``gptq``.
        rows: 1 is BoA, the best and slowest; n is ``gptq``.
        damping: of both Hessians.

    Raises:
        TesselError: as ``gptq``.
    """
    _check(weight, h, format)
    n = weight.shape[0]
    check(g.shape == (n, n), lambda: f"turboboa: a Hessian of {list(g.shape)} for {n} outputs")
    check(rows >= 1, lambda: f"turboboa: {rows} rows at a time; at least 1")
    w, hd, gd = weight.double().clone(), damped(h.double(), damping), damped(g.double(), damping)
    try:
        factor, across = inverse_factor(hd), inverse_factor(gd)
    except torch.linalg.LinAlgError as e:
        return _to_nearest(w, hd, gd, format, e)
    codes, scales = [], []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        own, scale, _ = _columns(w[start:stop], factor, format, None)
        error = w[start:stop] - own * _wide(scale, format, w.shape[1])
        # With G^-1 = U^T U: -G_RR^-1 G_RB = -(U_BB^-1 U_BR)^T, the rows after a block as gptq's columns after one.
        spread = torch.linalg.solve_triangular(across[start:stop, start:stop], across[start:stop, stop:], upper=True)
        w[stop:] -= spread.T @ error
        codes.append(own)
        scales.append(scale)
    done = Quantized(torch.cat(codes).float(), torch.cat(scales).float(), format)
    return Rounded(done, _loss(weight.double() - done.dequantize().double(), hd, gd))


def rows_gain(g: Tensor, damping: float = DAMPING) -> float:
    """How often less loss rows could leave by making up for each other, one at a time, than each for itself.

    The mean of G's diagonal over that of ``1 / U_ii^2`` (``G^-1 = U^T U``), both of G damped: 1 where G is diagonal or
    has no factor.

    >>> [round(rows_gain(g), 2) for g in (torch.eye(3), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))]
    [1.0, 1.66]
    """
    gd = damped(g.double(), damping)
    try:
        left = inverse_factor(gd).diagonal().square().reciprocal()
    except torch.linalg.LinAlgError:
        return 1.0
    return float(gd.diagonal().mean() / left.mean())


def _columns(w: Tensor, factor: Tensor, format: Format, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[n, k]``, scales ``[n, groups]`` and errors over U's diagonal ``[n, k]``."""
    w = w.clone()
    n, k = w.shape
    size = format.group if format.group > 0 else k
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    scales = w.new_empty((n, math.ceil(k / size)))
    if format.group < 0:  # one scale for all
        scales[:] = scales_of(w.abs().amax(), format)
    block = min(BLOCK, size)
    for start in range(0, k, block):
        stop = min(start + block, k)
        if format.group >= 0 and start % size == 0:
            scales[:, start // size] = scales_of(w[:, start : start + size].abs().amax(-1), format)
        for j in range(start, stop):
            step = scales[:, j // size]
            codes[:, j] = to_codes(w[:, j] / step, format)
            errors[:, j] = (w[:, j] - codes[:, j] * step) / factor[j, j]
            w[:, j + 1 : stop] -= errors[:, j, None] * factor[j, j + 1 : stop]
        w[:, stop:] -= errors[:, start:stop] @ factor[start:stop, stop:]
    return codes, scales, errors


def inverse_factor(h: Tensor) -> Tensor:
    """U, upper, with ``H^-1 = U^T U``."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def _wide(scale: Tensor, format: Format, k: int) -> Tensor:
    return scale.repeat_interleave(format.group if format.group > 0 else k, -1)[:, :k]


def _loss(error: Tensor, h: Tensor, g: Tensor | None) -> float:
    moved = error @ h
    return float((moved * (error if g is None else g @ error)).sum())


def _to_nearest(w: Tensor, h: Tensor, g: Tensor | None, format: Format, why: Exception) -> Rounded:
    done = quantize(w, format)
    first = str(why).splitlines()[0]
    return Rounded(done, _loss(w - done.dequantize().double(), h, g), f"rounded to nearest: {first}")


def _check(weight: Tensor, h: Tensor, format: Format) -> None:
    check(weight.dim() == 2, lambda: f"a weight of shape {list(weight.shape)}; [outputs, inputs] is needed")
    k = weight.shape[1]
    check(h.shape == (k, k), lambda: f"a Hessian of {list(h.shape)} for {k} inputs")
    check(format.symmetric and format.scale != "e4m3", lambda: f"{format} has no column-by-column rounding")
    check(format.group <= 0 or k % format.group == 0, lambda: f"groups of {format.group} do not divide {k} inputs")
    for what, x in (("weight", weight), ("Hessian", h)):
        if not bool(torch.isfinite(x).all()):
            raise TesselError(f"the {what} holds NaN or infinite values")
