"""The program `longcat`, also `python -m launch`: its verbs."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
try:  # for this import alone: a user's longcat/ may come first
    from train.process.search_path import leave_out_current_folder, leave_out_in_children

    leave_out_current_folder()
finally:
    del sys.path[0]

import difflib
import errno
import shlex
from collections.abc import Callable

from launch.signals import ignore_requests
from launch.verbs import VERBS
from longcat import __version__
from longcat.errors import BAD_INPUT, CRASHED, OK, STOPPED, ConfigError, LongCatError
from train.process.environment import COMMAND
from train.process.lasting_streams import lasting_streams
from train.process.refusal import leave_refusal
from train.process.stop import Interrupted, interruptible

UNUSABLE_PATH = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
)

USAGE = """usage: longcat VERB [key=value …]

{verbs}

longcat VERB --help describes one verb; longcat --version prints the version; docs/guide/README.md is the guide.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code (0 done, 2 wrong input, 3 stopped, 4 unhealthy, 1 anything else)."""
    if argv is None:  # as a program
        leave_out_in_children()
        os.environ[COMMAND] = shlex.join(["longcat", *sys.argv[1:]])
    with lasting_streams():
        code = run(sys.argv[1:] if argv is None else argv)
        if argv is None:
            ignore_requests()
        return code


def run(arguments: list[str]) -> int:
    if not arguments:
        print(f"error: no verb given; use one of {', '.join(VERBS)}, or --help", file=sys.stderr)
        return BAD_INPUT
    if arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs=listing()))
        return OK
    if arguments[0] in ("-V", "--version", "version"):
        print(f"longcat {__version__}")
        return OK
    verb = VERBS.get(arguments[0])
    if verb is None:
        print(f"error: unknown verb {arguments[0]!r}; {suggestion(arguments[0])}", file=sys.stderr)
        return BAD_INPUT
    rest = arguments[1:]
    if any(argument in ("-h", "--help") for argument in rest):
        print(description(verb))
        return OK
    try:
        with interruptible():
            check_current_folder()
            return verb(rest)
    except Interrupted as interrupt:
        print(interrupt, file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt as interrupt:
        print(f"error: {str(interrupt) or 'stopped by Ctrl-C'}", file=sys.stderr)
        return CRASHED
    except LongCatError as error:
        print(f"error: {error}", file=sys.stderr)
        leave_refusal(error)
        return error.exit_code
    except OSError as error:
        if error.errno not in UNUSABLE_PATH or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; correct the path or its permissions", file=sys.stderr)
        return BAD_INPUT


def suggestion(word: str) -> str:
    """What to do about an unknown verb: the nearest one, if one is near, and all of them."""
    everything = f"use one of {', '.join(VERBS)}"
    key, equals, _ = word.partition("=")
    if equals or "." in key:
        return f"a verb comes first, for instance longcat train {word}; {everything}"
    near = MEANT.get(word) or next(iter(difflib.get_close_matches(word, VERBS, n=1, cutoff=0.5)), None)
    return everything if near is None else f"did you mean {near}? {everything}"


def listing() -> str:
    """One line per verb: the first of its docstring."""
    return "\n".join(f"  {name:11} {description(verb).splitlines()[0]}" for name, verb in VERBS.items())


def description(verb: Callable[[list[str]], int]) -> str:
    """A verb's docstring."""
    return (verb.__doc__ or "(PYTHONOPTIMIZE=2 leaves out the help: unset it)").strip()


def check_current_folder() -> None:
    """Raise ConfigError where the current folder is gone: relative paths lead nowhere then."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder has been removed; change to one that exists") from error


# Words of other programs
MEANT = {
    "average": "merge",
    "build": "data",
    "convert": "export",
    "fit": "train",
    "pretrain": "train",
    "resume": "train",
    "run": "train",
    "sample": "generate",
    "sbatch": "slurm",
    "submit": "slurm",
    "start": "train",
    "sweep": "train",
    "validate": "check",
    "verify": "checkpoint",
}

if __name__ == "__main__":
    sys.exit(main())
