"""The functions that generated kernels call, cut out of the helper templates.

A helper template is Python text in which a line ``# --- name`` starts a function and
``# --- name interpret`` the plain function that stands for it in Triton's interpreter.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ..tiles.header import TEMPLATES, environment

_START = re.compile(r"^# --- (\w+)( interpret)?$", re.MULTILINE)
_WORD = re.compile(r"\b[a-zA-Z_]\w*\b")
_FILES = ("folds.triton.j2", "helpers.triton.j2")


@lru_cache(maxsize=2)
def helper_texts(interpret: bool) -> dict[str, str]:
    """Name -> function text. For the interpreter nothing is ``@triton.jit``."""
    found: dict[str, str] = {}
    twins: dict[str, str] = {}
    for file in _FILES:
        if not (TEMPLATES / file).exists():
            continue
        text = environment().get_template(file).render()
        starts = list(_START.finditer(text))
        for i, m in enumerate(starts):
            end = starts[i + 1].start() if i + 1 < len(starts) else len(text)
            (twins if m.group(2) else found)[m.group(1)] = text[m.end() : end].strip("\n")
    if interpret:
        found.update(twins)
        found = {name: text.replace("@triton.jit\n", "") for name, text in found.items()}
    return found


def helpers_for(body: str, interpret: bool) -> list[str]:
    """Texts of the helpers that ``body`` calls, and of those they call, callees first."""
    known = helper_texts(interpret)
    order: dict[str, str] = {}
    waiting: list[tuple[str, bool]] = [(n, False) for n in _names(body, known)]
    while waiting:
        name, ready = waiting.pop()
        if name in order:
            continue
        if ready:
            order[name] = known[name]
            continue
        waiting.append((name, True))
        waiting += [(n, False) for n in _names(known[name], known) if n != name and n not in order]
    return list(order.values())


def _names(text: str, known: dict[str, str]) -> list[str]:
    code = re.sub(r'"""[\s\S]*?"""|#[^\n]*', "", text)
    return sorted({w for w in _WORD.findall(code) if w in known}, reverse=True)
