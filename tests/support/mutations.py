"""Files with changed bytes: whatever reads them must refuse them or give the same result, never another one."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longcat.errors import LongCatError

KINDS = ("byte", "byte", "byte", "byte", "zeros", "truncated")


@dataclass(frozen=True)
class Original:
    """A file before any change."""

    content: bytes
    times: tuple[int, int]

    @staticmethod
    def of(path: Path) -> Original:
        status = path.stat()
        return Original(path.read_bytes(), (status.st_atime_ns, status.st_mtime_ns))

    def restore(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        os.utime(path, ns=self.times)


def mutated(content: bytes, random_numbers: random.Random, kinds: Sequence[str] = KINDS) -> bytes:
    """``content`` with one byte changed; in some cases a range of zeros, as after a power cut, or cut off."""
    kind = random_numbers.choice(kinds)
    place = random_numbers.randrange(len(content))
    if kind == "truncated":
        return content[:place]
    changed = bytearray(content)
    if kind == "zeros":
        changed[place : place + 512] = bytes(len(changed[place : place + 512]))
    else:
        changed[place] ^= random_numbers.randrange(1, 256)
    return bytes(changed)


def survive_mutations(
    folder: Path, read: Callable[[], object], count: int, seed: int = 0, kinds: Sequence[str] = KINDS
) -> Counter[str]:
    """Change one file below ``folder`` ``count`` times, read, and restore.

    Args:
        read: reads all that the files decide. It may raise LongCatError: that is a refusal. Any other exception, or
            another result than that of the untouched files, is a failure.
        kinds: of changes, of `KINDS`.

    Returns:
        How often each file name was `NAME refused` or `NAME same` (repaired, or a byte without a meaning).
    """
    expected = read()
    originals = {path: Original.of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = [path for path, original in originals.items() if original.content]
    random_numbers, found = random.Random(seed), Counter[str]()
    for number in range(count):
        path = random_numbers.choice(paths)
        content = mutated(originals[path].content, random_numbers, kinds)
        if content == originals[path].content:  # zeros over zeros
            continue
        path.write_bytes(content)
        try:
            result = read()
        except LongCatError as error:
            assert "\n" not in str(error), f"change {number} of {path}: {error}"
            found[f"{path.name} refused"] += 1
        except Exception as error:
            raise AssertionError(f"change {number} of {path}: {type(error).__name__}: {error}") from error
        else:
            assert result == expected, f"change {number} of {path} changed the result in silence"
            found[f"{path.name} same"] += 1
        restore(folder, originals, path)
    return found


def restore(folder: Path, originals: dict[Path, Original], changed: Path) -> None:
    """Bring all files back that ``changed``'s reader may have replaced, and remove those that it made."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in originals:
            path.unlink()
        elif path.is_dir() and not any(known.is_relative_to(path) for known in originals):
            shutil.rmtree(path)
    for path, original in originals.items():
        if path == changed or not path.is_file() or path.stat().st_mtime_ns != original.times[1]:
            original.restore(path)
