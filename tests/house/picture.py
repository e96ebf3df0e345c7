"""Draws docs/images/architecture.svg: the packages with their folders and files, and which imports which."""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
PACKAGES = {  # top to bottom; each may import those below it
    "launch": ("how it is started", "#fde8d7"),
    "train": ("how it is trained", "#e3f0dc"),
    "parallel": ("where it is computed", "#dde9f7"),
    "longcat": ("what is computed", "#efe3f4"),
}
WIDTH, LEFT, RIGHT, CHIP, LINE, CHAR, GAP = 980, 190, 860, 24, 32, 7.3, 8  # pixels


def chips(package: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what a package holds; folders first."""
    children = sorted((ROOT / package).iterdir())
    folders = [(f"{child.name}/", True) for child in children if (child / "__init__.py").is_file()]
    return folders + [(child.stem, False) for child in children if child.suffix == ".py" and child.stem[0] != "_"]


def imported(package: str) -> set[str]:
    """The other packages that a package imports."""
    found: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
    return found & PACKAGES.keys() - {package}


def band(package: str, top: float) -> tuple[str, float]:
    """One package as SVG, and the y where it ends."""
    question, colour = PACKAGES[package]
    x, y, parts = float(LEFT), top + 12, []
    for name, is_folder in chips(package):
        width = len(name) * CHAR + 14
        if x + width > RIGHT - GAP:
            x, y = float(LEFT), y + LINE
        style = f'fill="white" stroke="#555" stroke-width="{1.6 if is_folder else 0.5}"'
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{CHIP}" rx="4" {style}/>')
        weight = ' font-weight="bold"' if is_folder else ""
        parts.append(f'<text x="{x + 7:.0f}" y="{y + 16:.0f}"{weight}>{escape(name)}</text>')
        x += width + GAP
    bottom = max(y + CHIP + 12, top + 62)
    box = f'<rect x="12" y="{top:.0f}" width="{RIGHT - 12}" height="{bottom - top:.0f}" rx="8" fill="{colour}"/>'
    title = f'<text x="28" y="{top + 30:.0f}" font-size="17" font-weight="bold">{package}</text>'
    return "\n".join([box, title, f'<text x="28" y="{top + 50:.0f}">{question}</text>', *parts]), bottom


def arrow(start: tuple[float, float], end: tuple[float, float], bulge: float) -> str:
    """From the right edge of a box to that of one below it."""
    (x0, y0), (x1, y1) = start, end
    side = max(x0, x1) + bulge
    path = f"M{x0:.0f} {y0:.0f} C{side:.0f} {y0:.0f} {side:.0f} {y1:.0f} {x1 + 4:.0f} {y1:.0f}"
    return f'<path d="{path}" fill="none" stroke="#333" stroke-width="1.4" marker-end="url(#head)"/>'


def picture() -> str:
    """The whole SVG."""
    parts, ends, top = [], {}, 12.0
    for package in PACKAGES:
        text, bottom = band(package, top)
        ends[package] = (top, bottom)
        parts.append(text)
        top = bottom + 16
    order = list(PACKAGES)
    for package in order:
        for target in sorted(imported(package), key=order.index):
            distance = order.index(target) - order.index(package)
            assert distance > 0, f"{package} imports {target}"
            start = ends[package][1] - 8 - 10 * distance
            end = ends[target][0] + 14 + 12 * (distance - 1)
            parts.append(arrow((RIGHT, start), (RIGHT, end), 40 + 32 * distance))
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#333"/></marker>'
    )
    style = 'font-family="ui-monospace, DejaVu Sans Mono, monospace" font-size="12" fill="#111"'
    size = f'width="{WIDTH}" height="{top:.0f}" viewBox="0 0 {WIDTH} {top:.0f}"'
    caption = f'<text x="{RIGHT + 6}" y="{top - 8:.0f}" font-size="11">arrow: imports</text>'
    background = f'<rect width="{WIDTH}" height="{top:.0f}" fill="white"/>'
    body = "\n".join([background, *parts, caption])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<defs>{head}</defs>\n{body}\n</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
