"""A tile of AdamW's update is redone and compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parallel.sdc.update import TILE, UpdateCheck


def optimizer(sizes: list[int]) -> tuple[list[tuple[str, nn.Parameter]], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(0)
    parameters = [(f"p{i}", nn.Parameter(torch.randn(n, generator=generator))) for i, n in enumerate(sizes)]
    groups = [{"params": [p], "lr": 1e-2 * (i + 1), "weight_decay": 0.1 * i} for i, (_, p) in enumerate(parameters)]
    made = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-16, fused=True)
    for _, p in parameters:
        zeros = {kind: torch.zeros_like(p, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
        made.state[p] = {"step": torch.zeros(()), **zeros}
    return parameters, made


def step(parameters: list[tuple[str, nn.Parameter]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


SIZES = [5, 32, 100, 3 * TILE + 77]


def test_sound_updates_agree_in_every_tile() -> None:
    parameters, made = optimizer(SIZES)
    check, names = UpdateCheck(parameters, made), set()
    for number in range(12):
        step(parameters, number)
        check.before(number)
        assert check._backup is not None
        names.add((check._backup.name, check._backup.where.start))
        made.step()
        assert check.after() is None
    assert names == {("p1", 0), ("p2", 0), ("p3", 0), ("p3", TILE), ("p3", 2 * TILE), ("p3", 3 * TILE)}


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
def test_wrong_update_is_found(what: str) -> None:
    parameters, made = optimizer(SIZES)
    check = UpdateCheck(parameters, made)
    step(parameters, 1)
    check.before(1)
    made.step()
    parameter = parameters[2][1]
    target = parameter.data if what == "weight" else made.state[parameter][what]
    target.view(torch.int32)[40] ^= 1
    found = check.after()
    assert found is not None and (found.name, found.elements) == ("p2", 1) and found.largest > 0


def test_checking_changes_no_bit() -> None:
    plain, checked = optimizer(SIZES), optimizer(SIZES)
    check = UpdateCheck(*checked)
    for number in range(3):
        for parameters, _ in (plain, checked):
            step(parameters, number)
        plain[1].step()
        check.before(number)
        checked[1].step()
        check.after()
    for (_, one), (_, other) in zip(plain[0], checked[0], strict=True):
        assert torch.equal(one, other)
        assert torch.equal(plain[1].state[one]["exp_avg_sq"], checked[1].state[other]["exp_avg_sq"])


def test_parameters_without_gradients_have_no_tiles() -> None:
    parameters, made = optimizer([64])
    check = UpdateCheck(parameters, made)
    check.before(0)
    assert check.after() is None
