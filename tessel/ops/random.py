"""Operators that draw from the generator: their order matters, and no piece draws what the whole would."""

from __future__ import annotations

from .common import table
from .library import lib

RANDOM = table(
    lib("rand", random=True),
    lib("randn", random=True),
    lib("randint", random=True),
    lib("randperm", random=True),
    lib("rand_like", random=True),
    lib("randn_like", random=True),
    lib("bernoulli", random=True),
    lib("multinomial", random=True),
    lib("native_dropout", random=True),
)
