"""One entry of the cache: for which kernel on which device, what tile, what it is expected or measured to take.

An entry is plain data: strings, whole numbers and finite numbers, checked name by name when it is read, whoever
wrote it. As a file it is magic, length, JSON and a SHA-256 of all that; nothing in it is ever run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

__all__ = [
    "MAX_BYTES",
    "MODES",
    "Broken",
    "Entry",
    "Key",
    "Times",
    "better",
    "decode",
    "encode",
    "entry_from",
    "parse_json",
    "to_json",
]

MAX_BYTES = 64 * 1024  # of one entry's file
_MAX_DEPTH = 6  # of brackets; an entry needs 4
_MAX_TEXT = 4096  # characters of one string
_MAX_NUMBERS = 64  # knobs, terms, provenance fields
_MAGIC = b"TESSEL1\n"
_HEAD = struct.Struct(">8sI")
_DIGEST = 32
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.S)
MODES = ("warm", "cold")
"""How times are taken: with the L2 cache as the last run left it, or cleared before each run."""

Knob: TypeAlias = "int | str"
Fact: TypeAlias = "int | float | str"


class Broken(Exception):
    """Bytes that are no entry; the message says why."""


@dataclass(frozen=True)
class Key:
    """What an entry is for; any difference makes a miss. The fields stand in the order in which a miss names them.

    Attributes:
        device: the target's name; ``units`` its SMs or CUs, ``arch`` its capability (``sm_90``).
        tessel: version; ``triton``: major.minor, ``template``: digest of the template's text.
        family: of the kernel.
        dtypes, computation, strides, shape: see ``Canonical``.
    """

    device: str
    units: int
    arch: str
    tessel: str
    triton: str
    template: str
    family: str
    dtypes: str
    computation: str
    strides: str
    shape: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all fields, 64 hexadecimal digits."""
        return hashlib.sha256(to_json(dataclasses.asdict(self))).hexdigest()

    @property
    def short(self) -> str:
        """The first 12 digits, enough for people."""
        return self.digest[:12]

    def first_difference(self, other: Key) -> str | None:
        """The name of the first field in which two keys differ, None where they are equal."""
        return next((f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)), None)


@dataclass(frozen=True)
class Times:
    """Seconds of one launch, measured: the median, the range of the middle half, and how many runs."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Entry:
    """What is known of a kernel on a device.

    Attributes:
        key: for what.
        knobs: the tile.
        predicted: seconds by term of the model, the whole under ``"total"``; may be empty.
        measured: mode (``warm``, ``cold``) -> times; empty for a prediction.
        provenance: what makes a re-check and no miss: driver, torch, triton (with patch versions), clock_hz,
            tolerance.
    """

    key: Key
    knobs: Mapping[str, Knob]
    predicted: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Times] = field(default_factory=dict)
    provenance: Mapping[str, Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("knobs", "predicted", "measured", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle by itself
        values = (getattr(self, f.name) for f in fields(self))
        return Entry, tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

    @property
    def kind(self) -> str:
        """``"measured"`` or ``"predicted"``."""
        return "measured" if self.measured else "predicted"

    @property
    def seconds(self) -> float | None:
        """The measured median (warm before cold), else the predicted time; None where neither is known."""
        for mode in MODES:
            if mode in self.measured:
                return self.measured[mode].median
        return self.predicted.get("total")

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "key": dataclasses.asdict(self.key),
            "knobs": dict(self.knobs),
            "predicted": dict(self.predicted),
            "measured": {mode: dataclasses.asdict(t) for mode, t in self.measured.items()},
            "provenance": dict(self.provenance),
        }


def better(a: Entry, b: Entry) -> Entry:
    """Which of two entries of one key to keep: measured before predicted, then more runs, then the faster.

    The order of the two does not matter, and no clock is asked.
    """

    def worth(e: Entry) -> tuple[Any, ...]:
        runs = sum(t.runs for t in e.measured.values())
        return bool(e.measured), runs, -(e.seconds if e.seconds is not None else math.inf), to_json(e.plain())

    return max(a, b, key=worth)


# ---------------------------------------------------------------- bytes


def to_json(value: Any) -> bytes:
    """One way to write a value: sorted names, no spaces, ASCII; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode(entry: Entry) -> bytes:
    """The bytes of an entry's file.

    Raises:
        Broken: the entry holds what cannot be read back.
    """
    try:
        text = to_json(entry.plain())
    except (TypeError, ValueError, RecursionError) as e:
        raise Broken(f"not plain data: {e}") from e
    if entry_from(parse_json(text)) != entry:
        raise Broken("the entry does not read back as it is")
    body = _HEAD.pack(_MAGIC, len(text)) + text
    if len(body) + _DIGEST > MAX_BYTES:
        raise Broken(f"{len(body) + _DIGEST} bytes, the limit is {MAX_BYTES}")
    return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Entry:
    """The entry in the bytes of a file.

    Raises:
        Broken: they are not exactly what ``encode`` gives.
    """
    if len(data) > MAX_BYTES:
        raise Broken(f"more than {MAX_BYTES} bytes")
    if len(data) < _HEAD.size + _DIGEST:
        raise Broken("too short")
    magic, length = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise Broken("another kind of file")
    end = _HEAD.size + length
    if len(data) != end + _DIGEST:
        raise Broken("not as long as it says")
    if hashlib.sha256(data[:end]).digest() != data[end:]:
        raise Broken("the checksum is wrong")
    return entry_from(parse_json(data[_HEAD.size : end]))


def parse_json(text: bytes) -> Any:
    """JSON with nothing odd in it: bounded length and depth, no name twice, no NaN.

    Raises:
        Broken: it is not.
    """
    if len(text) > MAX_BYTES:
        raise Broken(f"more than {MAX_BYTES} bytes")
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", _STRINGS.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        raise Broken(f"nested {deepest} deep, the limit is {_MAX_DEPTH}")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_constant)
    except (ValueError, RecursionError) as e:
        raise Broken(f"no JSON: {e}") from e


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise Broken("a name stands twice")
    return out


def _constant(text: str) -> Any:
    raise Broken(f"{text} is no number")


def entry_from(value: Any) -> Entry:
    """An entry from JSON values, every one checked.

    Raises:
        Broken: a field is missing, unknown, or not what it should be.
    """
    _names(value, "entry", [f.name for f in fields(Entry)])
    key = value["key"]
    _names(key, "key", [f.name for f in fields(Key)])
    for f in fields(Key):
        if f.name == "units":
            _whole(key["units"], "key.units", 1)
        else:
            _text(key[f.name], f"key.{f.name}")
    if not re.fullmatch(r"[0-9a-f]{64}", key["computation"]):
        raise Broken("key.computation is no digest")
    knobs = _mapping(value["knobs"], "knobs", _knob)
    if not knobs:
        raise Broken("knobs: there are none")
    measured = _mapping(value["measured"], "measured", _times)
    if not set(measured) <= set(MODES):
        raise Broken(f"measured: modes are {' and '.join(MODES)}, got {', '.join(measured)}")
    predicted = _mapping(value["predicted"], "predicted", _seconds)
    return Entry(Key(**key), knobs, predicted, measured, _mapping(value["provenance"], "provenance", _fact))


def _names(value: Any, what: str, names: list[str]) -> None:
    if not isinstance(value, dict):
        raise Broken(f"{what}: expected names and values, got {type(value).__name__}")
    if set(value) != set(names):
        odd = sorted(set(value) ^ set(names))[0]
        raise Broken(f"{what}: {'unknown' if odd in value else 'missing'} field {odd[:80]!r}")


def _mapping(value: Any, what: str, read: Callable[[Any, str], Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Broken(f"{what}: expected names and values, got {type(value).__name__}")
    if len(value) > _MAX_NUMBERS:
        raise Broken(f"{what}: {len(value)} names, the limit is {_MAX_NUMBERS}")
    for name in value:
        if not _NAME.fullmatch(name):
            raise Broken(f"{what}: {name[:80]!r} is no name")
    return {name: read(x, f"{what}.{name}") for name, x in value.items()}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise Broken(f"{what}: expected at most {_MAX_TEXT} printable characters")
    return value


def _whole(value: Any, what: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise Broken(f"{what}: expected a whole number from {least}")
    return value


def _knob(value: Any, what: str) -> Knob:
    if isinstance(value, str):
        if not _NAME.fullmatch(value):
            raise Broken(f"{what}: expected a number or a word")
        return value
    return _whole(value, what, 0)


def _seconds(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise Broken(f"{what}: expected seconds")
    return float(value)


def _times(value: Any, what: str) -> Times:
    _names(value, what, [f.name for f in fields(Times)])
    median, low, high = (_seconds(value[n], f"{what}.{n}") for n in ("median", "low", "high"))
    if not low <= median <= high:
        raise Broken(f"{what}: the median is not between low and high")
    return Times(median, low, high, _whole(value["runs"], f"{what}.runs", 1))


def _fact(value: Any, what: str) -> Fact:
    if isinstance(value, str):
        return _text(value, what)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise Broken(f"{what}: expected text or a number")
    return value
