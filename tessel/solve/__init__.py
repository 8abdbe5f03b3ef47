"""What is computed, not guessed: the tile of a kernel on a named GPU, and what every way to lay out a model costs.

Tiles: ``tile(kernel, target)`` answers for one kernel (``choice``), ``solve_joint`` for several that share something
(``joint``). Layouts: ``units`` (what a graph is made of), ``shard_*`` (choices, prices, the search), ``comm``,
``memory``, ``pipeline``; ``tessel/sharding`` asks them. Proofs of laid out programs: ``lemma``, with ``meaning``.
"""

from .choice import Choice, tile, tile_of
from .constraints import Learned
from .explain import RuledOut
from .problem import Problem, problem_of
from .resources import Resources
from .solver import Candidate
from .time import Time

__all__ = [
    "Candidate",
    "Choice",
    "Learned",
    "Problem",
    "Resources",
    "RuledOut",
    "Time",
    "problem_of",
    "tile",
    "tile_of",
]
