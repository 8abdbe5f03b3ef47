"""Triton kernels of linear attention, which a host function launches (``runtime/linear_gpu.py``).

source = linear_source("forward", q.dtype, target, keys=128, values=128, kind={"decay": True, "delta": True})

The record is that of the other kernels, so that they are written, launched, interpreted and compiled for absent GPUs in
the same way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import check
from ..ir.types import TensorType, symbol
from ..targets import Target
from ..tiles.header import environment
from ..tiles.kernel import Kernel, Param
from .helpers import helpers_for
from .source import Source

__all__ = ["MOST_KEYS", "linear_source", "tile_of"]

_IMPORTS = "import triton\nimport triton.language as tl\n"
_SCRATCH = 4096  # bytes beside operands: sums that warps exchange
_OF_A_WARP = 32 * 16  # bytes of a state, as an operand
_HALF = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}
_F32 = torch.float32
_PIECE = 64  # keys, of gradients at full precision: with 128 at once 168 bytes were spilled on sm_90
_WITH_ALL_VALUES = 128  # keys, of the forward at full precision: of 256 with 16 values 116 bytes were spilled there
MOST_KEYS = 256  # a state's keys lie in the registers of one program
_SIZES = ("steps",)


def tile_of(part: str, target: Target, keys: int, dtype: torch.dtype) -> dict[str, int]:
    """Steps of a chunk, the padded keys and the values of a program, and its warps.

    At full precision, where the lanes multiply, the keys of ``gradients`` come in pieces, and a program of the forward
    has few values of wide keys.

    The state, keys times values in f32, lives in registers, in the backward with its adjoint, beside the chunk's keys.
    A lane has 16 bytes of it as an operand of a product, in the forward 8 numbers of whatever size, up to eight warps:
    of more, each may have fewer registers.
    """
    wide = max(16, 1 << (keys - 1).bit_length())
    if target.vendor == "interpret":
        wide = min(wide, 32) if part == "gradients" else wide  # so that pieces are interpreted
        return {"C": 16, "BK": wide, "BV": 16, "num_warps": 1, "num_stages": 1}
    lanes = dtype.itemsize > 2
    warps = min(8, max(4, wide * 16 * (2 if part == "forward" else dtype.itemsize) // _OF_A_WARP))
    if part == "gradients" and lanes:
        wide = min(wide, _PIECE)
    few = part == "forward" and lanes and keys > _WITH_ALL_VALUES
    return {"C": 16, "BK": wide, "BV": 4 if few else 16, "num_warps": warps, "num_stages": 1}


def linear_source(
    part: str, dtype: torch.dtype, target: Target, keys: int, values: int, kind: Mapping[str, bool]
) -> Source:
    """One kernel of ``linear_attention.triton.j2``.

    Gradients of q, k, beta and decay are given for each block of values.

    Args:
        part: the kernel. ``forward`` with ``keep`` gives the states where chunks begin, and with the delta rule what
            steps write before beta, in place of results. Gradients come from these: with a factor for every channel
            of ``backward``, else of ``adjoints`` (of the states where chunks end; and of values), which goes back
            through time, and ``gradients`` (all others), whose chunks run side by side.
        dtype: of q, k and v.
        keys: width of a key; it is part of the kernel, as is that of values: where an element lies is then known, but
            for a start, to the compiler, which has no address of its own to hold for every element.
        values: width of a value.
        kind: the switches ``channels``, ``decay``, ``delta``, ``start``, ``last_grad`` and ``keep``.

    Raises:
        TesselError: no such kernel: keys too wide, or another part makes these gradients.
    """
    switches = {**dict.fromkeys(("channels", "decay", "delta", "start", "last_grad", "keep"), False), **kind}
    check(keys <= MOST_KEYS, lambda: f"linear_attention: keys of {keys}; the kernel has registers for {MOST_KEYS}")
    of_channels = {"forward": switches["channels"], "backward": True, "adjoints": False, "gradients": False}
    check(
        of_channels.get(part) == switches["channels"],
        lambda: f"linear_attention: no kernel {part!r} with channels={switches['channels']}",
    )
    params = [(name, dtype) for name in "qkv"]
    params += [("decay", _F32)] * switches["decay"] + [("beta", _F32)] * switches["delta"]
    if part == "forward":
        params += [("start", _F32)] * switches["start"]
        kept = [("states", _F32), *[("y", _F32)] * switches["delta"]]
        outs = kept if switches["keep"] else [("o", dtype), ("last", _F32)]
    else:
        by_step = part == "backward"
        params += [] if part == "adjoints" else [("states", _F32), *[("y", _F32)] * switches["delta"]]
        params += [("grad", dtype)]
        more = [("d_u", _F32)] * (switches["delta"] and not by_step)
        of_keys = [("d_q", _F32), ("d_k", _F32)]
        of_steps = [("d_beta", _F32)] * switches["delta"] + [("d_decay", _F32)] * switches["decay"]
        if part == "gradients":
            params, outs = [*params, ("adjoints", _F32), *more], [*of_keys, *of_steps]
        else:
            params += [("grad_last", _F32)] * switches["last_grad"]
            outs = [*of_keys, ("d_v", dtype), *of_steps] if by_step else [("adjoints", _F32), *more, ("d_v", dtype)]
            outs += [("d_start", _F32)] * switches["start"]
    knobs = tile_of(part, target, keys, dtype)
    name = f"linear_attention_{part}"
    args = (*(f"{p}_ptr" for p, _ in (*params, *outs)), *_SIZES)
    module = environment().get_template("linear_attention.triton.j2").module
    text = str(getattr(module, part)({"name": name, "args": args, "half": _HALF[dtype], **switches}))
    code = "\n".join(line.rstrip() for line in text.split("\n") if line.strip()) + "\n"
    size = TensorType((symbol("numel"),), dtype)
    record = tuple(Param(p, size.with_(dtype=d), i >= len(params), i) for i, (p, d) in enumerate((*params, *outs)))
    c, bk, bv = (knobs[x] for x in ("C", "BK", "BV"))
    # operands of products go through shared memory: of states and of a chunk's keys, six at once as compiled, or three
    at_once = 3 if target.vendor == "amd" else 6
    bytes_ = at_once * bk * max(c, bv) * dtype.itemsize + _SCRATCH
    return Source(
        name=name,
        header=f"# {part} of linear_attention\n# tile: {', '.join(f'{n}={v}' for n, v in knobs.items())}\n",
        body="\n\n".join([_IMPORTS, *(h + "\n" for h in helpers_for(code, target.vendor == "interpret")), code]),
        args=args,
        sizes=_SIZES,
        grid=(),
        constexprs={**knobs, "keys": keys, "values": values},
        knobs=knobs,
        smem_bytes=bytes_,
        extents=(),
        always_wide=True,  # heads are not among the sizes
        checks=False,
        interpret=target.vendor == "interpret",
        kernel=Kernel(name, "linear_attention", record, (), ()),
    )
