"""A store for process groups that counts the requests to another one."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class CountingStore(dist.Store):
    """Passes requests on to another store and counts them by kind."""

    def __init__(self, store: Any, made: Counter[str]) -> None:
        super().__init__()
        self.store, self.made = store, made

    def _pass(self, kind: str, *arguments: Any) -> Any:
        self.made[kind] += 1
        return getattr(self.store, kind)(*arguments)

    def set(self, key: str, value: Any) -> Any:
        return self._pass("set", key, value)

    def get(self, key: str) -> Any:
        return self._pass("get", key)

    def add(self, key: str, value: int) -> Any:
        return self._pass("add", key, value)

    def append(self, key: str, value: str) -> Any:
        return self._pass("append", key, value)

    def compare_set(self, key: str, expected: str, wanted: str) -> Any:
        return self._pass("compare_set", key, expected, wanted)

    def check(self, keys: list[str]) -> Any:
        return self._pass("check", keys)

    def wait(self, *arguments: Any) -> Any:
        return self._pass("wait", *arguments)

    def multi_get(self, keys: list[str]) -> Any:
        return self._pass("multi_get", keys)

    def set_timeout(self, timeout: timedelta) -> None:
        self.store.set_timeout(timeout)

    def clone(self) -> CountingStore:
        self.made["connection"] += 1
        return kept(CountingStore(self.store.clone(), self.made))


_KEPT: list[CountingStore] = []  # C++ holds no reference to what Python has overridden


def kept(store: CountingStore) -> CountingStore:
    _KEPT.append(store)
    return store
