"""Runs one part in this process.

python -m benchmarks.gpu.one attention cuda     prints the part's rows as one line of JSON
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

import torch

from benchmarks.gpu.part import NoGpuError, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("device", choices=("cuda", "cpu"))
    args = parser.parse_args()
    module: Any = import_module(f"benchmarks.gpu.{args.part}")
    try:
        report(module.run(torch.device(args.device)))
    except NoGpuError as error:
        report(str(error))


if __name__ == "__main__":
    main()
