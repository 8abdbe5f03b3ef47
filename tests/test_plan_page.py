"""The page about a plan: well formed, self-contained, within 1280 pixels, readable on paper."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from page import Element, Strict, width
from test_stage_plans import CONFIGS, LLAMA

from tessel.sharding.captured import capture_model
from tessel.sharding.html import plan_page
from tessel.sharding.planner import Request, make_plan
from tessel.targets.mesh import Mesh

WINDOW = 1280  # pixels across, of which a scroll bar takes 17
KINDS = ["one stage", "stages", "many microbatches", "inference"]


@cache
def page(kind: str, folder: str) -> tuple[Element, str]:
    import json
    from pathlib import Path

    path = Path(folder) / "llama.json"
    path.write_text(json.dumps(json.loads((CONFIGS / "llama-3-8b.json").read_text()) | LLAMA))
    train, batch, m = kind != "inference", 256 if kind == "many microbatches" else 16, 1
    m = {"stages": 4, "many microbatches": 128}.get(kind, 1)
    asked: dict[str, Any] = {"schedule": "1f1b"} if m > 1 else {}
    model = capture_model(f"hf:{path}", batch=batch, seq=64, train=train, microbatches=m)
    mesh = Mesh({"pp": 2, "dp": 2} if m > 1 else {"dp": 2, "tp": 4})
    text = plan_page(make_plan(model, mesh, "h100", Request(train=train, microbatches=m, **asked)))
    return Strict(text).root, text


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Element, str]:
    return page(request.param, str(tmp_path_factory.getbasetemp()))


def test_the_page_is_well_formed_and_self_contained(made: tuple[Element, str]) -> None:
    root, text = made
    assert root.all("title")[0].text.startswith("Tessel plan: ")
    assert not re.search(r"(https?:)?//|url\(|@import|<script|<link|<img|<iframe|\bon[a-z]+=|javascript:", text)
    headings = [h.words() for h in root.all("h2")]
    for wanted in ("Mesh", "Memory of a device", "Time of a step", "Parameters", "Notes"):
        assert wanted in headings, headings
    assert len(root.all("h1")) == 1 and len(set(headings)) == len(headings)
    assert all(s.attrs["aria-label"] and s.attrs["role"] == "img" for s in root.all("svg"))


def test_pictures_keep_to_their_frames(made: tuple[Element, str]) -> None:
    """Boxes and texts lie inside; no text runs into a box of its row, nor out of a box that it names."""
    root, _ = made
    for svg in root.all("svg"):
        x0, y0, wide, high = map(float, svg.attrs["viewbox"].split())
        assert (x0, y0) == (0, 0)
        boxes = [tuple(float(b.attrs[k]) for k in ("x", "y", "width", "height")) for b in svg.all("rect")]
        for x, y, w, h in boxes:
            assert x >= 0 and y >= 0 and w > 0 and x + w <= wide + 0.01 and y + h <= high
        for t in svg.all("text"):
            x, y, inside = float(t.attrs["x"]), float(t.attrs["y"]), t.attrs.get("class", "").startswith("in")
            room = width(t.text, 9 if inside else 12)
            assert 0 <= y <= high
            if inside:  # in the middle of its box
                own = next(b for b in boxes if b[0] <= x <= b[0] + b[2] and b[1] <= y <= b[1] + b[3])
                assert room <= own[2], f"{t.text!r} takes {room:.0f} of {own[2]:.0f}"
                continue
            assert x + room <= wide, f"{t.text!r} ends at {x + room:.0f}"
            assert not any(b[0] < x + room and x < b[0] + b[2] and b[1] <= y <= b[1] + b[3] for b in boxes), t.text


def test_tables_fit_into_a_window(made: tuple[Element, str]) -> None:
    """Words that nothing breaks leave room for the rest: cells of text break anywhere, cells of numbers nowhere."""
    root, text = made
    (body,) = re.findall(r"body \{[^}]*max-width: (\d+)rem; margin: 2rem auto; padding: 0 1rem", text)
    room = min(int(body) * 16, WINDOW - 17) - 32
    for table in root.all("table"):
        columns: dict[int, float] = {}
        for row in table.all("tr"):
            for i, cell in enumerate(c for c in row.children if c.tag in ("td", "th")):
                whole = cell.attrs.get("class") == "n"
                least = width(cell.words(), 13) if whole else width("x" * 12, 13)
                columns[i] = max(columns.get(i, 0.0), least + 0.8 * 16)
        assert sum(columns.values()) <= room, {i: round(w) for i, w in columns.items()}
    assert not re.search(r"(min-)?width: *\d{4,}px", text)


def test_paper(made: tuple[Element, str]) -> None:
    """A4 across: colours are printed, blocks and rows are not torn, nothing is wider than the sheet."""
    _, text = made
    (paper,) = re.findall(r"@media print \{(.*?)\n\}", text, re.DOTALL)
    for rule in ("max-width: none", "break-inside: avoid", "print-color-adjust: exact", "@page { size: A4 landscape"):
        assert rule in paper, rule
    assert "color-scheme: light dark" in text


def test_words_in_boxes_stand_out(made: tuple[Element, str]) -> None:
    """Contrast of text on every colour, by WCAG 2.2's formula: 4.5 to 1 at the least."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.05 + sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    _, text = made
    colours = dict(re.findall(r"--c(\d): #(\w{6})", text))
    (dark,) = re.findall(r"\n((?:\.cells \.k\d, )+)svg \.dark \{ color: #111", text)
    assert len(colours) == 8
    for number, colour in colours.items():
        a, b = light(colour), light("111111" if f".k{number}," in dark else "ffffff")
        assert max(a, b) / min(a, b) >= 4.5, colour
