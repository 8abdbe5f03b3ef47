"""What a tile takes of a unit: shared memory, registers, tensor memory; and how many programs then fit.

Bytes are the formulas of the template's own header. Registers and spills are the header's terms with coefficients
fitted to measured compiles (``resources.json``, made by ``benchmarks/fit_resources.py``). Everything works on
numbers and on numpy arrays of them, one tile or all at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TesselError
from ..targets import Target
from ..tiles.formula import evaluate
from ..tiles.header import ATTENTION, Header, LoadPath, load_header

__all__ = ["Resources", "coefficients", "estimate", "nearest_path", "programs_per_unit", "variants_of"]

PROGRAMS_PER_UNIT = 32  # resident blocks an SM; 24 on sm_89 (CUDA programming guide, technical specifications)
RESERVED = 1024  # bytes of shared memory that the driver keeps for each block (CUDA programming guide)
_AFTER = {"sm_100": 32}  # registers beside sums and values in an epilogue, as compiled; 10 elsewhere
_ROOM = 0.6  # of the limit, for the forward of heads unlike those measured: what wants less did not spill
_SURE = 0.78  # of it, for what the gradients of such heads hold at once; the least that was seen to spill is 0.91
_FULL = 0.85  # of the limit, for gradients in full precision, which took up to 40 registers more than estimated
_STREAMED = 8  # rows a warp, of the same, where a width is in pieces
_FEW_THREADS = 128  # at full precision, for a width in pieces; twice as many are few for a wide one
_BESIDE = 48  # registers beside the tiles of such a program
_AT_HAND_AMD = 2.45  # what gfx942 took for gradients of wide heads in full precision, to what is counted at hand
_AT_ONCE = 1.05  # of the limit, of what is counted at hand: 266 so counted took 172
_KEYS = 4  # for every 32 threads, of the forward of a width in pieces: twice that spilled a little
_NEARLY = 0.9  # of the half of the file that eight warps may have
_IN_FULL_AMD = 3.0  # what gfx942 took for gradients in full precision, to the estimate
_MEASURED = 128  # the widest side of a tile of attention that was fitted to
_GRANULE = 8  # registers are handed to a thread in eights
_FILE = Path(__file__).with_name("resources.json")


@dataclass(frozen=True)
class Resources:
    """What one program takes.

    Attributes:
        shared_bytes: at most.
        registers: a thread, estimated; what it would like to have, which may be more than there are.
        register_limit: what a thread may have.
        spills: whether the estimate says that it spills.
        tensor_columns: of tensor memory.
        per_unit: programs that are resident on an SM or CU together.
    """

    shared_bytes: int
    registers: float
    register_limit: int
    spills: bool
    tensor_columns: int
    per_unit: int


@cache
def coefficients() -> Mapping[str, Mapping[str, Any]]:
    """The fitted coefficients by path, with their errors and their source.

    >>> coefficients()["tma90"]["registers"]
    [26.0, 1.0]
    """
    try:
        got = json.loads(_FILE.read_text(encoding="utf-8"))["paths"]
    except (OSError, ValueError, KeyError) as e:
        raise TesselError(f"{_FILE}: the fitted coefficients cannot be read: {e}; reinstall tessel") from e
    return dict(got)


_ELSEWHERE = {  # what stands in where an architecture, or a way to load on it, has not been measured
    "matmul": {"sm_100": "tma100", "sm_90": "ptr90", "gfx": "ptr942", "sm_": "ptr80"},
    "attention": {"sm_": "attn90", "gfx": "attn942"},
    "attention_backward": {"sm_": "90", "gfx": "942"},
    "reduction": {"sm_": "rmsnorm90", "gfx": "rmsnorm90"},
    "pointwise": {},
    "scan": {},
}


def nearest_path(header: Header, arch: str, variant: str = "pointer") -> tuple[LoadPath | None, bool]:
    """``(path, measured)``: the path of a variant on ``arch``, or the nearest one and False."""
    path = header.path(arch, variant)
    if path is not None:
        return path, True
    for prefix, name in _ELSEWHERE[header.family].items():
        if arch.startswith(prefix):
            own = {"queries": f"dq{name}", "keys": f"dk{name}"}.get(variant, name)
            return header.paths[own], False
    return None, False


def variants_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a template's kernels load, and where: ``pointer``, ``tma``, ``persistent`` (tma, tile after tile)."""
    if "TMA" not in values:
        return {"pointer": np.asarray(True)}
    tma, persistent = np.asarray(values["TMA"]) > 0, np.asarray(values["PERSIST"]) > 0
    found = {"pointer": ~tma, "tma": tma & ~persistent, "persistent": tma & persistent}
    return {n: mask for n, mask in found.items() if mask.any()}


def passes_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The passes of attention's gradients: over tiles of ``queries``, or of ``keys``."""
    keys = np.asarray(values["by_keys"]) > 0
    return {n: mask for n, mask in {"queries": ~keys, "keys": keys}.items() if mask.any()}


def estimate(family: str, target: Target, values: Mapping[str, Any]) -> dict[str, Any]:
    """Resources of tiles whose knobs and sizes are in ``values`` (see ``Header.with_derived``), by name.

    ``shared``, ``registers``, ``register_limit``, ``spills``, ``columns`` and ``per_unit``, numbers or arrays as the
    knobs are.
    """
    assert target.limits is not None
    header = load_header(family)
    values = {**header.plain, **values}
    shared = evaluate(header.smem_formula(target.arch), values)
    resident = shared if family in ("matmul", *ATTENTION) else 0 * values["num_warps"]  # without turning layouts
    if family == "pointwise":  # addresses, and not much more than one value a point: the compiler streams the others
        registers: Any = 24 + 1.5 * values["held"]
        limit: Any = target.limits.registers_per_thread
        spills: Any = registers > limit
        columns: Any = 0
    elif family == "scan":  # the state, and of every step in flight what is loaded and the line it makes; not fitted
        each = np.where((values["SIDE"] > 1) & (target.vendor == "amd"), 10.0, 3.0)
        registers = 40 + each * values["held"] * values["widest"] / 4
        limit, columns = target.limits.registers_per_thread, 0
        spills = registers > limit
    elif family == "attention_backward" and values["itemsize"] > 2:  # sums, scores and their gradients; not fitted
        registers = 48 + 1.1 * values["acc"] + (2.2 + values["score_bytes"] / 4) * values["scores"]
        limit, columns = target.limits.registers_per_thread, 0
        if target.vendor == "amd":
            registers, limit = _IN_FULL_AMD * registers, np.minimum(512, 2048 // values["num_warps"])
        # Of a width in pieces and a wide one what is loaded ahead spilled; of one in pieces 16 rows of queries that one
        # warp streams.
        pieces = _in_pieces(values["BD"]) | _in_pieces(values["BE"])
        many = (values["by_keys"] > 0) & (values["streamed_rows"] > _STREAMED)
        spills = (registers > _FULL * limit) | (pieces & many)
        wide = np.maximum(values["BD"], values["BE"]) >= _MEASURED
        ahead = (pieces | wide) & (values["num_stages"] > 1)
        registers = registers + ahead * values["streamed"] * (1 + values["BE"] / values["BD"])
        spills = spills | ahead
        spills = spills | _unlike_in_full(values, limit / _AT_HAND_AMD if target.vendor == "amd" else limit)
        # Of 128 more keys than queries: eight warps are given a third or a fifth of the file, and spill a little.
        alike = (values["BD"] == _MEASURED) & (values["BE"] == _MEASURED)
        spills = spills | (alike & (values["BN"] > values["BM"]) & (target.vendor == "nvidia"))
        # Eight warps are given half of the file where that nearly does, and then spill.
        half = target.limits.registers_per_unit // (2 * values["threads"])
        near = (registers > _NEARLY * half) & (registers <= half) & (half < limit)
        spills = spills | (near & np.logical_not(pieces) & (values["num_warps"] == 8))
    else:
        registers, limit, spills, columns = 0.0, 0, False, 0
        for variant, mask in (passes_of if family == "attention_backward" else variants_of)(values).items():
            path, measured = nearest_path(header, target.arch, variant)
            assert path is not None
            got = _allocated(path, measured, family, target, values)
            registers, limit, spills, columns = (
                np.where(mask, new, old) for new, old in zip(got, (registers, limit, spills, columns))
            )
            if family == "reduction":
                resident = evaluate(path.shared, values)
    return {
        "shared": shared,
        "registers": registers,
        "register_limit": limit,
        "spills": spills,
        "columns": columns,
        "per_unit": programs_per_unit(target, resident, registers, limit, values["num_warps"], columns),
    }


def _in_pieces(width: Any) -> Any:
    """Whether a head is no power of two wide, so that its tiles are several."""
    return (width & (width - 1)) > 0


def _unlike_in_full(values: Mapping[str, Any], limit: Any) -> Any:
    """Whether attention in full precision, of a width in pieces or of 128 and more, holds too much: the lanes multiply,
    and each has all of its rows and columns at hand, of every piece. Few threads spilled."""
    operands = (values["BM"] + values["BN"]) * (values["BD"] + values["BE"]) / values["threads"]
    at_once = _BESIDE + values["acc"] + operands + 2 * values["scores"]
    pieces = _in_pieces(values["BD"]) | _in_pieces(values["BE"])
    wide = np.maximum(values["BD"], values["BE"]) >= _MEASURED
    few = values["threads"] < np.where(wide, 2 * _FEW_THREADS, _FEW_THREADS)
    return (pieces & (at_once > _AT_ONCE * limit)) | ((pieces | wide) & few)


def _allocated(path: LoadPath, measured: bool, family: str, target: Target, values: Mapping[str, Any]) -> Any:
    """``(registers, limit, spills, columns of tensor memory)`` as one path has it."""
    fitted = coefficients()[path.name]
    registers = sum(c * evaluate(f, values) for c, f in zip(fitted["registers"], path.registers))
    like = values.get("aligned", 1)
    if family == "reduction":  # the path holds one value an element; each further load holds one more
        held = evaluate(path.registers[1], values) * fitted["registers"][1]
        registers = registers + held * (values.get("loads", 1) - 1) * 0.5
        like = values.get("loads", 1) == 1
    limit = evaluate(path.register_limit, values)
    if family == "matmul" and not values.get("aligned", 1):  # operands pass through registers, two halves in one
        registers = registers + (values["a_part"] + values["b_part"]) * values["itemsize"] / 4
    if family == "matmul" and (values.get("a_unpacked") or values.get("b_unpacked")):  # each element as 32 bits
        registers = registers + values["a_part"] * values["a_unpacked"] + values["b_part"] * values["b_unpacked"]
    if family in ATTENTION and values.get("score_bytes"):  # a mask or a bias beside the scores
        registers = registers + values["scores"] * values["score_bytes"] / 4
        like = False
    room: Any = 1.0
    counted: Any = False
    if family in ATTENTION:  # wider heads than were measured, and on NVIDIA those in pieces, with sums of two layouts
        unlike = values["BD"] > (128 if family == "attention" else 256)
        like = like & (np.maximum(values["BM"], values["BN"]) <= _MEASURED)
        if path.archs[0].startswith("sm_"):
            unlike = unlike | _in_pieces(values["BD"])
            if family == "attention":
                room = np.where(unlike, _ROOM, 1.0)
            else:  # all that a thread holds at once, where the sums are not in tensor memory
                in_registers = (values["held_rows"] < 64) | (values["BD"] > 256) | (target.arch != "sm_100")
                counted = unlike & in_registers & (values["at_once"] > _SURE * limit)
        elif family == "attention":
            room = np.where(unlike, _SURE, 1.0)
        like = like & np.logical_not(unlike)
    if target.vendor == "amd" and path.archs[0].startswith("sm_"):  # half of AMD's file holds accumulators
        limit = np.minimum(512, 2048 // values["num_warps"])
    *weights, constant = fitted["spill"]
    score = weights[0] * registers / limit
    score = score + sum(w * evaluate(f, values) for w, f in zip(weights[1:], path.spill_terms))
    spills = (score + constant > 0) | (evaluate(path.always_spills, values) > 0)
    if family == "attention" and values["itemsize"] > 2:
        pieces = _in_pieces(values["BD"]) | _in_pieces(values["BE"])
        many = values["BN"] * 32 > _KEYS * values["threads"]
        spills = spills | _unlike_in_full(values, limit) | (pieces & many & (target.vendor == "nvidia"))
    if family == "attention" and target.arch == "sm_100":
        # Few queries of a width in pieces: four warps are given a seventh of the file, and spill a little.
        few = (values["BM"] == 16) & (values["num_warps"] == 4) & (values["num_stages"] == 3)
        spills = spills | (few & _in_pieces(values["BD"]) & (values["BD"] < _MEASURED))
    # Where nothing like it was measured the limit is taken at its word.
    spills = spills | counted | (np.logical_not(measured & np.asarray(like, dtype=bool)) & (registers > limit * room))
    columns = evaluate(path.tensor_columns, values) if target.arch == "sm_100" else 0
    if family == "matmul" and values.get("point_weight"):
        # After the loop: the sums, and for each of a piece what is loaded and computed there.
        here = np.asarray(values.get("SPLIT", 1)) == 1  # of a split product the epilogue is in the second kernel
        each = 1 + values["point_weight"] / values.get("PIECES", 1)
        after = here * (_AFTER.get(target.arch, 10) + values["acc"] * each)
        registers, spills = np.maximum(registers, after), spills | (after > limit)
    return registers, limit, spills, columns * (1 + (np.asarray(values.get("PERSIST", 0)) > 0))


def programs_per_unit(target: Target, shared: Any, registers: Any, limit: Any, warps: Any, columns: Any = 0) -> Any:
    """How many programs of such a size are resident on one SM or CU; 0 where not even one fits.

    >>> from tessel.targets import get_target
    >>> int(programs_per_unit(get_target("h100"), 96 * 1024, 128, 255, 8))
    2
    """
    limits = target.limits
    assert limits is not None
    own = RESERVED if target.vendor == "nvidia" else 0
    threads = warps * limits.warp_size
    granted = np.minimum(-(-np.maximum(registers, 1) // _GRANULE) * _GRANULE, -(-limit // _GRANULE) * _GRANULE)
    by = [
        limits.shared_bytes_per_unit // np.maximum(shared + own, 1),
        limits.registers_per_unit // (granted * threads),
        limits.warps_per_unit // warps,
        np.where(np.asarray(columns) > 0, 512 // np.maximum(columns, 1), PROGRAMS_PER_UNIT),
    ]
    return np.minimum.reduce([np.broadcast_to(np.asarray(b, dtype=np.int64), np.shape(shared)) for b in by]).clip(
        0, PROGRAMS_PER_UNIT
    )
