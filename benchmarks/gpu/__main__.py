"""Everything that a first GPU should show, in ten minutes: `make gpu`.

    python -m benchmarks.gpu                      all parts on the GPU; writes docs/gpu_results.md
    python -m benchmarks.gpu attention training   some of them
    python -m benchmarks.gpu --device cpu         what a CPU can do of it; writes runs/gpu/gpu_results.md

Each part runs in a process of its own with a time limit. One that fails or hangs is reported, the others run all the
same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.page import write
from benchmarks.gpu.runner import Part, State, run_part

# Seconds are limits, not expectations: their sum is 20 minutes, a GPU that works takes half
PARTS = [
    Part("tests", "tests/gpu: bits of kernels, streams", 240),
    Part("kernels", "Times of kernels beside their floors", 90),
    Part("attention", "Attention by each kernel", 120),
    Part("training", "Training on one device", 300),
    Part("checkpoint", "Checkpoints between devices", 150),
    Part("memory", "Peak memory beside the plan", 120),
    Part("comparisons", "Beside other programs", 180),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="names of parts; none = all", metavar="PART")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the page (default: docs, on a CPU runs/gpu)")
    args = parser.parse_args()
    known = [part.name for part in PARTS]
    if unknown := [name for name in args.parts if name not in known]:
        print(f"error: no part {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU: torch sees none; --device cpu runs what needs none", file=sys.stderr)
        return 2
    results = []
    for part in PARTS:
        if not args.parts or part.name in args.parts:
            print(f"{part.name}: {part.title}, at most {part.limit_seconds:g} s", flush=True)
            results.append(run_part(part, args.device))
            print(f"{part.name}: {results[-1].summary}", flush=True)
    out = args.out or Path("docs" if args.device == "cuda" else "runs/gpu")
    print(f"written: {write(out, args.device, results)}")
    return int(any(one.state is State.failed for one in results))


if __name__ == "__main__":
    raise SystemExit(main())
