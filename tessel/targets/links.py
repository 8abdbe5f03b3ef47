"""How fast devices talk to each other: latency and bandwidth of every collective, inside a node and across nodes.

The figures are those of the alpha-beta model: a collective takes ``latency + bytes on the busiest wire ÷ bus
bandwidth``. The bus bandwidth is what one device sends (and receives) at once; NCCL reports it as ``busbw``. Where a
source gives time over the tensor's size instead (``algbw``), it is converted here: × (n−1)/n for all-gather,
reduce-scatter and all-to-all, × 2(n−1)/n for all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from types import MappingProxyType

from ..errors import TesselError
from .target import Target

__all__ = ["COLLECTIVES", "LINKS", "Links", "links_of"]

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")
US, GB = 1e-6, 1e9


@dataclass(frozen=True)
class Links:
    """What connects the devices of one kind.

    Attributes:
        name: the target's.
        node: devices that share the fast links, as machines are sold.
        inside: for ``all-gather``, ``all-reduce`` and ``all-to-all``, by the number of ranks inside one node:
            ``(latency in seconds, bus bandwidth in bytes a second)``.
        nic: bytes a second that one device sends to another node.
        hop_alone, hop_full: seconds that a ring of one rank a node, or of whole nodes, takes for each further node.
        tree: ``(base, step)`` seconds: an all-reduce over whole nodes takes ``base + step · log2(nodes)``.
        tree_bus: bus bandwidth of such an all-reduce over 2 nodes, and over more.
        exchange: latency of an all-to-all by the number of nodes.
        sources: where each number is from.
    """

    name: str
    node: int
    inside: Mapping[str, Mapping[int, tuple[float, float]]]
    nic: float
    hop_alone: float
    hop_full: float
    tree: tuple[float, float]
    tree_bus: tuple[float, float]
    exchange: Mapping[int, float]
    sources: Mapping[str, str]

    def at(self, kind: str, ranks: int, nodes: int) -> tuple[float, float]:
        """``(latency, bus bandwidth)`` of a collective over ``nodes`` nodes with ``ranks`` of its ranks in each.

        >>> latency, bus = LINKS["h100"].at("all-gather", 8, 1)
        >>> round(latency * 1e6), round(bus / 1e9)
        (30, 345)
        >>> latency, bus = LINKS["h100"].at("all-reduce", 1, 8)  # one rank a node
        >>> round(latency * 1e6), round(bus / 1e9)
        (204, 48)
        """
        table = self.inside["all-gather" if kind in ("reduce-scatter", "permute") else kind]
        latency, bus = _between(table, ranks) if ranks > 1 else (0.0, float("inf"))
        if nodes == 1:
            return (latency, bus) if kind != "permute" else (table[min(table)][0], bus)
        if kind == "permute":
            return self.hop_alone, self.nic
        if kind == "all-to-all":
            return _between({n: (t, 1.0) for n, t in self.exchange.items()}, nodes)[0], self.nic
        whole = (ranks - 1) / (self.node - 1) if self.node > 1 else 0.0
        hops = (nodes - 1) * (self.hop_alone + min(1.0, whole) * (self.hop_full - self.hop_alone))
        if kind == "all-reduce":
            if ranks == 1:
                return 2 * hops * self._reduce_hop, self.nic
            base, step = self.tree
            return base + step * log2(nodes), min(ranks * self.nic, self.tree_bus[0 if nodes == 2 else 1])
        return latency + hops, ranks * self.nic

    @property
    def _reduce_hop(self) -> float:
        """A hop of an all-reduce's ring against one of an all-gather's: 204 ÷ (2 · 106) on H100."""
        return 204 / 212


def _between(table: Mapping[int, tuple[float, float]], n: int) -> tuple[float, float]:
    """The entry for ``n``, linear in log2 between known ones; beyond them the last latency grows with ``n``."""
    known = sorted(table)
    if n in table:
        return table[n]
    low, high = max((k for k in known if k < n), default=known[0]), min((k for k in known if k > n), default=known[-1])
    if low == high:
        latency, bus = table[low]
        return latency * max(1.0, n / low), bus
    part = (log2(n) - log2(low)) / (log2(high) - log2(low))
    return tuple(a + part * (b - a) for a, b in zip(table[low], table[high]))  # type: ignore[return-value]


_NCCL = "NCCL's authors, H100 with 8 GPUs a node, time over size converted to bus bandwidth"
_H100 = Links(
    "h100",
    8,
    inside={
        "all-gather": {2: (8 * US, 537 * GB / 2), 4: (17 * US, 434 * GB * 3 / 4), 8: (30 * US, 394 * GB * 7 / 8)},
        "all-reduce": {2: (10 * US, 324 * GB), 4: (15 * US, 236 * GB * 3 / 2), 8: (31 * US, 267 * GB * 7 / 4)},
        "all-to-all": {8: (50 * US, 380 * GB * 7 / 8)},
    },
    nic=48 * GB,
    hop_alone=106 * US / 7,
    hop_full=38.1 * US,
    tree=(25 * US, 28 * US),
    tree_bus=(500 * GB, 315 * GB),
    exchange={2: 37 * US, 4: 42 * US, 8: 60 * US, 16: 98 * US, 32: 290 * US},
    sources={
        "node": "NVIDIA DGX/HGX H100: 8 GPUs on NVSwitch",
        "inside": f"{_NCCL}: all-gather 30 µs 394 GB/s, all-reduce 31/267, all-to-all 50/380 (n=8), and n=2, 4. "
        "Read as time over size: 537 GB/s at n=2 is more than the link's 450",
        "nic": f"{_NCCL}: one rank a node over 8 nodes: all-gather 54.9 GB/s and all-reduce 27.4, both 48 GB/s of bus; "
        "whole nodes give 8 × 48 at 2, 4, 8 and 32 nodes",
        "hop_alone": f"{_NCCL}: one rank a node over 8 nodes, all-gather 106 µs, all-reduce 204 µs",
        "hop_full": f"{_NCCL}: all-gather 70/146/297/1204 µs at 2/4/8/32 nodes = 30 + 38.1 (nodes − 1)",
        "tree": f"{_NCCL}: all-reduce 53/81/109/165 µs at 2/4/8/32 nodes = 25 + 28 log2(nodes)",
        "tree_bus": f"{_NCCL}: all-reduce 267/160/160/160 GB/s at 2/4/8/32 nodes",
        "exchange": f"{_NCCL}: all-to-all latency at 2 to 32 nodes",
    },
)


def _like_h100(name: str, link: float, nic: tuple[float, str], what: str) -> Links:
    """A device nobody has measured for us: H100's latencies, bandwidths scaled by the data sheet's link rate."""
    scale = link / 450e9
    inside = {k: {n: (t, b * scale) for n, (t, b) in table.items()} for k, table in _H100.inside.items()}
    derived = f"derived: H100's × {what}; latencies assumed to be H100's"
    sources = dict.fromkeys(_H100.sources, derived) | {"nic": nic[1], "node": "assumed: 8 GPUs a node"}
    bus = (min(500 * GB * scale, 8 * nic[0] * 1.3), 8 * nic[0] * 315 / 384)
    return Links(
        name, 8, inside, nic[0], _H100.hop_alone, _H100.hop_full, _H100.tree, bus, _H100.exchange, sources
    )  # fmt: skip


_HDR = (24 * GB, "derived: 200 Gb/s HDR a GPU (DGX A100 data sheet) at the efficiency of H100's 400 Gb/s")
_NDR = (48 * GB, "assumed: 400 Gb/s a GPU, as on H100")
_PCIE = (12 * GB, "assumed: 100 Gb/s a GPU")

LINKS: Mapping[str, Links] = MappingProxyType(
    {
        "a100": _like_h100("a100", 300e9, _HDR, "300/450 GB/s (NVLink 3, NVIDIA data sheet)"),
        "h100": _H100,
        "h200": _like_h100("h200", 450e9, _NDR, "1 (NVLink 4, as H100)"),
        "b200": _like_h100("b200", 900e9, _NDR, "900/450 GB/s (NVLink 5, NVIDIA data sheet)"),
        "mi300x": _like_h100("mi300x", 448e9, _NDR, "448/450 GB/s (7 Infinity Fabric links)"),
        "l40s": _like_h100("l40s", 32e9, _PCIE, "32/450 GB/s (PCIe 4 x16)"),
        "rtx4090": _like_h100("rtx4090", 32e9, _PCIE, "32/450 GB/s (PCIe 4 x16)"),
    }
)
"""Target name -> links. Sources stand in each record."""


def links_of(target: Target) -> Links:
    """The links of a device; a device from a user's file gets H100's scaled by its ``link_bytes_per_s``.

    Raises:
        TesselError: the device has no links to others.
    """
    if target.name in LINKS:
        return LINKS[target.name]
    if target.link_bytes_per_s is None:
        raise TesselError(
            f"target {target.name}: no links to other devices are known (link_bytes_per_s is missing); give the mesh "
            "its links, or name a GPU"
        )
    what = f"{target.link_bytes_per_s / 1e9:.0f}/450 GB/s ({target.sources['link_bytes_per_s']})"
    return _like_h100(target.name, target.link_bytes_per_s, _NDR, what)
