"""A strict reader of the pages that Tessel writes: HTML as the standard has it, and what takes how much room."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr"}
PHRASING = {"a", "b", "i", "small", "span", "code", "em", "strong"}
# tag -> what may hold it, of the tags that these pages have
WITHIN = {
    "html": {""},
    "head": {"html"},
    "body": {"html"},
    **{tag: {"head"} for tag in ("meta", "title", "style")},
    "li": {"ul", "ol"},
    "tr": {"table", "thead", "tbody"},
    **{tag: {"tr"} for tag in ("td", "th")},
    **{tag: {"svg", "g"} for tag in ("rect", "line", "g", "text")},
}
FLOW = {"body", "div", "section", "main", "td", "li", "details"}
BLOCKS = {"div", "p", "ul", "ol", "table", "svg", "h1", "h2", "h3", "section", "main", "details"}
ATTRIBUTES = {
    "html": {"lang"},
    "meta": {"charset", "name", "content"},
    "svg": {"viewbox", "role", "aria-label"},
    "rect": {"class", "x", "y", "width", "height", "stroke", "stroke-width"},
    "line": {"class", "x1", "x2", "y1", "y2"},
    "text": {"class", "x", "y"},
}
EVERY = {"class", "title", "id", "style"}


@dataclass
class Element:
    """A tag, its attributes, what is in it, and the text directly in it."""

    tag: str
    attrs: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list[Element]:
        """Elements inside, in order."""
        found = [] if self.tag != tag else [self]
        for c in self.children:
            found += c.all(tag)
        return found

    def words(self) -> str:
        return self.text + "".join(c.words() for c in self.children if c.tag not in ("title", "style"))


class Strict(HTMLParser):
    """Raises where a page is not well formed, or has what these pages must not have."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.root = Element("", {})
        self.open = [self.root]
        assert text.startswith("<!doctype html>\n"), "no doctype"
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"{self.open[-1].tag} is open at the end"
        assert [c.tag for c in self.root.children] == ["html"]
        assert [c.tag for c in self.root.children[0].children] == ["head", "body"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._add(tag, attrs)
        if tag in VOID:
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID or any(e.tag == "svg" for e in self.open), f"<{tag}/> closes nothing in HTML"
        self._add(tag, attrs)
        self.open.pop()

    def _add(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside = self.open[-1].tag
        names = [n for n, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        assert all(v is not None for _, v in attrs), f"<{tag}> has an attribute without a value"
        allowed = EVERY | ATTRIBUTES.get(tag, set())
        assert set(names) <= allowed, f"<{tag}> has {set(names) - allowed}"
        if tag in WITHIN and not (tag == "title" and inside in ("rect", "g")):
            assert inside in WITHIN[tag], f"<{tag}> in <{inside}>"
        elif tag in BLOCKS:
            assert inside in FLOW, f"<{tag}> in <{inside}>"
        elif tag != "title":
            assert tag in PHRASING, f"<{tag}> is none of the tags of these pages"
        element = Element(tag, {n: v or "" for n, v in attrs})
        self.open[-1].children.append(element)
        self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> where <{self.open[-1].tag}> is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        assert self.open[-1].tag == "style" or "&" not in data, f"an & by itself: {data!r}"
        if data.strip():
            assert self.open[-1].tag not in ("table", "tr", "ul", "svg", "html", "head", "g", ""), f"text: {data!r}"
        self.open[-1].text += data

    def handle_entityref(self, name: str) -> None:
        assert name in ("amp", "lt", "gt", "quot"), f"&{name};"
        self.open[-1].text += {"amp": "&", "lt": "<", "gt": ">", "quot": '"'}[name]

    def handle_charref(self, name: str) -> None:
        self.open[-1].text += chr(int(name.removeprefix("x"), 16 if name.startswith("x") else 10))


def width(text: str, size: float) -> float:
    """How wide a text is in a sans-serif of a size in pixels, at most: DejaVu Sans, the widest in use, is 0.6 em on
    average for lower case and figures, 0.69 for capitals and others."""
    return size * sum(0.32 if c in " .,:;'|il()·-" else 0.6 if c.islower() or c.isdigit() else 0.69 for c in text)


def widest_word(text: str, size: float) -> float:
    """The longest piece that a browser does not break."""
    return max((width(w, size) for w in re.split(r"[\s\-]", text)), default=0.0)
