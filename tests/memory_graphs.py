"""Random graphs whose values have many sizes and lifetimes, for what plans memory."""

from __future__ import annotations

import random

import torch

from tessel.ir.node import Builder, Graph, Value, make_input
from tessel.ir.types import TensorType
from tessel.ops import OPS

__all__ = ["drawn"]


def drawn(seed: int) -> Graph:
    """5 to 60 operators on f32[8,8]: casts, concatenations, transposes, negations; two results."""
    draw = random.Random(seed)
    x = make_input("x", TensorType((8, 8), torch.float32))
    b = Builder([x])
    made: list[Value] = [x.out]
    for _ in range(draw.randint(5, 60)):
        v = made[-draw.randint(1, min(len(made), 7))]
        how = draw.random()
        if how < 0.3:
            made.append(b.add(OPS["cast"], v, dtype=draw.choice([torch.float64, torch.float32, torch.int8])))
        elif how < 0.5:
            beside = [w for w in made if w.type.dtype == v.type.dtype and w.type.shape[1:] == v.type.shape[1:]]
            made.append(b.add(OPS["cat"], (v, draw.choice(beside)), dim=0))
        elif how < 0.6:
            made.append(b.add(OPS["permute"], v, dims=(1, 0)))
        else:
            made.append(b.add(OPS["neg"], v))
    return b.finish([made[-1], draw.choice(made)])
