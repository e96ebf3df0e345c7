"""Reads a report's HTML: tags, attributes, headings, text, and what its script reads."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "img", "source", "path", "rect", "br", "wbr", "input", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that close in the wrong order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.heads: list[str] = []
        self.text = ""
        self.code = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("h2", "h3"):
            self.heads.append(data)
        if "pre" in self.open:
            self.code += data


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def data_of(html: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


def ends(html: str) -> list[tuple[str, int]]:
    """(name, pixels from the top) of the names at a chart's right edge."""
    return [(text, int(top)) for top, text in re.findall(r'top:(-?\d+)px"?>([^<]*)</span>', html)]


def rewrite(run: Path, change: Any) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
