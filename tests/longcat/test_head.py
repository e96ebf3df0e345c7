"""The head's loss on a GPU, as the meta device shows it: float32 products, one float32 gradient at a time."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import longcat.model
from longcat.model import LongCat
from longcat.ops.cross_entropy import chunk_rows, linear_cross_entropy, runs_again
from longcat.ops.matmul import writes_float32
from longcat.ops.torch_internals import TorchDispatchMode, product_flops, storage_key, tree_leaves
from train.compose import compose

TOKENS, WIDTH, VOCABULARY = 8192, 64, 131072


class Alive(TorchDispatchMode):
    """The most storages of float32 and the head's size that live at once; products and their FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.flops = 0, 0, 0.0
        self.products: Counter[str] = Counter()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._opname in ("mm", "addmm"):
            self.products[f"{func._opname}.{func._overloadname}"] += 1
        self.flops += product_flops(func, args, kwargs or {}, out)
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage().nbytes() == VOCABULARY * WIDTH * 4:
                self.see(one.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        if storage_key(storage) not in self.seen:
            self.seen.add(storage_key(storage))
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.freed, storage_key(storage))

    def freed(self, key: int) -> None:
        self.seen.remove(key)
        self.now -= 1


def two_losses(run_again: bool) -> Alive:
    """The head's loss and that of an MTP layer on the meta device, forward and backward, in bfloat16."""
    weight = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    valid = torch.empty(TOKENS, dtype=torch.bool, device="meta")
    with Alive() as alive:
        hidden = [torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2)]
        first, _ = linear_cross_entropy(hidden[0], weight, labels, valid, run_again=run_again)
        second, _ = linear_cross_entropy(hidden[1], weight, labels, valid)
        (first + 0.1 * second).backward()
        assert weight.grad is not None and weight.grad.dtype is torch.bfloat16
    return alive


def test_the_heads_gradient_lives_once() -> None:
    """In float32, with two losses; for one product of logits more: 7 in place of 6."""
    kept, again = two_losses(run_again=False), two_losses(run_again=True)
    assert (kept.most, again.most) == (2, 1)
    assert again.flops == pytest.approx(7 / 6 * kept.flops)


def test_products_of_the_head_are_not_rounded() -> None:
    """Logits come in float32, and the weight's gradient is added in float32 without a tensor of its size."""
    chunks = TOKENS // 4096
    products = two_losses(run_again=False).products
    assert products == {"mm.dtype": 2 * chunks, "addmm.dtype_out": 2 * chunks, "mm.default": 2 * chunks}


def test_chunks_of_a_gpu_have_4096_rows() -> None:
    assert chunk_rows(torch.empty(VOCABULARY, 1, device="meta")) == 4096
    assert chunk_rows(torch.empty(VOCABULARY, 1)) == 256


@pytest.mark.parametrize(
    ("device", "dtype", "float32"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_where_products_are_written_in_float32(device: str, dtype: torch.dtype, float32: bool) -> None:
    assert writes_float32(device, dtype) == float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_again_changes_no_bit_and_keeps_no_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(600, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(96, 24, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(96, (600,), generator=generator)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def run(run_again: bool) -> list[Tensor]:
        saved.clear()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, losses = linear_cross_entropy(hidden, weight, labels, labels % 7 != 0, run_again=run_again)
        return [loss.detach(), losses, *torch.autograd.grad(loss / 3, (hidden, weight))]

    plain = run(False)
    assert all(torch.equal(one, other) for one, other in zip(plain, run(True), strict=True))
    assert sum(one.is_floating_point() for one in saved) == 2  # hidden and weight, and no gradient
    assert saved[0] is hidden and saved[1] is weight


def test_a_model_runs_all_but_its_last_loss_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where it is trained with MTP; on a CPU none."""
    config = compose(["model=debug", "model.vocab_size=64", "model.num_mtp_layers=2"]).model
    model = LongCat(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    tokens = torch.randint(64, (1, 16))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    seen: list[bool] = []
    plain = model.vocabulary.cross_entropy

    def recording(*operands: Tensor, run_again: bool) -> tuple[Tensor, Tensor]:
        seen.append(run_again)
        return plain(*operands, run_again=run_again)

    monkeypatch.setattr(model.vocabulary, "cross_entropy", recording)
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(longcat.model, "runs_again", (lambda _: True) if on_gpu else runs_again)
        for mtp in (True, False):
            model.zero_grad()
            losses = model(tokens, tokens.roll(-1, 1), valid, mtp=mtp)
            (losses.lm + losses.mtp).backward()
            assert model.lm_head is not None and model.lm_head.weight.grad is not None
            found.append(model.lm_head.weight.grad.clone())
    assert seen == [False] * 4 + [True, True, False, False]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
