"""One run of an arm in a process of its own: python -m benchmarks.evidence.train_arm VARIANT key=value …"""

from __future__ import annotations

import sys

from benchmarks.evidence import routing
from benchmarks.evidence.variants import VARIANTS
from longcat.errors import OK
from train.compose import compose
from train.process.rank import main

if __name__ == "__main__":
    variant, *overrides = sys.argv[1:]
    if variant != "-":
        VARIANTS[variant]()
    config = compose(overrides)
    code = main(config)
    if code == OK:
        routing.measure(config)
    raise SystemExit(code)
