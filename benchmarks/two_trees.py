"""One benchmark in two checkouts of this project, in turn, so that both meet the same machine.

    git worktree add --detach ../before COMMIT
    python -m benchmarks.two_trees ../before weak_scaling --rounds 5
    python -m benchmarks.two_trees ../before overlap --run $PWD/runs/quickstart --turns 2

Both run with this Python, and what follows the benchmark's name is for it. The order changes from turn to turn. Of each
number in the line of JSON that a benchmark prints, the table has the median over turns, and the least and the most; of
a list of numbers, its median first; other lists have a number for each place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import print_json, print_table

HERE = Path(__file__).resolve().parents[1]
TREES = ("before", "now")


def measure(tree: Path, words: list[str]) -> dict[str, float]:
    """The numbers that a benchmark prints in ``tree``, by their names."""
    if not (tree / "benchmarks" / f"{words[0]}.py").exists():  # Python would take an installed checkout's
        raise SystemExit(f"{tree} has no benchmarks/{words[0]}.py")
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]]
    ended = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"benchmark"')]
    if ended.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} in {tree} ended with {ended.returncode} and {len(lines)} results")
    found = json.loads(lines[-1])
    return dict(numbers({key: value for key, value in found.items() if key not in ("benchmark", "machine")}))


def numbers(tree: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of each number; a list of numbers has one, its median; in other lists places are names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, f"{name}.{key}" if name else key)
    elif isinstance(tree, list) and tree and all(_is_number(one) for one in tree):
        yield name, float(statistics.median(tree))
    elif isinstance(tree, list):
        for index, one in enumerate(tree):
            yield from numbers(one, f"{name}.{index}")
    elif _is_number(tree):
        yield name, float(tree)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def compare(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """By number that differs and that both trees have: by tree, its values in the order of the turns."""
    shared = [name for name in found["now"][0] if all(name in one for runs in found.values() for one in runs)]
    values = {name: {tree: [one[name] for one in runs] for tree, runs in found.items()} for name in shared}
    return {name: each for name, each in values.items() if len({*each["before"], *each["now"]}) > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="folder of the other checkout")
    parser.add_argument("benchmark", help="module in benchmarks/, for instance weak_scaling")
    parser.add_argument("--turns", type=int, default=3)
    args, words = parser.parse_known_args()
    folders = dict(zip(TREES, (args.before.resolve(), HERE), strict=True))
    found: dict[str, list[dict[str, float]]] = {tree: [] for tree in TREES}
    for turn in range(args.turns):
        for tree in TREES if turn % 2 == 0 else reversed(TREES):
            print(f"turn {turn + 1} of {args.turns}: {tree}", flush=True)
            found[tree].append(measure(folders[tree], [args.benchmark, *words]))
    compared, rows = compare(found), []
    for name, each in compared.items():
        middle = {tree: statistics.median(values) for tree, values in each.items()}
        shown = [f"{middle[tree]:.4g} ({min(each[tree]):.4g} to {max(each[tree]):.4g})" for tree in TREES]
        rows.append([name, *shown, f"{middle['now'] / middle['before'] - 1:+.1%}" if middle["before"] else ""])
    print_table(f"{args.benchmark}, {args.turns} turns", ["number", *TREES, "change"], rows)
    print_json("two_trees", {"of": args.benchmark, "words": words, "values": compared})


if __name__ == "__main__":
    main()
