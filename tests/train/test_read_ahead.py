"""Samples are read by a thread while a step computes: the same ones, with errors raised where they are needed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from longcat.documents import Documents
from tests.support.running import numbers_by_end
from train.batches import Batch, count_labels, label_counts
from train.read_ahead import ReadAhead


def test_reads_while_the_caller_computes() -> None:
    started, threads = threading.Event(), set()

    def read(number: int) -> np.ndarray:
        threads.add(threading.current_thread().name)
        started.set()
        return np.full(3, number)

    ahead = ReadAhead(read)
    ahead.ask([4, 5])
    assert started.wait(60), "nothing was read before it was taken"
    assert [int(window[0]) for window in ahead.take([4, 5])] == [4, 5]
    assert [int(window[0]) for window in ahead.take([9])] == [9]
    ahead.ask([1])
    assert [int(window[0]) for window in ahead.take([2])] == [2]  # a rollback has changed what comes next
    ahead.close()
    assert len(threads) == 1 and threads != {threading.current_thread().name}


def test_other_samples_leave_what_was_asked_for() -> None:
    """A replay reads a neighbour's samples: in the same thread, since corpora have no lock."""
    threads, read = set(), []

    def note(number: int) -> np.ndarray:
        threads.add(threading.current_thread().name)
        read.append(number)
        return np.full(3, number)

    ahead = ReadAhead(note)
    assert [int(window[0]) for window in ahead.read([3])] == [3]
    assert threads == {threading.current_thread().name}, "there is a thread although nothing was asked for"
    threads.clear()
    ahead.ask([4])
    assert [int(window[0]) for window in ahead.read([8])] == [8]
    assert [int(window[0]) for window in ahead.take([4])] == [4]
    ahead.close()
    assert read == [3, 4, 8] and len(threads) == 1 and threads != {threading.current_thread().name}


def test_an_error_ahead_is_raised_when_it_is_needed() -> None:
    def read(number: int) -> np.ndarray:
        if number == 7:
            raise ValueError("sample 7 is damaged")
        return np.zeros(2)

    ahead = ReadAhead(read)
    ahead.ask([7])
    assert len(ahead.take([6])) == 1
    ahead.ask([7])
    with pytest.raises(ValueError, match="sample 7"):
        ahead.take([7])
    ahead.close()


def test_labels_counted_on_the_host_equal_the_masks() -> None:
    tokens = torch.randint(0, 5, (3, 24), generator=torch.Generator().manual_seed(0))
    numbers = torch.from_numpy(numbers_by_end(tokens.numpy()))
    for of_documents in (numbers, None):
        documents = None if of_documents is None else Documents.of(of_documents, torch.device("cpu"))
        batch = Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), documents)
        for mtp in (0, 1, 3, 30):
            assert list(map(float, count_labels(tokens.shape, of_documents, mtp))) == label_counts([batch], mtp), mtp
