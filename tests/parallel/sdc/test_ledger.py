"""Which transfer and which ranks are named when checksums of messages differ."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch

from parallel.checksum import mix
from parallel.sdc.ledger import Entry, Ledger, differs, mismatches, modulus, suspects, transfer_numbers


def ends(sender: int, receiver: int, sent: int, arrived: int) -> tuple[Entry, Entry]:
    """Both ends of one part of an all-to-all."""
    start = Entry("dispatch", "ep", 1, sender, (receiver,), True, sent)
    return start, Entry("dispatch", "ep", 1, sender, (receiver,), False, arrived)


def test_one_wrong_part_of_an_all_to_all_is_named_alone() -> None:
    lists: list[list[Entry]] = [[], [], []]
    for sender in range(3):
        for receiver in range(3):
            sent = 10 * sender + receiver
            wrong = (sender, receiver) == (1, 2)
            start, end = ends(sender, receiver, sent, sent + 1000 * wrong)
            lists[sender].append(start)
            lists[receiver].append(end)
    (found,) = mismatches(lists)
    assert (found.sender, found.receivers, found.agreeing) == (1, (2,), 0)
    assert set(suspects(found)) == {1, 2}


def test_part_that_never_arrived_is_named() -> None:
    start, _ = ends(0, 1, 5, 5)
    (found,) = mismatches([[start], []])
    assert (found.sender, found.receivers) == (0, (1,))


def test_sender_that_all_contradict_is_suspected_first() -> None:
    sent = Entry("weight", "gather", 1, 0, (0, 1, 2), True, 7)
    arrived = [Entry("weight", "gather", 1, 0, (rank,), False, 8) for rank in range(3)]
    (found,) = mismatches([[sent, arrived[0]], [arrived[1]], [arrived[2]]])
    assert found.receivers == (0, 1, 2) and suspects(found)[0] == 0


def test_receiver_that_alone_differs_is_suspected() -> None:
    sent = Entry("weight", "gather", 1, 0, (0, 1, 2), True, 7)
    arrived = [Entry("weight", "gather", 1, 0, (rank,), False, 8 if rank == 2 else 7) for rank in range(3)]
    (found,) = mismatches([[sent, arrived[0]], [arrived[1]], [arrived[2]]])
    assert suspects(found) == (2,)


def ledger(rank: int) -> Ledger:
    made = Ledger()
    made.begin(rank, 1, recording=True)
    return made


def test_cells_are_the_sums_of_each_transfers_number() -> None:
    world, checksums = 4, [2**64 - 1, 5, 1 << 63]
    one = ledger(2)
    one.put("dispatch", "ep", 7, [0, 1, 3], torch.tensor([-1, 5, -(1 << 63)]), is_sender=True)
    one.put("weight", "gather", 1, [0, 1, 2, 3], 9, is_sender=True)
    one.put("weight", "gather", 1, [3, 0], torch.tensor([4, 9]), is_sender=False)
    expected = [[0, 0] for _ in range(world)]
    sent = [(7, "ep", 2, peer, value) for peer, value in zip((0, 1, 3), checksums, strict=True)]
    sent += [(1, "gather", 2, peer, 9) for peer in range(4)]
    arrived = [(1, "gather", 3, 2, 4), (1, "gather", 0, 2, 9)]
    for sign, transfers in ((1, sent), (-1, arrived)):
        for number, channel, sender, receiver, checksum in transfers:
            key = mix(crc32(channel.encode()) << 32 | number) ^ (sender << 32 | receiver)
            value = sign * mix(checksum ^ mix(key))
            expected[sender][0] += value
            expected[receiver][1] += value
    assert one.cells(world).tolist() == [[value % (1 << 40) for value in row] for row in expected]


@pytest.mark.parametrize("world", [1, 2, 8192, 8193, 10_240, 100_000])
def test_sum_of_all_ranks_cells_is_exact(world: int) -> None:
    """Of a weight that a rank sends to all others: no false alarm, and an alarm if the last receiver differs."""
    sender = ledger(0)
    sender.put("weight", "gather", 1, range(world), 77, is_sender=True)
    cells = torch.zeros(max(world, 2), 2, dtype=torch.float64)
    own = float(sender.cells(max(world, 2))[0, 0])
    theirs = [-int(value) % modulus(max(world, 2)) for value in transfer_numbers(sender.records, 0)]
    for change, alarm in ((0, False), (1, True)):
        cells[0, 0] = own + sum(map(float, theirs)) + change
        assert differs(cells) == alarm
    assert world * (modulus(world) - 1) <= 1 << 53


def test_cells_that_are_no_number_differ() -> None:
    """As a flipped bit in the sum may leave them."""
    for value in (float("nan"), float("inf"), 0.5):
        assert differs(torch.tensor([[value, 0.0]], dtype=torch.float64))
    assert not differs(torch.tensor([[0.0, 3.0 * modulus(1)]], dtype=torch.float64))


def test_only_suspected_senders_transfers_are_listed() -> None:
    receiver = ledger(1)
    receiver.put("weight", "gather", 1, [0, 1, 2], torch.tensor([5, 6, 7]), is_sender=False)
    receiver.put("weight", "gather", 1, [0, 1, 2], 6, is_sender=True)
    cells = receiver.cells(3)
    assert len(receiver.entries(cells)) == 6
    cells[:2, 0] = 0.0
    assert receiver.entries(cells) == [Entry("weight", "gather", 1, 2, (1,), False, 7)]


@pytest.mark.parametrize("kind", ["two", "three", "equal"])
def test_exchanged_parts_name_their_senders(kind: str) -> None:
    """Parts of rank 1 that arrive at each other's place; equal parts of ranks 0 and 1 exchanged at both receivers."""
    sent = {(sender, receiver): 10 * sender + receiver for sender in range(4) for receiver in range(4)}
    if kind == "equal":
        sent |= {(0, 2): 7, (1, 3): 7, (0, 3): 8, (1, 2): 8}
    arrived, senders = dict(sent), {1}
    if kind == "two":
        arrived |= {(1, 2): sent[1, 3], (1, 3): sent[1, 2]}
    elif kind == "three":
        arrived |= {(1, 0): sent[1, 2], (1, 2): sent[1, 3], (1, 3): sent[1, 0]}
    else:
        arrived |= {(0, 2): 8, (1, 2): 7, (0, 3): 7, (1, 3): 8}
        senders = {0, 1}
    ranks = [ledger(rank) for rank in range(4)]
    for rank, one in enumerate(ranks):
        others = [other for other in range(4) if other != rank]
        one.put("dispatch", "ep", 1, others, words([sent[rank, other] for other in others]), is_sender=True)
        one.put("dispatch", "ep", 1, others, words([arrived[other, rank] for other in others]), is_sender=False)
    cells = torch.stack([one.cells(4) for one in ranks]).sum(0)
    assert differs(cells)
    found = mismatches(one.entries(cells) for one in ranks)
    assert {one.sender for one in found} == senders


def words(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.uint64)
