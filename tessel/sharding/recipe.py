"""How a plan splits products, beside Megatron-LM's recipe for tensor parallelism (arXiv 1909.08053).

The first product of a pair (query, key, value; up, gate) is split by its columns, the second (out, down) by its rows:
nothing moves between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .words import pattern, time_text

__all__ = ["recipe_lines"]

# what models of transformers call these layers
_COLUMNS = (
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "query", "key", "value", "intermediate.dense", "fc1", "c_fc",
)  # fmt: skip
_ROWS = ("o_proj", "down_proj", "out_proj", "output.dense", "fc2", "c_proj")
_WORDS = {"n": "columns", "k": "rows"}


def recipe_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """A line for each mesh axis that splits products as the recipe does, and one for each kind that it does not.

    A difference comes with what the recipe would cost, if the plan has priced it: the step's extra time for one layer.
    """
    products = [(n, want) for n in data["nodes"] if n["op"] == "matmul" and (want := _wanted(n["name"])) is not None]
    for axis in (a["name"] for a in data["mesh"]["axes"]):
        alike = sum(n["splits"].get(axis) == want for n, want in products)
        if not alike:
            continue
        others = Counter(
            (pattern(n["name"]), want, n["splits"].get(axis, ""))
            for n, want in products
            if n["splits"].get(axis) != want
        )
        but = f", {others.total()} otherwise" if others else ""
        yield f"tensor parallelism over {axis}: {alike} products split by columns, then rows, as Megatron's{but}"
        for (name, want, got), times in others.items():
            costs = [
                o["seconds"]
                for n, _ in products
                if pattern(n["name"]) == name and n["splits"].get(axis, "") == got
                for o in n.get("instead", ())
                if o["splits"] == {**n["splits"], axis: want}
            ]
            what = f"{axis} splits {got}" if got else f"{axis} splits nothing"
            why = f": by {_WORDS[want]} a step takes {time_text(min(costs))} more a layer" if costs else ""
            yield f"  {times} × {name}: {what}{why}"


def _wanted(name: str) -> str | None:
    """The factor of a product's ``m k, k n -> m n`` that the recipe splits."""
    module = name.partition(":")[0]
    for factor, ends in (("n", _COLUMNS), ("k", _ROWS)):
        if module.endswith(tuple(f".{e}" for e in ends)):
            return factor
    return None
