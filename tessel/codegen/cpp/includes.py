"""The headers of a C++ file: what it includes, and what that does.

They lie beside the templates, but for two that depend on the CPU and are rendered: ``gemm.hpp`` and
``attention_tiles.hpp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from ...tiles.header import TEMPLATES
from .attention import tiles_header
from .matmul import product_header

__all__ = ["headers"]

_INCLUDE = re.compile(r'^#include "([\w.]+)"', re.MULTILINE)
_RENDERED: dict[str, Callable[[], str]] = {"gemm.hpp": product_header, "attention_tiles.hpp": tiles_header}


def headers(text: str, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The headers that a file needs beside it, by name: for this machine's CPU, but for those that are ``given``.

    >>> sorted(headers('#include "vectors.hpp"'))
    ['base.hpp', 'scalars.hpp', 'vectors.hpp']
    >>> headers('#include "amx.hpp"', {"amx.hpp": "// none"})
    {'amx.hpp': '// none'}
    """
    found: dict[str, str] = {}
    asked = _INCLUDE.findall(text)
    while asked:
        name = asked.pop()
        if name in found:
            continue
        if given and name in given:
            found[name] = given[name]
        else:
            found[name] = _RENDERED[name]() if name in _RENDERED else _read(name)
        asked += _INCLUDE.findall(found[name])
    return found


@cache
def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
