"""Where names go beside a picture, so that they keep their order and none covers another."""

from __future__ import annotations

from collections.abc import Sequence


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart to at least ``gap``, each as little as possible, in the order of ``wanted``.

    All stay within ``low`` … ``high`` if they fit there; if not, the gap is what fits. Names that collide form a block
    around the mean of where they want to be.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    blocks: list[tuple[float, int]] = []  # (sum of the members' wanted positions of the first, members)
    for index in order:
        total, count = wanted[index], 1
        while blocks and _start(blocks[-1], gap, low, high) + gap * blocks[-1][1] > _start(
            (total, count), gap, low, high
        ):
            before, members = blocks.pop()
            total, count = before + total - gap * members * count, members + count
        blocks.append((total, count))
    placed = [0.0] * len(order)
    position = iter(order)
    for block in blocks:
        first = _start(block, gap, low, high)
        for number in range(block[1]):
            placed[next(position)] = first + gap * number
    return placed


def _start(block: tuple[float, int], gap: float, low: float, high: float) -> float:
    total, count = block
    return max(low, min(total / count, high - gap * (count - 1)))
