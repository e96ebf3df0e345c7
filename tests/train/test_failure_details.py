"""Fields of exit.json that tell a start's failures apart for machines."""

from __future__ import annotations

import errno

import pytest
import torch

from longcat.errors import SaveError
from train.process.rank import failure_details


def raised_from(cause: BaseException) -> RuntimeError:
    error = RuntimeError("in a pipeline")
    error.__cause__ = cause
    return error


def test_memory_that_an_allocator_refuses_is_told() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (refused.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert failure_details(error) == failure_details(raised_from(error)) == {"cause": "out_of_memory"}


def test_a_full_disk_is_told() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert failure_details(OSError(number, "…")) == {"cause": "disk_full"}
    assert SaveError("…", is_disk_full=True).details == {"cause": "disk_full"}
    assert failure_details(OSError(errno.EACCES, "…")) == failure_details(ValueError("…")) == {}
