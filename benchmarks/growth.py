"""Growth against full depth from scratch: validation loss by tokens and by FLOPs, both methods, three moments.

One shallow run is trained at a constant learning rate and grown at three of its checkpoints, by stacking and by
interposing. The grown runs, one of full depth from scratch and the shallow run itself continue to the same FLOPs.
FLOPs count the FFN experts in use and the shallow run's steps before a growth; they leave validation out.

    python -m benchmarks.growth train full                     starts or resumes a run; --seconds 150 stops it
    python -m benchmarks.growth train half stack-100 …         in this order: growth takes a checkpoint of half
    python -m benchmarks.growth draw                           tables, docs/images/growth.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.common import print_json, print_table
from benchmarks.growth_picture import draw
from benchmarks.growth_runs import FACTOR, NAMES, GrowthRun, results
from longcat.errors import BAD_INPUT, OK, STOPPED, ConfigError
from train.checkpoint.grow import GrowConfig, GrowthOptions, grow
from train.checkpoint.manifest import list_checkpoints
from train.process.rank import main as train_here


def train(run: GrowthRun, seconds: float) -> int:
    """Start or resume the run; a run that starts from a checkpoint of another depth is grown first."""
    if run.is_complete:
        return OK
    name = f"step-{run.moment:08d}"
    target = run.path / "checkpoints" / name
    if run.moment and not list_checkpoints(target.parent):
        source = GrowthRun("half", run.folder).path / "checkpoints" / name
        grow(GrowConfig(str(source), str(target), GrowthOptions(FACTOR, run.method)))
    return train_here(run.config(seconds))


def train_all(names: list[str], folder: Path, seconds: float) -> int:
    """Train each of ``names`` until ``seconds`` have passed (0 = no limit)."""
    end = time.monotonic() + seconds
    for name in names:
        left = end - time.monotonic() if seconds else 0.0
        if seconds and left < 1:
            return STOPPED
        code = train(GrowthRun(name, folder), left)
        if code:
            return code
    return OK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "draw"))
    parser.add_argument("names", nargs="*", help=f"of {' '.join(NAMES)}; none = all")
    parser.add_argument("--folder", type=Path, default=Path("runs/growth"))
    parser.add_argument("--seconds", type=float, default=0.0, help="save and stop after this long")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/growth.png"))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown runs {sorted(unknown)}; there are {' '.join(NAMES)}")
    try:
        if arguments.action == "train":
            return train_all(arguments.names or NAMES, arguments.folder, arguments.seconds)
    except ConfigError as error:
        print(f"error: {error}")
        return BAD_INPUT
    found = results(arguments.folder)
    columns = ["run", "steps", "rise (nats)", "recovered after (steps)", "at equal tokens", "at equal FLOPs"]
    rows = [
        [
            one.name,
            f"{one.last_step} of {GrowthRun(one.name, arguments.folder).steps}",
            shown(one.rise, 2),
            str(one.recovered_after or ""),
            shown(one.equal_tokens, 3),
            shown(one.equal_flops, 3),
        ]
        for one in found
    ]
    print_table("validation loss minus that of full depth from scratch, nats per token", columns, rows)
    print_json("growth", {"outcomes": [vars(one) for one in found]})
    draw(arguments.folder, found, arguments.picture)
    return OK


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


if __name__ == "__main__":
    raise SystemExit(main())
