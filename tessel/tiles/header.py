"""What a template declares about itself: its knobs and its resource formulas, read without rendering.

    {% set knobs = {"XB": (256, 512), "num_warps": (4,)} %}
    {% set smem_bytes = {"default": "0"} %}
    {% macro kernel(k) %} ... {% endmacro %}

A formula is arithmetic over knobs and the sizes named beside it, in bytes; it is evaluated on
integers here, and on symbols by whoever reasons about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import Any

import jinja2

from ..errors import TesselError, check, did_you_mean

TEMPLATES = Path(__file__).parent.parent / "codegen" / "templates"
FAMILIES = ("pointwise", "reduction", "matmul", "attention")


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The one environment all templates are read in; an undefined name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


@dataclass(frozen=True)
class Header:
    """The declarations of one template.

    Attributes:
        family: of kernels it renders.
        knobs: name -> the values it may take.
        smem_bytes: architecture (``sm_90``, ``gfx942``) or ``default`` -> formula of the shared
            memory that a program takes at most, in bytes.
        module: the evaluated template, whose macros render.
    """

    family: str
    knobs: Mapping[str, tuple[int, ...]]
    smem_bytes: Mapping[str, str]
    module: Any

    def check_knobs(self, knobs: Mapping[str, int]) -> None:
        """Raise ``TesselError`` unless every knob is declared, given and has an allowed value."""
        for name, value in knobs.items():
            if name not in self.knobs:
                raise TesselError(f"{self.family} template: no knob {name!r}; {did_you_mean(name, self.knobs)}")
            if value not in self.knobs[name]:
                raise TesselError(f"{self.family} template: {name}={value} is none of {self.knobs[name]}")
        missing = [n for n in self.knobs if n not in knobs]
        check(not missing, lambda: f"{self.family} template: no value for the knobs {', '.join(missing)}")

    def smem(self, arch: str, values: Mapping[str, int]) -> int:
        """Shared memory in bytes that a program takes at most on ``arch``.

        ``values`` hold the knobs and the sizes the formula names (``itemsize``, ``out_itemsize`` ...).
        """
        formula = self.smem_bytes.get(arch, self.smem_bytes["default"])
        try:
            return int(eval(_compiled(formula), {"__builtins__": {}, "max": max, "min": min}, dict(values)))
        except NameError as e:
            raise TesselError(f"{self.family} template: the formula {formula!r} needs a value: {e}") from e


@cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<smem_bytes>", "eval")


@cache
def load_header(family: str, language: str = "triton") -> Header:
    """The declarations of ``<family>.<language>.j2``.

    >>> load_header("pointwise").knobs["num_warps"]
    (1, 2, 4, 8)

    Raises:
        TesselError: there is no such template.
    """
    try:
        module = environment().get_template(f"{family}.{language}.j2").module
    except jinja2.TemplateNotFound:
        words = did_you_mean(family, FAMILIES)
        raise TesselError(f"no {language} template for the family {family!r}; {words}") from None
    knobs = {name: tuple(values) for name, values in module.knobs.items()}  # type: ignore[attr-defined]
    smem = dict(module.smem_bytes)  # type: ignore[attr-defined]
    return Header(family, MappingProxyType(knobs), MappingProxyType(smem), module)


__all__ = ["FAMILIES", "TEMPLATES", "Header", "environment", "load_header"]
