"""The program `longcat`, also `python -m launch`: its verbs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from launch import verbs
from longcat.errors import BAD_INPUT, LongCatError
from longcat.lasting_streams import lasting_streams

USAGE = """usage: longcat VERB [key=value …]

{verbs}

longcat VERB --help describes one verb; docs/guide/README.md is the guide.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code (0 done, 2 wrong input, 3 stopped, 4 unhealthy, 1 anything else)."""
    with lasting_streams():
        return run(sys.argv[1:] if argv is None else argv)


def run(arguments: list[str]) -> int:
    if not arguments:
        print(f"error: no verb given; use one of {', '.join(VERBS)}, or --help", file=sys.stderr)
        return BAD_INPUT
    if arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs=listing()))
        return 0
    verb = VERBS.get(arguments[0])
    if verb is None:
        print(f"error: unknown verb {arguments[0]!r}; use one of {', '.join(VERBS)}", file=sys.stderr)
        return BAD_INPUT
    rest = arguments[1:]
    if any(argument in ("-h", "--help") for argument in rest):
        print((verb.__doc__ or "").strip())
        return 0
    try:
        return verb(rest)
    except LongCatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def listing() -> str:
    """One line per verb: the first of its docstring."""
    return "\n".join(f"  {name:11} {(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in VERBS.items())


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": verbs.train,
    "data": verbs.data,
    "report": verbs.report,
    "diff": verbs.diff,
    "checkpoint": verbs.checkpoint,
    "grow": verbs.grow,
    "counts": verbs.counts,
    "export": verbs.export,
    "import": verbs.import_,
    "generate": verbs.generate,
}

if __name__ == "__main__":
    sys.exit(main())
