"""Which tile every kernel should have on a named GPU, and why.

``tile(kernel, target)`` answers for one kernel (``choice.py``), ``solve_joint`` for several that share something
(``joint.py``).
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
