"""`python -m train key=value …`, also the program `longcat-rank`: one rank, under torchrun or alone."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
try:  # for this import alone: a user's longcat/ may come first
    from train.process.parent import end_with_parent
    from train.process.search_path import leave_out_current_folder, leave_out_in_children

    leave_out_current_folder()
    end_with_parent()  # before the imports that take seconds
finally:
    del sys.path[0]

from longcat.errors import ConfigError
from longcat.garbage import import_without_collections
from parallel.sizes import world_from_environment
from train.check import check_sizes
from train.compose import compose, named_folder
from train.process.lasting_streams import lasting_streams
from train.run_dir.folder import refuse


def main(overrides: list[str] | None = None) -> int:
    """Train as one rank; returns its exit code."""
    if overrides is None:  # as a program
        leave_out_in_children()
    with lasting_streams():
        return run(sys.argv[1:] if overrides is None else overrides)


def run(overrides: list[str]) -> int:
    try:
        config = compose(overrides)
    except ConfigError as error:
        return refuse(named_folder(overrides), error)
    try:
        check_sizes(config, world_from_environment()[2])
    except ConfigError as error:
        return refuse(config.run.folder, error)
    with import_without_collections("train.process.rank"):
        from train.process.rank import main as train  # torch

    return train(config)


if __name__ == "__main__":
    sys.exit(main())
