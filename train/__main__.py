"""`python -m train key=value …`: one rank, under torchrun or alone."""

from __future__ import annotations

import sys

from longcat.errors import ConfigError
from longcat.lasting_streams import lasting_streams
from train.compose import compose, named_folder
from train.run_dir import refuse


def main(overrides: list[str]) -> int:
    with lasting_streams():
        return run(overrides)


def run(overrides: list[str]) -> int:
    try:
        config = compose(overrides)
    except ConfigError as error:
        return refuse(named_folder(overrides), error)
    from train.process import main as train

    return train(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
