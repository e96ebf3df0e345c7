"""Reading shards: any box, into memory of any strides, has the values of torch's own reader."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorProperties

from train.checkpoint import shards
from train.checkpoint.dcp_tensors import DcpTensor
from train.checkpoint.shards import ShardReader

ROWS, COLUMNS, DEEP = 6, 10, 4
WHOLE = ((0, ROWS), (0, COLUMNS), (0, DEEP))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Three-dimensional tensors in two boxes each, one with other strides; a scalar; an empty tensor; integers."""
    drawn = torch.Generator().manual_seed(3)
    one, other = (torch.randn(ROWS, COLUMNS, DEEP, generator=drawn) for _ in range(2))
    boxes = [((0, 4), *WHOLE[1:]), ((4, ROWS), *WHOLE[1:])]
    written = {
        "one": DcpTensor(one.shape, [(box, one[slice(*box[0])].clone()) for box in boxes], one.dtype),
        "other": DcpTensor(other.shape, [(box, transposed(other[slice(*box[0])])) for box in boxes], other.dtype),
        "scalar": torch.tensor(7.0),
        "nothing": torch.empty(0, 3),
        "integers": torch.arange(30).view(5, 6),
    }
    dcp.save(written, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=2), no_dist=True)
    return tmp_path, {**written, "one": one, "other": other}


def transposed(values: Tensor) -> Tensor:
    """The same values in column-major order."""
    made = values.transpose(0, 2).contiguous().transpose(0, 2)
    assert not made.is_contiguous()
    return made


def read(folder: Path, wanted: dict[str, Any]) -> None:
    dcp.load(wanted, storage_reader=ShardReader(folder), no_dist=True)


def cuts(size: int) -> list[tuple[int, int]]:
    return [(0, size), (0, 1), (size // 3, size), (size - 2, size - 1)]


@pytest.mark.parametrize("block", [1 << 24, 200, 16], ids=lambda size: f"block-{size}")
@pytest.mark.parametrize("name", ["one", "other"])
def test_any_box_reads_its_values(
    name: str, block: int, stored: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across the stored boxes, into contiguous memory and into columns of a wider tensor."""
    monkeypatch.setattr(shards, "BLOCK", block)
    folder, written = stored
    for box in itertools.product(*map(cuts, (ROWS, COLUMNS, DEEP))):
        expected = written[name][tuple(slice(*cut) for cut in box)]
        own, wide = torch.zeros(expected.shape), torch.zeros(*expected.shape[:2], DEEP + 3)
        for target in (own, wide[..., 1 : 1 + expected.shape[2]], own.double(), transposed_like(own)):
            read(folder, {name: DcpTensor((ROWS, COLUMNS, DEEP), [(box, target)], torch.float32)})
            assert torch.equal(target.float(), expected), f"{box} into strides {target.stride()}"
        assert not wide[..., 0].any() and not wide[..., 1 + expected.shape[2] :].any(), "written outside the box"


def transposed_like(values: Tensor) -> Tensor:
    return torch.zeros(values.shape[::-1]).permute(2, 1, 0)


def test_full_tensors_equal_torch_s_reader(stored: tuple[Path, dict[str, Tensor]]) -> None:
    folder, written = stored
    ours, theirs = ({name: torch.zeros_like(written[name].clone()) for name in written} for _ in range(2))
    read(folder, ours)
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    for name, tensor in written.items():
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor), name


def test_equal_headers_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {f"{number}": torch.full((300, 7), float(number)) for number in range(20)}
    written |= {f"step-{number}": torch.tensor(float(number)) for number in range(20)}
    written |= {f"turned-{number}": torch.full((7, 300), float(number)).t() for number in range(3)}
    torch.serialization.set_crc32_options(False)
    dcp.save(written, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    plain, calls = torch.load, []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(named)
        return plain(*arguments, **named)

    monkeypatch.setattr(torch, "load", counted)
    monkeypatch.setattr(shards, "THREADS", 1)
    found = {name: torch.zeros(tensor.shape) for name, tensor in written.items()}
    read(tmp_path, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
    assert len(calls) == 3, "one for each shape and order of values"


@pytest.mark.parametrize("what", ["cut", "gone"])
def test_file_damaged_after_verification_is_named(what: str, tmp_path: Path) -> None:
    """Of two records with the same header, so that the second archive is not parsed."""
    written = {name: torch.arange(5000.0) for name in ("a", "b")}
    torch.serialization.set_crc32_options(False)
    dcp.save(written, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (path,) = tmp_path.glob("*.distcp")
    places = ShardReader(tmp_path).read_metadata().storage_data.values()
    if what == "cut":
        last = max(places, key=lambda place: place.offset)
        with path.open("r+b") as file:
            file.truncate(last.offset + last.length // 2)
    else:
        path.unlink()
    with pytest.raises(CheckpointException) as caught:
        read(tmp_path, {name: torch.empty(5000) for name in written})
    error = caught.value.failures[0][0]
    assert isinstance(error, OSError) and path.name in str(error)


def test_entry_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    dcp.save({"text": "words"}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(CheckpointException) as caught:
        read(tmp_path, {"text": ""})
    assert "not a tensor; other code wrote it" in str(caught.value.failures[0][0])


def test_only_the_requested_box_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert of a stack reads only its own bytes, directly into the target."""
    stack = torch.arange(64 * 100.0).view(64, 100)
    dcp.save({"stack": stack}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    plain, counts = shards.os.preadv, []

    def counted(descriptor: int, buffers: list[memoryview], position: int) -> int:
        counts.append((plain(descriptor, buffers, position), buffers[0].obj))
        return counts[-1][0]

    monkeypatch.setattr(shards.os, "preadv", counted)
    target = torch.zeros(3, 100)
    planner = DefaultLoadPlanner()
    wanted: Any = {"stack": DcpTensor((64, 100), [(((7, 10), (0, 100)), target)], torch.float32)}
    dcp.load(wanted, storage_reader=ShardReader(tmp_path), planner=planner, no_dist=True)
    assert torch.equal(target, stack[7:10])
    assert [count for count, _ in counts] == [3 * 100 * 4]
    assert counts[0][1].__array_interface__["data"][0] == target.data_ptr()


def test_metadata_of_newer_torch_and_python(
    stored: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.15 stores one more property of each tensor, Python 3.13 paths of a module that older ones lack."""
    folder, written = stored
    path = folder / shards.METADATA
    metadata = pickle.loads(path.read_bytes())
    of_now = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*of_now(self)[:5], None))
    metadata.storage_meta.checkpoint_id = Path("elsewhere")
    as_newer = pickle.dumps(metadata, protocol=0).replace(b"cpathlib\n", b"cpathlib._local\n")
    assert b"pathlib._local" in as_newer
    path.write_bytes(as_newer)
    monkeypatch.undo()
    tensors: dict[str, Any] = {"integers": torch.zeros(5, 6, dtype=torch.int64)}
    dcp.load(tensors, storage_reader=ShardReader(folder), no_dist=True)
    assert torch.equal(tensors["integers"], written["integers"])
    assert ShardReader(folder).read_metadata().state_dict_metadata["one"].properties.dtype == torch.float32


def test_metadata_that_was_read_pickles_as_torch_wrote_it(stored: tuple[Path, dict[str, Tensor]]) -> None:
    """A grown checkpoint stores it again; plain torch, without these packages, must be able to read that."""
    assert b"train.checkpoint" not in pickle.dumps(ShardReader(stored[0]).read_metadata())
