"""`python -m benchmarks.gpu` without a GPU: failures and hangs of parts are reported, the page is written."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import attention
from benchmarks.gpu.page import write
from benchmarks.gpu.part import RESULT, Row, attempt
from benchmarks.gpu.runner import Part, PartResult, State, judge, run_part
from benchmarks.gpu.session import environment_of
from benchmarks.gpu.tests import rows_of

HANGS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


def part(code: str, seconds: float = 60.0) -> Part:
    return Part("part", "A part", seconds, (sys.executable, "-c", code))


def test_failing_and_hanging_parts_are_reported() -> None:
    broken = run_part(part("raise SystemExit('kernel | broke')"), "cpu")
    assert (broken.state, broken.problem) == (State.failed, "exit code 1: kernel | broke")
    hung = run_part(part(HANGS, seconds=1.0), "cpu")  # its child has the pipe too: both must end
    assert hung.state is State.failed and hung.problem.startswith("not done after 1 s")
    silent = run_part(part("pass"), "cpu")
    assert (silent.state, silent.problem) == (State.failed, "no result: no output")
    assert run_part(part("import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == ''"), "cpu").problem.startswith(
        "no r"
    )


def test_a_row_that_misses_fails_its_part() -> None:
    rows = [Row("a", "1", "1", True), Row("b", "2", "1", False), Row("c", "3")]
    found = judge(part(""), RESULT + json.dumps([vars(row) for row in rows]), "", 1.0)
    assert found.state is State.failed and found.rows == rows and "(b: 2)" in found.summary
    assert judge(part(""), RESULT + json.dumps([vars(rows[0])]), "", 1.0).state is State.passed


def test_a_check_that_raises_leaves_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic algorithms, threads, dtype, TF32, gradients and variables stay for the checks after it."""
    found = torch.backends.cuda.matmul

    def state() -> tuple[object, ...]:
        flags = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), found.fp32_precision
        return *flags, torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)

    def spoil() -> list[Row]:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        found.fp32_precision = "tf32"
        os.environ["NCCL_ALGO"] = "Ring"
        raise RuntimeError("out of memory")

    before = state()
    (row,) = attempt("spoils", spoil)
    assert row.met is False and state() == before
    monkeypatch.setattr(attention, "forward_and_backward", lambda _: [torch.empty(1)])
    monkeypatch.setattr(attention, "milliseconds", lambda *_, **__: spoil())
    for backend in attention.Backend:
        assert attempt(str(backend), attention.kernel, backend, torch.device("cpu"))[0].met is False
        assert state() == before


@pytest.mark.parametrize("visible,one", [(None, "0"), ("2,3", "2"), ("GPU-7a,GPU-81", "GPU-7a")])
def test_ranks_that_share_see_one_gpu(visible: str | None, one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment_of("cuda", 2)["CUDA_VISIBLE_DEVICES"] == one
    assert environment_of("cpu", 2)["CUDA_VISIBLE_DEVICES"] == ""
    assert environment_of("cuda", 1).get("CUDA_VISIBLE_DEVICES") == visible


def test_page_and_record_have_every_part(tmp_path: Path) -> None:
    results = [
        PartResult(Part("one", "First part", 1), State.passed, 2.0, [Row("loss | bits", "same", "same", True)]),
        PartResult(Part("two", "Second part", 1), State.failed, 3.0, [], "exit code 1: broke"),
        PartResult(Part("three", "Third part", 1), State.skipped, 0.0, [], "no GPU"),
    ]
    page = write(tmp_path, "cpu", results).read_text()
    for line in ("| Second part | failed | 3 | exit code 1: broke |", "| loss \\| bits | same | same | yes |"):
        assert line in page
    (path,) = (tmp_path / "measurements").glob("*-gpu.json")
    record = json.loads(path.read_text())
    assert [row[-1] for row in record["rows"]] == [True, False, None]
    assert all(len(row) == len(record["columns"]) for row in record["rows"])


def test_parts_for_gpus_say_so_and_the_code_is_of_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`attention` runs as itself; one more part fails."""
    attention = next(one for one in program.PARTS if one.name == "attention")
    monkeypatch.setattr(program, "PARTS", [attention, part("raise SystemExit('broken')")])
    monkeypatch.setattr(sys, "argv", ["gpu", "attention", "--device", "cpu", "--out", str(tmp_path)])
    assert program.main() == 0
    monkeypatch.setattr(sys, "argv", ["gpu", "part", "--device", "cpu", "--out", str(tmp_path)])
    assert program.main() == 1
    out = capsys.readouterr().out
    assert "(no GPU)" in out and "(exit code 1: broken)" in out


@pytest.mark.parametrize("words,said", [([], "no GPU"), (["tarining"], "no part 'tarining'")])
def test_refusals_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and said in errors and errors.count("\n") == 1


def test_failed_tests_become_rows() -> None:
    output = "F.\nFAILED tests/gpu/test_x.py::test_y - AssertionError\n1 failed, 1 passed in 2 s"
    assert [row.met for row in rows_of(output, 1)] == [False, False]
    assert [row.met for row in rows_of("2 passed in 1 s", 0)] == [True]


@pytest.mark.long
def test_what_a_cpu_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, checkpoints and memory really run, on the CPU in the GPU's place, and take longer there."""
    patient = [replace(part, limit_seconds=8 * part.limit_seconds) for part in program.PARTS]
    monkeypatch.setattr(program, "PARTS", patient)
    monkeypatch.setattr(
        sys, "argv", ["gpu", "training", "checkpoint", "memory", "--device", "cpu", "--out", str(tmp_path)]
    )
    assert program.main() == 0
    page = (tmp_path / "gpu_results.md").read_text()
    assert "| debug, float32, 5 steps: two runs | same bits | same bits | yes |" in page
