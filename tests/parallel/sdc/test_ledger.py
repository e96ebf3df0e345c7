"""Which transfer and which ranks are named when checksums of messages differ."""

from __future__ import annotations

from parallel.sdc.ledger import Entry, mismatches, suspects


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
