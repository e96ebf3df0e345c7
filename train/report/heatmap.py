"""A heat map as a small PNG with a palette: one picture for light pages, one for dark."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from train.report.reading import Array

LEVELS = 63  # odd, so that the middle level is the neutral colour
GAP = 255

Colour = tuple[int, int, int]
LIGHT: tuple[Colour, Colour, Colour] = ((23, 84, 158), (244, 244, 242), (196, 77, 8))
DARK: tuple[Colour, Colour, Colour] = ((112, 178, 245), (36, 41, 48), (247, 150, 70))


def to_levels(ratio: Array, octaves: float = 1.0) -> NDArray[np.uint8]:
    """Map load / mean to palette numbers, logarithmic, cut at 2^±octaves; 1.0 is the neutral middle."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(np.log2(ratio) / octaves, -1, 1)
    share = np.where(np.isnan(share), 0.0, share)
    levels: NDArray[np.uint8] = np.rint((share + 1) / 2 * (LEVELS - 1)).astype(np.uint8)
    return levels


def palette(anchors: tuple[Colour, Colour, Colour]) -> NDArray[np.uint8]:
    """Return [256, 3]: `LEVELS` colours through three anchors."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    position = np.linspace(0, 2, LEVELS)
    for channel in range(3):
        colours[:LEVELS, channel] = np.rint(np.interp(position, [0, 1, 2], [a[channel] for a in anchors]))
    return colours


def png(levels: NDArray[np.uint8], colours: NDArray[np.uint8]) -> bytes:
    """Encode palette numbers [rows, columns] as a PNG; the number `GAP` is transparent."""
    rows, columns = levels.shape
    raw = np.hstack([np.zeros((rows, 1), dtype=np.uint8), levels]).tobytes()  # filter byte 0 before each row
    opacity = bytes(0 if number == GAP else 255 for number in range(256))
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0))
        + _chunk(b"PLTE", colours.tobytes())
        + _chunk(b"tRNS", opacity)
        + _chunk(b"IDAT", zlib.compress(raw, 9))
        + _chunk(b"IEND", b"")
    )


def picture(levels: NDArray[np.uint8], label: str) -> str:
    """Return a <picture> that follows the reader's colour scheme. `label` must be escaped already."""
    light, dark = (_data_uri(png(levels, palette(anchors))) for anchors in (LIGHT, DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{label}"></picture>'
    )


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
