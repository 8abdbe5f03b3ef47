"""Every template compiles for GPUs that are not there, within their shared memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernels import (
    INTERPRET,
    attention_kernel,
    fold_kernel,
    fused_kernel,
    gather_kernel,
    norm_kernel,
    product_kernel,
    rand,
)
from offline_record import Recorded

from tessel.codegen.offline import offline_compile
from tessel.codegen.triton import render
from tessel.errors import TesselError
from tessel.targets import get_target
from tessel.tiles.kernel import Kernel

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def kernels() -> list[Kernel]:
    """A few of each family: half and full precision, masks, folds, plain integer products."""
    heads = [rand(1, 4, 300, 128, dtype=BF16), rand(1, 2, 300, 128, dtype=BF16), rand(1, 2, 300, 128, dtype=BF16)]
    narrow = [rand(1, 2, 50, 24) for _ in range(3)]
    return [
        fused_kernel(rand(128, 512, dtype=BF16), rand(512, dtype=BF16), rand(512, 128, dtype=BF16).t()),
        gather_kernel(5, 1000),
        *(fold_kernel(op, rand(128, 500), F32) for op in ("amax", "prod")),
        fold_kernel("argmax", rand(128, 500, dtype=torch.int32), torch.int64),
        fold_kernel("any", rand(128, 50000, dtype=torch.bool), torch.bool),
        fold_kernel("sum", rand(500, 128).t(), F32),
        norm_kernel(rand(128, 4096, dtype=BF16), rand(4096, dtype=BF16)),
        norm_kernel(rand(4, 40000), rand(40000)),
        product_kernel(rand(256, 512, dtype=BF16), rand(384, 512, dtype=BF16).t(), rand(384, dtype=BF16), relu=True),
        product_kernel(rand(3, 100, 70), rand(3, 70, 50)),
        product_kernel(rand(64, 64, dtype=F64), rand(64, 64, dtype=F64)),
        product_kernel(rand(64, 64, dtype=torch.int64), rand(64, 64, dtype=torch.int64)),
        attention_kernel(*heads, rand(1, 1, 300, 300, dtype=torch.bool), causal=True),
        attention_kernel(*narrow, causal=True),
        attention_kernel(*(t.double() for t in narrow), rand(1, 1, 50, 50, dtype=torch.bool)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("target", ("a100", "h100", "b200", "mi300x"))
def test_templates_compile_offline(target: str, offline: Recorded) -> None:
    record = get_target(target)
    sources = [render(k, record) for k in kernels()]
    for source, got in zip(sources, offline.fitting(sources, record, spills=None)):
        if source.kernel.params[0].type.dtype == BF16:
            assert (got.spills or 0) < 64, f"{source.kernel.family} of {source.kernel.params[0].type} on {record.arch}"


def test_an_abort_is_a_result() -> None:
    """A source that kills the compiler, one that it refuses, and a good one after them."""
    good = render(fold_kernel("sum", rand(8, 16), F32), get_target("h100"))
    bad = [
        dataclasses.replace(good, body="import os\nos.abort()\n"),
        dataclasses.replace(good, constexprs={**good.constexprs, "XB": 3}),
    ]
    aborted, refused, fine = offline_compile([*bad, good], "sm_90")
    assert not aborted.ok and "aborted (SIGABRT)" in aborted.error
    assert not refused.ok and "power of 2" in refused.error
    assert fine.ok and fine.registers
    with pytest.raises(TesselError, match="no GPU of architecture 'sm_91'; did you mean"):
        offline_compile([good], "sm_91")
    with pytest.raises(TesselError, match="rendered for the interpreter"):
        offline_compile([render(good.kernel, INTERPRET)], "sm_90")
