"""Checkpoints that a session finds in its run folder: which ones its state comes from, and what its saves remove."""

from __future__ import annotations

import warnings
from pathlib import Path

from longcat.errors import SaveError
from parallel.mesh import Topology
from parallel.watchdog.events import SpanKind
from train.checkpoint.files import PARTIAL
from train.checkpoint.find import find_together
from train.checkpoint.manifest import REMOVED, CheckpointStatus, list_checkpoints, set_aside, step_of
from train.checkpoint.retention import Keep, prune_after_commit, superseded, to_delete
from train.checkpoint.thread_context import ThreadContext


class EarlierCheckpoints:
    """What the first saves of a session have to do with the checkpoints of before; equal on all ranks.

    A run does this before its first step. A session may only look, so it changes nothing before it saves.
    """

    def __init__(self, folder: Path, topology: Topology) -> None:
        """A collective; the state comes from no checkpoint in ``folder`` yet."""
        self.folder, self.topology = folder, topology
        self.names = find_together(lambda check: names(folder), topology)  # empty once a warning has named what goes
        self.others: dict[Path, str] = {}  # those that the state does not come from → why they will be renamed
        self.start_from(None, 0, [])

    @property
    def is_pending(self) -> bool:
        """Whether the next save calls `settle` instead of removing checkpoints itself."""
        return bool(self.others or self.names)

    def start_from(self, path: Path | None, step: int, skipped: list[CheckpointStatus]) -> None:
        """The state is that of ``path``, which may be in another folder; ``skipped`` are damaged. A collective."""
        if path is None or path.resolve().parent != self.folder.resolve():
            step = -1  # it comes from none
        present = find_together(lambda check: list_checkpoints(self.folder), self.topology)
        damaged = [status.folder for status in skipped]
        self.others = {one: "damaged" if one in damaged else "abandoned" for one in present if step_of(one) > step}

    def settle(self, saved: Path, keep: Keep) -> None:
        """After the commit of ``saved``: rename what it does not come from, and remove what ``keep`` does not select.

        Where that would remove what was there before the session, a warning names it and nothing is removed yet. A
        collective.

        Raises:
            SaveError: a checkpoint could not be renamed or removed; ``saved`` stays.
        """
        context = ThreadContext()
        try:
            told = context.run_on_all_ranks(
                SpanKind.CHECKPOINT_PRUNE, lambda: self._settle(saved, keep) if self.topology.is_first else False
            )
        except SaveError as error:
            text = f"{saved} is saved, but others could not be renamed or removed: {error}"
            raise SaveError(text, is_saved=True) from error
        self.others = {}
        if told[0]:
            self.names = frozenset()

    def _settle(self, saved: Path, keep: Keep) -> bool:
        """`settle` on the first rank; returns whether the warning came."""
        renamed = [set_aside(path, why) for path, why in self.others.items() if path != saved]
        if found := ", ".join(path.name for path in renamed if path is not None):
            warnings.warn(f"{self.folder}: {saved.name} does not come from what is now {found}", stacklevel=2)
        leaving = [
            path.name
            for path in (*to_delete(self.folder, keep), *superseded(self.folder, keep))
            if path != saved and original_name(path.name) in self.names
        ]
        if leaving:
            warnings.warn(
                f"{self.folder}: {', '.join(leaving)} stayed, being older than this session; its next save keeps only "
                f"what checkpoint.keep={keep.newest} and keep_every={keep.every}, keep_best={keep.best} select; set "
                f"checkpoint.keep=0 to keep all",
                stacklevel=2,
            )
            return True
        prune_after_commit(self.folder, keep, saved)
        return False


def names(folder: Path) -> frozenset[str]:
    """The names that the checkpoints in ``folder`` were committed under."""
    if not folder.is_dir():
        return frozenset()
    present = (path.name for path in folder.iterdir() if not path.name.endswith((PARTIAL, REMOVED)))
    return frozenset(map(original_name, present))


def original_name(name: str) -> str:
    """The name before `set_aside`: step-00000004 of step-00000004.abandoned."""
    return name.partition(".")[0]
