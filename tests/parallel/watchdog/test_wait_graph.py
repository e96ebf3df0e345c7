"""Which rank waits for which, on made-up heartbeats of pipelines and expert-parallel groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given as for_all
from hypothesis import strategies

from parallel.watchdog.diagnosis import HangCause, diagnose, format_message, reporter
from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.heartbeats import Heartbeat
from parallel.watchdog.wait_graph import decode_ranks, encode_ranks, wait_ends, wait_path
from tests.parallel.watchdog.heartbeat_cases import NOW, WAITING, WORKING, heartbeats

HIDDEN, GRADIENTS = SpanKind.RECEIVE_HIDDEN_STATES, SpanKind.RECEIVE_GRADIENTS


def receives(peer: int, micro_batch: int = 1, kind: SpanKind = HIDDEN, **changes: object) -> Heartbeat:
    """A rank that waits for what another stage sends."""
    event = Event(kind, micro_batch=micro_batch, layers=(4, 5))
    return replace(WAITING, event=event, phase=Event(SpanKind.PIPELINE), ranks=encode_ranks([peer]), **changes)


def exchanges(*ranks: int, layer: int = 3, kind: SpanKind = SpanKind.EXPERT_DISPATCH, **changes: object) -> Heartbeat:
    """A rank in a collective of a group."""
    return replace(WAITING, event=Event(kind, layer), ranks=encode_ranks(ranks), **changes)


def works(**changes: object) -> Heartbeat:
    return replace(WORKING, event=Event(SpanKind.BACKWARD, micro_batch=2, layers=(2, 3)), **changes)


def diagnosed(me: int, store: dict[int, Heartbeat]) -> tuple[HangCause, tuple[int, ...], str]:
    diagnosis = diagnose(me, store, set(), set(), NOW)
    assert diagnosis is not None
    return diagnosis.cause, diagnosis.ranks, format_message(reporter(me, store, diagnosis), diagnosis)


# Rank 2 hangs in its backward. Rank 1 waits for its gradients, rank 0 for rank 1's; rank 3 has entered the fewest
# spans, by which it would be the straggler.
PP4 = heartbeats(
    receives(1, 1, GRADIENTS, sequence=90, idle_seconds=20),
    receives(2, 1, GRADIENTS, sequence=80, idle_seconds=25),
    works(sequence=75, idle_seconds=30),
    receives(2, 3, sequence=20, idle_seconds=29),
)


@pytest.mark.parametrize("me", range(4))
def test_every_rank_names_the_hanging_pipeline_stage(me: int) -> None:
    kind, ranks, text = diagnosed(me, PP4)
    assert (kind, ranks) == (HangCause.STRAGGLER, (2,))
    assert 'for 30 s at step 12, "backward of micro-batch 2 in layers 2 to 3"' in text


def test_distant_stage_is_named_with_the_path_to_it() -> None:
    text = diagnosed(0, PP4)[2]
    assert text.startswith('rank 0 has waited 20 s in step 12 for "gradients of micro-batch 1 into layers 4 to 5" (pp)')
    assert "rank 2 (process 42 on host) delays it through rank 1 (for 30 s" in text
    assert "has not reached it" in diagnosed(1, PP4)[2], "rank 1 waits for it directly"


def test_computing_stage_is_not_named_if_no_rank_waits_for_it() -> None:
    """Rank 3 computes; ranks 0 and 1 wait for each other in different collectives."""
    store = heartbeats(receives(1), receives(0, 2, GRADIENTS), receives(1, 2), works(idle_seconds=40))
    kind, ranks, text = diagnosed(2, store)
    assert (kind, ranks) == (HangCause.STRAGGLER, (0,))
    assert "rank 0 (process 40 on host) delays it through rank 1" in text
    assert "while rank 1 (process 41 on host) waits at" in text


def test_both_stages_of_a_cycle_are_named() -> None:
    store = heartbeats(receives(1), receives(2), receives(3), receives(2, 2, GRADIENTS, sequence=60))
    for me in range(4):
        kind, ranks, text = diagnosed(me, store)
        assert (kind, ranks) == (HangCause.STRAGGLER, (3,)), me
        assert "rank 3 (process 43 on host)" in text and "rank 2" in text
        assert "gradients of micro-batch 2" in text and "hidden states of micro-batch 1" in text


# Ranks 0 and 1 are the first stage with an expert-parallel group of their own, 2 and 3 the second; pp pairs 0-2, 1-3.
def test_computing_rank_in_an_expert_group_is_named() -> None:
    """Rank 1 hangs inside a layer; rank 0 waits for it in the all-to-all, 2 and 3 for their first stages."""
    store = heartbeats(exchanges(0, 1, sequence=50), works(idle_seconds=31), receives(0, idle_seconds=33), receives(1))
    for me in range(4):
        assert diagnosed(me, store)[:2] == (HangCause.STRAGGLER, (1,)), me
    assert "rank 1 (process 41 on host) delays it through rank 0" in diagnosed(2, store)[2]


def test_mismatch_names_both_ranks_and_collectives() -> None:
    """Ranks 2 and 3 are in different collectives; the first stage waits for their gradients."""
    other = exchanges(2, 3, layer=5, kind=SpanKind.EXPERT_COMBINE, sequence=72)
    store = heartbeats(receives(2, 1, GRADIENTS), receives(3, 1, GRADIENTS), exchanges(2, 3, layer=4), other)
    for me in range(4):
        kind, ranks, text = diagnosed(me, store)
        assert (kind, ranks) == (HangCause.STRAGGLER, (2,)), me
        assert "rank 2 (process 42" in text and "rank 3" in text
        assert '"expert dispatch, layer 4"' in text and '"expert combine, layer 5"' in text


def test_collectives_of_different_groups_are_a_mismatch() -> None:
    store = heartbeats(exchanges(0, 1), replace(WAITING, event=Event(SpanKind.SUM)), exchanges(2, 3), exchanges(2, 3))
    kind, ranks, text = diagnosed(0, store)
    assert (kind, ranks) == (HangCause.STRAGGLER, (1,)) and '"sum over all ranks"' in text


def test_complete_collective_names_no_rank() -> None:
    store = heartbeats(exchanges(0, 1), exchanges(0, 1), receives(0), receives(1))
    for me in range(4):
        assert diagnosed(me, store)[:2] == (HangCause.UNKNOWN, ()), me


def test_slow_phase_is_named_only_if_nothing_else_is() -> None:
    everybody = replace(WAITING, event=Event(SpanKind.OUTCOME, of=SpanKind.CHECKPOINT_HASH))
    writes = replace(WORKING, event=Event(SpanKind.CHECKPOINT_WRITE), slow_seconds_ago=0.0, idle_seconds=60.0)
    assert diagnosed(0, heartbeats(everybody, writes, works(idle_seconds=5)))[1] == (2,)
    assert diagnosed(0, heartbeats(everybody, writes, everybody))[1] == (1,)


def test_wait_path_passes_ranks_whose_collective_failed() -> None:
    store = heartbeats(receives(1, state=RankState.FAILED), receives(2, state=RankState.FAILED), works())
    assert diagnosed(0, store)[1] == (2,)


def test_wait_graph_of_2000_ranks_is_fast() -> None:
    chain = heartbeats(*(receives(rank + 1) for rank in range(2000)), works())
    assert wait_ends(0, chain) == [(2000,)] and wait_path(0, 2000, chain) == tuple(range(1, 2000))
    wide = heartbeats(*(exchanges(*range(2000)) for _ in range(1999)), works())
    assert wait_ends(0, wide) == [(1999,)] and wait_path(0, 1999, wide) == ()


def test_encoded_ranks_of_a_regular_group_are_short() -> None:
    assert encode_ranks(range(0, 4096, 8)) == "0-4088:8"
    assert encode_ranks([3]) == "3" and encode_ranks([0, 1, 4, 5]) == "0-1:1,4-5:1"


@for_all(strategies.sets(strategies.integers(0, 60), min_size=1))
def test_decode_ranks_inverts_encode_ranks(ranks: set[int]) -> None:
    assert decode_ranks(encode_ranks(ranks)) == ranks


def test_computing_rank_has_no_wait_edge() -> None:
    assert not replace(WAITING, state=RankState.WORKING).is_waiting
