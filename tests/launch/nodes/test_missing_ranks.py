"""Ranks that do not come to the start are named by those that wait for them."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.nodes.store import RanksStore
from longcat.errors import MissingRanksError, SilentStoreError
from parallel.config import ParallelConfig
from parallel.mesh import HERE, connect, missing_keys
from tests.support.running import exit_json, train_here


class CountedStore(dist.HashStore):
    requests = 0

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return bool(super().check(keys))


def become_rank_0_of_3(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "TORCHELASTIC_RESTART_COUNT": "7"}
    for name, value in {**known, **own, "TORCHELASTIC_RUN_ID": "run"}.items():
        monkeypatch.setenv(name, value)


def test_silent_store_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Something accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        become_rank_0_of_3(monkeypatch, silent.getsockname()[1])
        assert train_here([*overrides, "parallel.timeout_seconds=1", "train.global_batch_size=12"]) == 1
    found = exit_json(tmp_path / "run")
    assert "did not answer for 1 s (parallel.timeout_seconds)" in found["message"]
    assert found["cause"] == "store_lost"
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert errors == [f"error: {found['message']}"]


def test_store_that_falls_silent_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers until this rank begins to form groups with the others."""
    form_groups = dist.init_process_group
    with RanksStore("127.0.0.1") as store:

        def fall_silent(*arguments: Any, **named: Any) -> None:
            store.process.send_signal(signal.SIGSTOP)
            form_groups(*arguments, **named)

        become_rank_0_of_3(monkeypatch, store.port)
        connected = dist.TCPStore("127.0.0.1", store.port)  # it imports torch first
        monkeypatch.setattr(dist, "init_process_group", fall_silent)
        with pytest.raises(SilentStoreError, match="did not answer for 1 s"):
            connect(ParallelConfig(timeout_seconds=1))
        del connected


def test_a_missing_rank_is_named(monkeypatch: pytest.MonkeyPatch, overrides: list[str], tmp_path: Path) -> None:
    """Rank 1 never comes; rank 2 does, to a store that outlives both."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    become_rank_0_of_3(monkeypatch, server.port)
    for prefix in ("run/7", "worker_7/run/7", "/worker/attempt_7/run/7"):  # torch puts its own before ours
        server.set(f"{prefix}/{HERE}2", "")
    with pytest.raises(MissingRanksError, match=r"rank 1 of 3 did not start within 1 s") as caught:
        connect(ParallelConfig(timeout_seconds=1))
    assert caught.value.details["hang"] == {"kind": "missing", "ranks": [{"rank": 1}]}
    assert train_here([*overrides, "parallel.timeout_seconds=2", "train.global_batch_size=12"]) == 1
    assert exit_json(tmp_path / "run")["hang"]["ranks"] == [{"rank": 1}]


def test_few_missing_keys_take_few_requests() -> None:
    store, keys = CountedStore(), [str(number) for number in range(1024)]
    for key in keys:
        if key != "700":
            store.set(key, "")
    assert missing_keys(store, keys) == ["700"] and store.requests <= 21
