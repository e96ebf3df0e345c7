"""The program `longcat`: one verb each, the same as `python -m launch`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from launch import verbs
from longcat.errors import BAD_INPUT, LongCatError

USAGE = """usage: longcat VERB [key=value …]

{verbs}

longcat VERB --help says more of one; docs/user_guide.md says the rest.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code (0 done, 2 wrong input, 3 stopped, 4 unhealthy, 1 anything else)."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        print(f"error: no verb given; use one of {', '.join(VERBS)}, or --help", file=sys.stderr)
        return BAD_INPUT
    if words[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs=listing()))
        return 0
    verb = VERBS.get(words[0])
    if verb is None:
        print(f"error: unknown verb {words[0]!r}; use one of {', '.join(VERBS)}", file=sys.stderr)
        return BAD_INPUT
    rest = words[1:]
    if any(word in ("-h", "--help") for word in rest):
        print((verb.__doc__ or "").strip())
        return 0
    try:
        return verb(rest)
    except LongCatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def listing() -> str:
    """One line for each verb: the first of its docstring."""
    return "\n".join(f"  {name:11} {(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in VERBS.items())


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": verbs.train,
    "data": verbs.data,
    "report": verbs.report,
    "checkpoint": verbs.checkpoint,
    "grow": verbs.grow,
    "counts": verbs.counts,
    "export": verbs.export,
    "import": verbs.import_,
    "generate": verbs.generate,
}

if __name__ == "__main__":
    sys.exit(main())
