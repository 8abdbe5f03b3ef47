"""The operators: one table entry each, all in ``OPS``.

>>> str(OPS["exp"].doc), OPS["matmul"].kind
('', 'contract')
"""

from __future__ import annotations

from .activation import ACTIVATION
from .attention import ATTENTION
from .backward import BACKWARD
from .cache import CACHE
from .collective import CALLS, COLLECTIVE
from .common import table
from .dims import Dims, Factor, Piece, Window, dims_of, factor_sizes
from .effect import EFFECT
from .elementwise import ELEMENTWISE
from .experts import EXPERTS
from .fold import FOLD
from .generate import GENERATE
from .index import INDEX
from .inplace import INPLACE
from .library import LIBRARY
from .linear_attention import LINEAR_ATTENTION
from .loop import LOOP
from .loss import LOSS
from .matmul import MATMUL
from .norm import NORM
from .packed import PACKED
from .packed_stacks import PACKED_STACKS
from .random import RANDOM
from .reduce import REDUCE
from .rounding import ROUNDING
from .scan import SCAN
from .selective import SELECTIVE
from .sparse import SPARSE
from .view import VIEW

OPS = table(
    ELEMENTWISE.values(),
    REDUCE.values(),
    SCAN.values(),
    SELECTIVE.values(),
    LINEAR_ATTENTION.values(),
    MATMUL.values(),
    ATTENTION.values(),
    VIEW.values(),
    INDEX.values(),
    GENERATE.values(),
    ACTIVATION.values(),
    FOLD.values(),
    NORM.values(),
    LOOP.values(),
    LOSS.values(),
    LIBRARY.values(),
    INPLACE.values(),
    BACKWARD.values(),
    EXPERTS.values(),
    PACKED.values(),
    PACKED_STACKS.values(),
    SPARSE.values(),
    CACHE.values(),
    ROUNDING.values(),
    RANDOM.values(),
    EFFECT.values(),
    COLLECTIVE.values(),
    CALLS.values(),
)

__all__ = ["OPS", "Dims", "Factor", "Piece", "Window", "dims_of", "factor_sizes"]
