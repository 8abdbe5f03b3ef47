"""What a proof of the ranks' programs found (``sharding/verify.py``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Report"]


@dataclass
class Report:
    """What was proved.

    Attributes:
        operations, collectives: how many hold, of the program of one rank.
        lemmas: how many different statements they came down to.
        opaque: operators that were uninterpreted functions of what their dims strings say, and how often.
        unproved: what z3 or the time did not suffice for; the walk took it for true.
        faults: what is wrong; the walk ends at the first.
    """

    operations: int = 0
    collectives: int = 0
    lemmas: int = 0
    opaque: Counter[str] = field(default_factory=Counter)
    unproved: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def proved(self) -> bool:
        """Nothing is wrong and nothing is left open."""
        return not self.faults and not self.unproved

    def text(self) -> str:
        """The report in a few lines."""
        lines = [f"fault: {f}" for f in self.faults]
        lines += [f"not proved: {u}" for u in self.unproved]
        exact = self.operations - self.opaque.total()
        lines.append(
            f"{self.operations} operations and {self.collectives} collectives of a rank hold, {self.lemmas} different "
            f"statements: {exact} operations by arithmetic, {self.opaque.total()} by what their dims strings say"
        )
        if self.opaque:
            lines.append("  " + ", ".join(f"{n} {name}" for name, n in self.opaque.most_common()))
        return "\n".join(lines)
