"""A report as one HTML page. Everything from a user's program is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #8885; }
table { border-collapse: collapse; margin: .5rem 0 1rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #8888; }
pre { background: #8881; padding: .7rem; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
summary { cursor: pointer; padding: .15rem 0; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
.figures b { display: block; font-size: 1.3rem; }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page for ``Report.to_dict()``."""
    title = f"Tessel report: {report['name'] or '(function)'}"
    body = [f"<h1>{escape(title)}</h1>", f"<p>target {escape(report['target'])}</p>"]
    body += [f"<p>{escape(n)}</p>" for n in report["notes"]]
    for c in report["compilations"]:
        body.extend(_compilation(c))
    body.append("<h2>Recompiles</h2>")
    rows = [(r["function"], r["number"], r["reason"]) for r in report["recompiles"]]
    body.append(_table(("function", "number", "guard that failed"), rows) or "<p>none</p>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>" + "\n".join(body) + "</body></html>\n"
    )


def _compilation(c: Mapping[str, Any]) -> Iterable[str]:
    yield f"<h2>{escape(c['kind'])} graph {escape(c['name'])} for {escape(c['target'])}</h2>"
    figures = (
        ("nodes captured", c["captured"]),
        ("kernels", len(c["kernels"])),
        ("launches", c["launches"]),
        ("library calls", len(c["calls"])),
        ("fallbacks", len(c["fallbacks"])),
        ("bytes unfused", f"{c['bytes_before']:,}"),
        ("bytes now", f"{c['bytes_after']:,}"),
        ("peak bytes", f"{c['peak_bytes']:,}"),
        ("seconds", f"{c['seconds']:.2f}"),
    )
    shown = "".join(f"<div><b>{escape(str(v))}</b>{escape(k)}</div>" for k, v in figures)
    yield f'<div class="figures">{shown}</div>'
    yield from (f"<p>{escape(n)}</p>" for n in c["notes"])
    if c["groups"]:
        yield "<h3>What fused and why</h3>"
        yield _table(
            ("kernel", "operators", "bytes saved", "why", "where"),
            [
                (g["kernel"], ", ".join(g["operators"]), f"{g['saved_bytes']:,}", g["why"], g["where"])
                for g in c["groups"]
            ],
        )
    for heading, name in (("What fell back and why", "fallbacks"), ("What torch computes and why", "calls")):
        if c[name]:
            yield f"<h3>{heading}</h3>"
            yield _table(
                ("operator", "reason", "where"),
                [(f["operator"], f["reason"], f["where"]) for f in c[name]],
            )
    yield "<h3>Kernels</h3>"
    for k in c["kernels"]:
        yield _fold(f"{k['name']} ({k['family']}, {len(k['sites'])} sites)  {k['file']}", k["source"])
    yield "<h3>Graph after each pass</h3>"
    for p in c["passes"]:
        yield _fold(f"{p['name']}: {p['nodes']} nodes, {p['seconds'] * 1e3:.1f} ms", p["graph"])
    if c["host"]:
        yield "<h3>Host program</h3>"
        yield _fold(c["host_file"] or "text", c["host"])


def _fold(head: str, text: str) -> str:
    return f"<details><summary>{escape(head)}</summary><pre>{escape(text)}</pre></details>"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["<tr>" + "".join(f"<td>{escape(str(x))}</td>" for x in row) + "</tr>" for row in rows]
    if not lines:
        return ""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
