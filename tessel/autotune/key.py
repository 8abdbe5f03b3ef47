"""The key of a kernel on a device, and how far two keys are apart."""

from __future__ import annotations

import hashlib
import math
import re
from functools import cache
from importlib import metadata
from weakref import WeakKeyDictionary

from ..targets import Target
from ..tiles.header import TEMPLATES
from ..tiles.kernel import Kernel
from .canonical import Canonical, canonical
from .entry import Key

__all__ = ["distance", "key_of", "template_digest", "version_of"]

_LONGEST = 2000  # characters of one field; a kernel of hundreds of tensors gets a digest in its place
_SHARED = ("folds", "helpers")  # templates that every kernel may take lines from
_known: WeakKeyDictionary[Kernel, Canonical] = WeakKeyDictionary()


def key_of(kernel: Kernel, target: Target) -> Key:
    """What a tile for ``kernel`` on ``target`` is kept under.

    Kernels that differ in names, in the order of their statements and parameters, or in sizes of one bucket share
    a key; a different computation, type, stride or layout has another.
    """
    form = _known.get(kernel)
    if form is None:
        form = _known[kernel] = canonical(kernel)
    return Key(
        device=target.name,
        units=target.units,
        arch=target.arch,
        tessel=version_of("tessel"),
        triton=".".join(version_of("triton").split(".")[:2]),
        template=template_digest(kernel.family),
        family=kernel.family,
        dtypes=form.dtypes,
        computation=form.computation,
        strides=_bounded(form.strides),
        shape=_bounded(form.shape),
    )


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


@cache
def version_of(package: str) -> str:
    """The installed version of a package, ``"none"`` where it is not installed. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@cache
def template_digest(family: str) -> str:
    """Digest of the text that kernels of a family are made from, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in (family, *_SHARED):
        path = TEMPLATES / f"{name}.triton.j2"
        digest.update(path.read_bytes() if path.exists() else b"none")
        digest.update(b"\0")
    return digest.hexdigest()[:16]


_SIZE = re.compile(r"^(?:(\d+)|dyn)(?:/(\d+))?$")


def distance(a: Key, b: Key) -> float | None:
    """How far the shapes of two keys of one computation on one device are apart, in doublings of an axis.

    None where they have no tile to share: another computation, type or device. An axis that another power of two
    divides counts a quarter for each doubling; other strides, templates and versions count one each.
    """
    same = ("computation", "family", "dtypes", "device", "units", "arch")
    if any(getattr(a, n) != getattr(b, n) for n in same):
        return None
    total = float(sum(getattr(a, n) != getattr(b, n) for n in ("strides", "template", "triton", "tessel")))
    mine, other = _sizes(a.shape), _sizes(b.shape)
    if mine.keys() != other.keys():
        return total + 16.0
    for name, (size, divides) in mine.items():
        size2, divides2 = other[name]
        if (size is None) != (size2 is None):
            total += 4
        elif size is not None and size2 is not None:
            total += abs(math.log2(max(size, 1) / max(size2, 1)))
        total += abs(math.log2(divides / divides2)) / 4
    return total


def _sizes(shape: str) -> dict[str, tuple[int | None, int]]:
    """Axis name -> size (None: dynamic) and the power of two that divides it."""
    out: dict[str, tuple[int | None, int]] = {}
    for word in shape.partition(" | ")[0].split():
        name, _, text = word.partition("=")
        found = _SIZE.match(text)
        if found:
            size = int(found[1]) if found[1] else None
            out[name] = size, int(found[2] or ((size or 1) & -(size or 1)))
    return out
