"""A saved call shows its difference again on another machine, and nothing on what was right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from longcat.errors import ConfigError
from longcat.faults import install_hook
from longcat.ops.attention import causal_attention
from longcat.ops.calls import FUNCTIONS, set_observer
from longcat.ops.cross_entropy import linear_cross_entropy
from longcat.ops.elementwise import added_norm, rms_norm
from longcat.ops.grouped import grouped_gated_linear
from longcat.ops.matmul import linear, rotated_linear
from longcat.ops.permute import combine, log_gates, permute, plan_permutation
from longcat.ops.rotation import expanded_keys
from longcat.ops.selections import selected_gates
from longcat.rope import rotary_angles
from parallel.sdc.bundle import replay, write_bundle
from parallel.sdc.inject import Injector
from parallel.sdc.recompute import Difference, Persistence, Recomputer, SavedCall
from parallel.sdc.spec import parse_faults

ABOUT = {"step": 7, "rank": 3, "host": "node-12", "device": "cpu"}


class Everything(Recomputer):
    """Keeps every call, as if it differed."""

    def _is_chosen(self) -> bool:
        return True

    def _repeat(self, name, plain, args, held, result, module) -> None:  # type: ignore[no-untyped-def]
        from parallel.sdc.recompute import listed, repetition

        saved = SavedCall.of(name, args, held, listed(result), repetition(plain, args, held)(permuted=True))
        self.differences.append(Difference(name, module, Persistence.lasting, 1, 0.5, saved))


def some_calls() -> list[Difference]:
    """One call of each operator, forward and backward."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    x, weight, stack, gain, head = draw(48, 64), draw(32, 64), draw(4, 64, 32), draw(64), draw(96, 64)
    ends = torch.tensor([9, 20, 48, 48], dtype=torch.int32)
    plan = plan_permutation(torch.tensor([[0, 1], [2, 5], [4, 3]]).repeat(16, 1), 4, 6)
    gates = torch.rand(48, 2, generator=generator, requires_grad=True)
    query = draw(1, 48, 2, 32)
    recorder = Everything(1)
    set_observer(recorder)
    try:
        selected = selected_gates(draw(48, 6), plan.row_index.new_tensor([[0, 1], [2, 5], [4, 3]]).repeat(16, 1))
        rows = combine(permute(linear(x, weight), plan), gates + selected, plan, None)
        logs = log_gates(gates + selected, plan, x.dtype)
        experts = grouped_gated_linear(linear(x, draw(64, 64)), stack, ends, log_scale=logs[:48])
        loss = linear_cross_entropy(x, head, torch.arange(48), torch.ones(48, dtype=torch.bool))[0]
        attended = causal_attention(query, query, query, 0.3, None)
        angles = rotary_angles(torch.arange(48), 8, 1e4)
        turned = rotated_linear(x[None], weight, 16, angles), *expanded_keys(query, draw(1, 48, 8), angles, 24, 28)
        total = rows.sum() + experts.sum() + loss + attended.sum() + rms_norm(x, gain, 1e-6).sum()
        total = total + sum(one.sum() for one in added_norm(x, x, gain, 1e-6))
        total = total + sum(one.sum() for one in turned)
        total.backward()  # type: ignore[no-untyped-call]
    finally:
        set_observer(None)
    return recorder.differences


def test_every_operator_is_repeated_from_its_file(tmp_path: Path) -> None:
    calls = some_calls()
    for number, difference in enumerate(calls):
        path = tmp_path / f"{number}.pt"
        write_bundle(path, difference, ABOUT)
        found = replay(path)
        assert not found.shows, (difference.operator, found)
        assert found.about == {**ABOUT, "operator": difference.operator, "module": difference.module}
    deferred_or_elsewhere = {
        "embedding, forward", "embedding, backward", "rotary, forward", "rotary, backward", "router, forward",
        "router, backward", "cross-entropy, hidden gradient", "cross-entropy, weight gradient",
    }  # fmt: skip
    on_gpus = {
        "fused_attention, forward", "fused_attention, backward", "cross-entropy, added weight gradient",
        "residual_sum, forward", "residual_sum, backward",
    }  # fmt: skip
    weights = {"linear weight", "experts weight"}  # parts of the backwards that are repeated here
    assert {one.operator for one in calls} >= set(FUNCTIONS) - deferred_or_elsewhere - weights - on_gpus


def changed(difference: Difference, which: str) -> Difference:
    tensors = [None if one is None else one.clone() for one in getattr(difference.call, which)]
    assert tensors[0] is not None
    tensors[0].view(torch.int32).view(-1)[5] ^= 1
    return replace(difference, call=replace(difference.call, **{which: tuple(tensors)}))


@pytest.mark.parametrize(
    ("which", "verdict"), [("first", "computed something else"), ("permuted", "its repetition was wrong")]
)
def test_wrong_result_is_shown_again(
    which: str, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    difference = next(one for one in some_calls() if one.operator == "linear, forward")
    write_bundle(tmp_path / "call.pt", changed(difference, which), ABOUT)
    assert main(["replay", str(tmp_path / "call.pt")]) == 5
    out = capsys.readouterr().out
    assert "linear, forward" in out and "step 7, rank 3, host node-12" in out and "1 elements differ" in out
    assert verdict in out


def test_defective_machine_is_named_by_its_own_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    difference = next(one for one in some_calls() if one.operator == "linear, forward")
    write_bundle(tmp_path / "call.pt", difference, ABOUT)
    injector = Injector(parse_faults("product/lane/persistent"), 0)
    injector.begin_step(1)
    injector.install()
    try:
        assert main(["replay", str(tmp_path / "call.pt")]) == 5
    finally:
        install_hook(None)
    assert "this machine shows it too" in capsys.readouterr().out


def no_bundle(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 nothing")


def other_content(path: Path) -> None:
    torch.save({"format": "another"}, path)


@pytest.mark.parametrize("make", [no_bundle, other_content, Path.mkdir, lambda path: None])
def test_other_files_are_refused_in_one_line(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "call.pt"
    make(path)
    with pytest.raises(ConfigError, match=r"call\.pt"):
        replay(path)


def test_call_of_another_version_is_refused(tmp_path: Path) -> None:
    difference = some_calls()[0]
    unknown = replace(difference, call=replace(difference.call, function="convolution, forward"))
    write_bundle(tmp_path / "call.pt", unknown, ABOUT)
    with pytest.raises(ConfigError, match="does not know"):
        replay(tmp_path / "call.pt")
