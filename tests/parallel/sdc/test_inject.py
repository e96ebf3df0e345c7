"""Faults to inject: their descriptions, what each pattern changes, and when."""

from __future__ import annotations

import pytest
import torch

from longcat.errors import ConfigError
from longcat.faults import Place, install_hook, is_active, passed
from longcat.ops.matmul import linear
from parallel.sdc.inject import LANE, Injector, corrupt
from parallel.sdc.spec import InjectedFault, Pattern, parse_fault, parse_faults
from train.compose import compose


def test_description_is_read_and_written_back() -> None:
    text = "weight/bits/step:5/rank:1/call:2/name:down/count:4/seed:9/persistent"
    fault = parse_fault(text)
    assert fault == InjectedFault("weight", "bits", 5, 1, 2, "down", 4, seed=9, persistent=True)
    assert str(fault) == text and parse_fault(str(fault)) == fault
    assert compose([f"sdc.inject={text}"]).sdc.faults == [fault]
    assert len(compose([f"sdc.inject=[{text},file/row]"]).sdc.faults) == 2
    assert parse_faults([]) == parse_faults("") == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("wight/bits", "the place wight is not known; use weight, moment"),
        ("weight", "a pattern is missing"),
        ("weight/bots", "the pattern bots is not known; use bits, lane"),
        ("weight/bits/step:0", "step:0 must be from 1"),
        ("weight/bits/step:x", "step:x needs a number"),
        ("weight/bits/stp:1", "'stp:1' is no setting"),
        ("weight/scale/factor:inf", "factor:inf must be a finite number"),
        (5, "must be one fault or a list"),
        (["weight/bits", 5], "must be one fault or a list"),
    ],
)
def test_wrong_description_is_refused_with_its_cure(text: object, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        parse_faults(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("pattern", Pattern)
def test_pattern_changes_what_it_says(pattern: Pattern, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randint(1, 100, (40, 33)).to(dtype)
    for seed in range(5):
        y = x.clone()
        changed = corrupt(y, InjectedFault("weight", pattern, seed=seed, count=3, factor=2.0))
        rows, columns = (x.view(torch.uint8) != y.view(torch.uint8)).view(40, 33, -1).any(2).nonzero().unbind(1)
        assert changed == rows.numel()
        if pattern == Pattern.bits:
            bits = x.view(-1).view(torch.uint8).bitwise_xor(y.view(-1).view(torch.uint8))
            assert changed == 1 and sum(int(one).bit_count() for one in bits.tolist()) == 3
        elif pattern == Pattern.lane:
            assert len(set(((rows * 33 + columns) % LANE).tolist())) <= 1
        elif pattern == Pattern.scale:
            assert changed == 16 * 16 and int(rows.max() - rows.min()) < 16
        else:
            assert set(rows.tolist()) == {int(rows[0])}
            assert any(torch.equal(y[int(rows[0])], other) for other in x)


def test_stuck_lane_strikes_the_same_elements_again() -> None:
    fault = InjectedFault("activation", "lane", seed=3)
    first, second = torch.randn(64, 16), torch.randn(64, 16)
    masks = []
    for x in (first, second):
        y = x.clone()
        corrupt(y, fault)
        again = y.clone()
        assert corrupt(again, fault) == 0, "the bit is stuck already"
        masks.append({position % LANE for position in (x != y).view(-1).nonzero()[:, 0].tolist()})
    assert masks[0] == masks[1] and len(masks[0]) == 1


def test_views_with_strides_are_struck_in_place() -> None:
    x = torch.randn(8, 8)
    for pattern in Pattern:
        before = x.clone()
        assert corrupt(x.t()[2:], InjectedFault("weight", pattern, factor=3.0, seed=1)) > 0
        assert not torch.equal(x, before)


def test_fault_strikes_its_rank_step_and_call_only() -> None:
    fault = InjectedFault("activation", "bits", step=2, rank=1, call=2, name="lin")
    assert not Injector([fault], rank=0).faults
    injector = Injector([fault], rank=1)
    for step in (1, 2, 3):
        injector.begin_step(step)
        for place, name in (("activation", "norm"), ("gradient", "linear"), *[("activation", "linear")] * 3):
            injector(Place(place), name, torch.ones(4))
    assert [(strike.step, strike.name, strike.changed) for strike in injector.strikes] == [(2, "linear", 1)]


def test_persistent_fault_strikes_every_call_from_its_step_on() -> None:
    injector = Injector([InjectedFault("activation", "bits", step=2, persistent=True)], rank=0)
    for step in (1, 2, 3):
        injector.begin_step(step)
        for _ in range(2):
            injector(Place.activation, "linear", torch.ones(4))
    assert [strike.step for strike in injector.strikes] == [2, 2, 3, 3]


def test_operator_outputs_pass_the_hook_forward_and_backward() -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    clean = linear(x, weight)
    seen = []
    install_hook(lambda place, name, tensor: seen.append((place, name, tuple(tensor.shape))))
    try:
        assert is_active()
        linear(x, weight).sum().backward()
    finally:
        install_hook(None)
    assert seen == [
        ("product", "product", (5, 3)),
        ("activation", "linear", (5, 3)),
        ("product", "product", (5, 4)),
        ("gradient", "linear", (5, 4)),
        ("product", "product", (3, 4)),
        ("gradient", "linear weight", (3, 4)),
    ]
    assert passed(Place.activation, "linear", clean) is clean and not is_active()
