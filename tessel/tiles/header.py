"""What a template declares about itself: its knobs and its resource formulas, read without rendering.

    {% set knobs = {"XB": (256, 512), "num_warps": (4,)} %}
    {% set variants = {"TMA": (0, 1)} %}
    {% set smem_bytes = {"default": "0"} %}
    {% set derived = {"threads": "warp_size * num_warps", "acc": "BM * BN / threads"} %}
    {% set paths = {"tma90": {"archs": ["sm_90"], "variant": "tma", "registers": ["1", "acc"], ...}} %}
    {% macro kernel(k) %} ... {% endmacro %}

A formula is arithmetic over knobs and the sizes named beside it (see ``formula.py``); it is evaluated on
integers here, and on arrays or symbols by whoever reasons about it. ``smem_bytes`` bounds what this template
takes. A path says what the compiler allocates for one way to load on one architecture; the coefficients of its
registers are fitted to measured compiles and kept as data by ``tessel/solve``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from ..errors import TesselError, check, did_you_mean
from .formula import evaluate

TEMPLATES = Path(__file__).parent.parent / "codegen" / "templates"
ATTENTION = ("attention", "attention_backward")
FAMILIES = ("pointwise", "reduction", "scan", "matmul", *ATTENTION)


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
class LoadPath:
    """What the compiler allocates for one variant of a template on some architectures, as formulas.

    Attributes:
        name: of the path, also of its rows in the measured data.
        what: in words.
        archs: architectures it was measured on or is taken for.
        variant: how operands are loaded: ``pointer``, ``tma``, ``persistent``.
        shared: most bytes of shared memory a program takes.
        shared_least: the least; equal to ``shared`` where the formula is exact.
        registers: terms of the registers a thread; a fit gives each its coefficient.
        register_limit: how many a thread may have.
        spill_terms: what beside ``registers / register_limit`` tells a spill.
        always_spills: a condition under which it spills whatever the fit says.
        tensor_columns: columns of tensor memory, ``"0"`` where there is none.
    """

    name: str
    what: str
    archs: tuple[str, ...]
    variant: str
    shared: str
    shared_least: str
    registers: tuple[str, ...]
    register_limit: str = "255"
    spill_terms: tuple[str, ...] = ()
    always_spills: str = "0"
    tensor_columns: str = "0"

    @property
    def exact(self) -> bool:
        """Whether the bytes of shared memory are known, not only bounded."""
        return self.shared == self.shared_least


@dataclass(frozen=True)
class Header:
    """The declarations of one template.

    Attributes:
        family: of kernels it renders.
        knobs: name -> the values it may take, those of ``variants`` too.
        smem_bytes: architecture (``sm_90``, ``gfx942``) or ``default`` -> formula of the shared
            memory that a program takes at most, in bytes.
        module: the evaluated template, whose macros render.
        derived: name -> formula over knobs and sizes, in order, for the formulas of ``paths`` to use.
        paths: name -> how the compiler allocates for it.
        variants: knobs that choose how the kernel is written rather than its tile; the first value of each is the
            plain way, which is legal everywhere.
    """

    family: str
    knobs: Mapping[str, tuple[int, ...]]
    smem_bytes: Mapping[str, str]
    module: Any
    derived: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, LoadPath] = field(default_factory=dict)
    variants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, int]:
        """The knobs of ``variants`` as they are where nothing speaks for another."""
        return {name: values[0] for name, values in self.variants.items()}

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
        try:
            return int(evaluate(self.smem_formula(arch), values))
        except TesselError as e:
            raise TesselError(f"{self.family} template: {e}") from e

    def smem_formula(self, arch: str) -> str:
        """The formula of the shared memory that a program takes at most on ``arch``."""
        return self.smem_bytes.get(arch, self.smem_bytes["default"])

    def path(self, arch: str, variant: str = "pointer") -> LoadPath | None:
        """The measured path of a variant on ``arch``; None where nothing was measured there."""
        for path in self.paths.values():
            if arch in path.archs and path.variant == variant:
                return path
        return None

    def with_derived(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` (numbers or arrays) and what ``derived`` makes of them."""
        out = dict(values)
        for name, formula in self.derived.items():
            out[name] = evaluate(formula, out)
        return out


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
    variants = {name: tuple(values) for name, values in getattr(module, "variants", {}).items()}
    smem = dict(module.smem_bytes)  # type: ignore[attr-defined]
    derived = dict(getattr(module, "derived", {}))
    paths = {name: _path(name, entry) for name, entry in getattr(module, "paths", {}).items()}
    return Header(
        family,
        MappingProxyType({**knobs, **variants}),
        MappingProxyType(smem),
        module,
        MappingProxyType(derived),
        MappingProxyType(paths),
        MappingProxyType(variants),
    )


def _path(name: str, entry: Mapping[str, Any]) -> LoadPath:
    """A path as its template writes it: lists for tuples; ``shared_least`` left out means exact."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return LoadPath(name=name, **{"shared_least": fields["shared"], **fields})


__all__ = ["ATTENTION", "FAMILIES", "TEMPLATES", "Header", "LoadPath", "environment", "load_header"]
