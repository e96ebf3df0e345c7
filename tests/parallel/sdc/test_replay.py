"""Who is find_suspects when ranks that computed the same step differ; whose step a rank replays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parallel.mesh import MeshSizes
from parallel.sdc.ledger import RECEIVED
from parallel.sdc.replay import Computation, Neighbours, Traced, find_suspects, replay_finding, total_of

NAMES = ["layers.0.self_attn.0", f"{RECEIVED}expert dispatch", "layers.0.mlp.experts", "losses"]
Fault = Callable[[int, int, int], int | None]  # (who computes, whose batch, which pass) → from where it is wrong


def computation(of: int, by: int, trace: Traced) -> Computation:
    return Computation(of, by, total_of(trace), trace)


def rounds(number: int, fault: Fault) -> list[Computation]:
    """Both rounds of ``number`` single ranks: own step, the neighbour's, own again, and a further one."""
    found = []
    for by in range(number):
        for turn, shift in enumerate((0, 1, 0, 2 if number > 2 else 1)):
            of = (by + shift) % number
            wrong = fault(by, of, turn)
            trace = [
                (name, 100 * of + i + (7000 + by if wrong is not None and i >= wrong else 0))
                for i, name in enumerate(NAMES)
            ]
            found.append(computation(of, by, trace))
    return found


def lasting(rank: int) -> Fault:
    return lambda by, of, turn: 2 if by == rank else None


def once(rank: int, at_turn: int) -> Fault:
    return lambda by, of, turn: 0 if (by, turn) == (rank, at_turn) else None


@pytest.mark.parametrize("number", [3, 4, 8])
@pytest.mark.parametrize("rank", [0, 2])
def test_defective_rank_of_three_is_named(number: int, rank: int) -> None:
    finding = replay_finding(9, rounds(number, lasting(rank)))
    assert (finding.suspects, finding.layer, finding.operator) == ((rank,), 0, "layers.0.mlp.experts")
    assert "the fault is lasting" in finding.detail
    assert replay_finding(9, rounds(number, lasting(rank)), 4).since == 6, "the replay of step 5 agreed"


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("turn", [0, 1])
def test_transient_fault_is_named_in_either_pass(number: int, turn: int) -> None:
    finding = replay_finding(9, rounds(number, once(1, turn)))
    assert finding.suspects == (1,)
    assert finding.operator == "layers.0.self_attn.0"
    assert "the fault is transient" in finding.detail and finding.since == 9


def test_same_wrong_bits_twice_are_lasting() -> None:
    """A defect that needs certain data: the rank computes the other steps rightly."""
    finding = replay_finding(9, rounds(4, lambda by, of, turn: 1 if by == of == 2 else None))
    assert finding.suspects == (2,) and "the fault is lasting" in finding.detail


def test_two_ranks_that_disagree_are_both_named() -> None:
    finding = replay_finding(9, rounds(2, lasting(1)))
    assert finding.suspects == (0, 1)
    assert "one of them is defective for good" in finding.detail


def test_victims_of_a_message_come_after_its_sender() -> None:
    """Rank 1 computes wrong experts at place 2; its partner, rank 0, receives them at place 1."""
    sound: Traced = [(name, i) for i, name in enumerate(NAMES)]
    sender = [*sound[:2], (NAMES[2], 77), (NAMES[3], 78)]
    victim = [sound[0], (NAMES[1], 79), (NAMES[2], 2), (NAMES[3], 80)]
    computations = [computation(of, by, sound) for of in (0, 1) for by in (of + 2, of + 4)]
    computations += [computation(0, 0, victim), computation(1, 1, sender)]
    assert [(one.rank, one.what) for one in find_suspects(computations)] == [(1, NAMES[2]), (0, NAMES[1])]
    assert replay_finding(3, computations).suspects == (1,)


def test_no_difference_has_no_suspect() -> None:
    assert find_suspects(rounds(4, lambda by, of, turn: None)) == []


def test_longer_trace_differs_at_its_end() -> None:
    sound: Traced = [(name, i) for i, name in enumerate(NAMES)]
    found = find_suspects([computation(0, 0, sound[:2]), computation(0, 1, sound), computation(0, 2, sound)])
    assert [(one.rank, one.at, one.what) for one in found] == [(0, 2, "the number of calls")]


def test_neighbours_have_the_same_coordinates() -> None:
    """Two stages, dp 2 × fsdp 2 × cp 2, experts over 4 of them: groups of two data ranks, so two groups."""
    ring = Neighbours(MeshSizes(pp=2, dp=2, fsdp=2, cp=2, tp=1, ep=4))
    assert (ring.group, ring.number) == (2, 2)
    assert [ring.rank(rank, 1) for rank in range(16)] == [4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11]
    assert all(ring.rank(ring.rank(rank, 1), -1) == rank for rank in range(16))
    assert Neighbours(MeshSizes(pp=1, dp=1, fsdp=4, cp=1, tp=2, ep=8)).number == 1
    assert Neighbours(MeshSizes(pp=1, dp=1, fsdp=3, cp=4, tp=1, ep=6)).number == 1, (
        "a group is one and a half data ranks"
    )
    assert Neighbours(MeshSizes(pp=1, dp=2, fsdp=3, cp=4, tp=1, ep=6)).group == 3
    assert Neighbours(MeshSizes(pp=1, dp=1, fsdp=4, cp=2, tp=1, ep=1)).number == 4
