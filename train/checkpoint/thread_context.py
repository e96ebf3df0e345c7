"""What all ranks do together around a checkpoint, in the main thread or in a background thread.

The thread's collectives have their own process group, and its spans appear on the main thread's stack only while that
waits for the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch.distributed as dist

from longcat.errors import SaveError
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span, work_span
from train.checkpoint.failures import describe, first_failure, is_disk_full


class ThreadContext:
    """Lets all ranks do something together, in the main or a background thread, and agree on how it ended."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """With a ``group``: in a background thread, in that process group. Without: in the main thread."""
        self.group = group
        self.doing: tuple[tuple[Event, bool], ...] = ()  # in the background: (span, whether it waits for other ranks)

    def waits(self, event: Event) -> AbstractContextManager[Any]:
        return wait_span(event) if self.group is None else self._note(event, True)

    def works(self, kind: SpanKind) -> AbstractContextManager[Any]:
        event = Event(kind)
        return work_span(event, slow=True) if self.group is None else self._note(event, False)

    @contextmanager
    def _note(self, event: Event, waits: bool) -> Iterator[None]:
        outer = self.doing
        self.doing = (*outer, (event, waits))
        try:
            yield
        finally:
            self.doing = outer

    def wait_for(self, thread: threading.Thread) -> None:
        """Wait in the main thread for ``thread``, which writes in this context; its spans are shown as the caller's."""
        while thread.is_alive():
            with ExitStack() as spans:
                doing = self.doing
                for event, waits in doing:
                    spans.enter_context(wait_span(event) if waits else work_span(event, slow=True))
                while thread.is_alive() and self.doing is doing:
                    thread.join(0.01)

    def run_on_all_ranks(self, kind: SpanKind, action: Callable[[], Any]) -> list[Any]:
        """Every rank's result of ``action``; if it fails on any rank, all ranks raise SaveError."""
        failure, is_full = None, False
        with self.works(kind):
            try:
                mine = action()
            except Exception as error:
                mine, failure, is_full = None, describe(error), is_disk_full(error)
        found: list[Any] = [None] * dist.get_world_size()
        with self.waits(Event(SpanKind.OUTCOME, of=kind)):
            dist.all_gather_object(found, (mine, failure, is_full), group=self.group)
        failed = {rank: failure for rank, (_, failure, _) in enumerate(found) if failure}
        if failed:
            raise SaveError(first_failure(failed), is_disk_full=any(full for _, _, full in found))
        return [result for result, _, _ in found]

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on all ranks."""
        shared = [value]
        with self.waits(Event(SpanKind.BROADCAST)):
            dist.broadcast_object_list(shared, src=0, group=self.group)
        return shared[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        found: list[Any] = [None] * dist.get_world_size()
        with self.waits(Event(SpanKind.ALL_GATHER_OBJECT)):
            dist.all_gather_object(found, value, group=self.group)
        return found
