"""What recomputation keeps, computes and leaves as it was: every bit."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.errors import ConfigError
from longcat.layer import ShortcutLayer
from longcat.model import LongCat
from longcat.ops.calls import set_observer
from longcat.ops.fusion import fuse
from longcat.recompute_values import Value
from parallel.config import ParallelConfig, Recompute
from parallel.fsdp.sharding import local_part
from parallel.plan.layer import layer_cost
from parallel.recompute import apply_recompute, recompute_layer
from parallel.sdc.recompute import Recomputer
from tests.support.pool import close_pools, pool
from tests.support.steppers import make_stepper
from tests.support.three_steps import MODEL
from train.compose import compose

PRESETS = [ParallelConfig(recompute=one) for one in Recompute if one != Recompute.none]
LISTS = [ParallelConfig(recompute=Recompute.selective, recompute_list=[one]) for one in Value]
EVERYTHING = ParallelConfig(recompute=Recompute.selective, recompute_list=list(Value))
SHORT, LONG = (torch.float32, 48), (torch.bfloat16, 544)  # rows of probabilities are saved, or not
CASES = [(one, *SHORT) for one in (*LISTS, EVERYTHING)] + [(one, *LONG) for one in (*PRESETS, EVERYTHING)]


class Mark:
    """What a weak reference can refer to."""


def named(value: object) -> str | None:
    if isinstance(value, ParallelConfig):
        return "+".join(value.recompute_list) or str(value.recompute)
    return None


def debug_config() -> ModelConfig:
    return replace(compose(["model=debug"]).model, vocab_size=64)


def losses_and_gradients(config: ParallelConfig, dtype: torch.dtype, length: int) -> dict[str, Tensor]:
    """Of two sequences of three documents each, by name."""
    torch.manual_seed(1)
    model = LongCat(debug_config())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    for router in model.routers():
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.01)
    model.to(dtype)
    apply_recompute(model, config)
    tokens = torch.randint(64, (2, length))
    documents = Documents.of((torch.arange(length) * 3 // length).expand(2, -1).contiguous())
    losses = model(tokens, tokens.roll(-1, 1), torch.ones_like(tokens, dtype=torch.bool), documents)
    (losses.lm + losses.mtp + losses.balance + losses.hidden_z).backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {**found, "loss": losses.lm.detach(), "mtp": losses.mtp.detach(), "counts": losses.counts}


plain_losses_and_gradients = cache(partial(losses_and_gradients, ParallelConfig()))


@pytest.mark.parametrize(("config", "dtype", "length"), CASES, ids=named)
def test_recomputation_changes_no_bit(config: ParallelConfig, dtype: torch.dtype, length: int) -> None:
    plain = plain_losses_and_gradients(dtype, length)
    again = losses_and_gradients(config, dtype, length)
    assert plain.keys() == again.keys()
    assert not [name for name, value in plain.items() if not torch.equal(value, again[name])]


def test_repeated_operators_see_no_difference() -> None:
    """What watches for corruption repeats calls of a step that computes values again."""
    plain = plain_losses_and_gradients(*SHORT)
    recomputer = Recomputer(1)
    try:
        for step in range(4):  # the first step counts the calls
            recomputer.begin_step(step)
            again = losses_and_gradients(EVERYTHING, *SHORT)
            recomputer.end_step()
            assert not [name for name, value in plain.items() if not torch.equal(value, again[name])]
    finally:
        set_observer(None)
    assert recomputer.checked == 3 and not recomputer.differences


TWO_RANKS = [*MODEL, "model.num_layers=1", "model.num_experts=4", "parallel.tp=2", "parallel.ep=2"]
LISTED = ["parallel.recompute=selective", f"parallel.recompute_list=[{','.join(Value)}]"]


def two_steps(overrides: list[str]) -> list[Any]:
    """Losses, gradient norms and weights of this rank."""
    stepper = make_stepper(overrides)
    results = [stepper.step() for _ in range(2)]
    weights = [local_part(weight.detach())[0] for model in stepper.state.models for weight in model.parameters()]
    return [
        [(one.metrics["loss"], one.metrics["grad_norm"]) for one in results],
        [hash_of(weight) for weight in weights],
    ]


def hash_of(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_tensor_parallel_ranks_keep_their_bits() -> None:
    """Every value that two ranks can compute again, with their heads and experts divided."""
    try:
        plain = pool(2).run(two_steps, TWO_RANKS)
        again = pool(2).run(two_steps, [*TWO_RANKS, *LISTED])
    finally:
        close_pools()
    assert plain == again


@pytest.mark.long
def test_fused_operators_keep_their_bits() -> None:
    """With `parallel.compile`, against the same without recomputation."""
    fuse(True)
    try:
        plain, again = (losses_and_gradients(one, *SHORT) for one in (ParallelConfig(), EVERYTHING))
    finally:
        fuse(False)
    assert not [name for name, value in plain.items() if not torch.equal(value, again[name])]


def test_presets_keep_less_of_a_flash_layer() -> None:
    """At 8,192 tokens; the figures are those of docs/decisions/2026-11-29-recomputed-values.md."""
    flash = compose(["model=flash"]).model
    costs = {one: layer_cost(flash, ParallelConfig(recompute=one), 8192) for one in Recompute}
    none = costs[Recompute.none]
    kept = {one: cost.kept_bytes / none.kept_bytes for one, cost in costs.items()}
    more = {one: cost.flops / none.flops - 1 for one, cost in costs.items()}
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    assert none.kept_bytes < 4.8e9, "the experts' results are not kept"
    assert kept[Recompute.light] < 0.74 and more[Recompute.light] == 0
    assert kept[Recompute.selective] < 0.37 and more[Recompute.selective] < 0.06
    assert kept[Recompute.full] < 0.022 and more[Recompute.full] > 0.3


def test_kept_bytes_are_what_autograd_saves() -> None:
    """Without recomputation: a small layer's storages that autograd saves, counted by its own hooks."""
    torch.manual_seed(0)  # for some values all tokens choose identity experts
    config = debug_config()
    layer = ShortcutLayer(config, 1).to(torch.bfloat16)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1, 1024, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    angles = torch.ones(1024, config.qk_rope_head_dim // 2, dtype=torch.complex64)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(x, angles, None)
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    assert result[0].requires_grad
    own = sum(size for key, size in saved.items() if key not in weights)
    kept = layer_cost(config, ParallelConfig(), 1024).kept_bytes
    # The trace has the layer's output, a GPU's attention (whose values are a view of what keys are made of too), and as
    # many rows as are expected
    assert own * 0.9 < kept < own * 1.2


@pytest.mark.parametrize("recompute", [Recompute.light, Recompute.selective])
def test_values_are_computed_once_more(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many use them: the norm before FFN and experts has five users."""
    calls: Counter[str] = Counter()
    layer = ShortcutLayer(debug_config(), 1)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    for name, module in layer.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    recompute_layer(layer, ParallelConfig(recompute=recompute))
    x = torch.randn(1, 32, 128, requires_grad=True)
    y, statistics = layer(x, torch.ones(32, 4, dtype=torch.complex64), None)
    forward = Counter(calls)
    (y.sum() + statistics.balance).backward()
    again = {name for name in calls if calls[name] == 2}
    assert all(calls[name] <= 2 and forward[name] == 1 for name in forward)
    norms = {name for name in calls if "layernorm" in name and "kv_a" not in name}
    others = {name for name in calls if name.endswith(("q_b_proj", "kv_b_proj", "up_proj"))}
    assert again == (norms | others if recompute == Recompute.selective else norms)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recompute": Recompute.full, "recompute_list": [Value.norms]}, "needs parallel.recompute=selective"),
        ({"recompute": Recompute.selective, "recompute_list": ["norm"]}, "use norms, expansion"),
    ],
)
def test_wrong_lists_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ParallelConfig(**changes).validate()


def test_a_list_is_read_from_the_command_line() -> None:
    config = compose(["parallel.recompute=selective", "parallel.recompute_list=[norms,ffn_up]"]).parallel
    config.validate()
    assert config.recomputed_values == (Value.norms, Value.ffn_up)


def test_a_forward_without_a_backward_frees_its_layer() -> None:
    """As after a forward that ran out of memory: nothing that autograd keeps refers to its own node."""
    model = LongCat(debug_config())
    apply_recompute(model, ParallelConfig(recompute=Recompute.selective))
    tokens = torch.randint(64, (1, 16))
    losses = model(tokens, tokens.roll(-1, 1), torch.ones_like(tokens, dtype=torch.bool))
    nodes, found = [losses.lm.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is not None and "mark" not in node.metadata:
            node.metadata["mark"] = mark = Mark()
            found.append(weakref.ref(mark))
            nodes += [each for each, _ in node.next_functions]
    del losses, node, mark
    gc.collect()
    alive = [one for one in found if one() is not None]
    assert len(found) > 50 and len(alive) <= len(list(model.parameters())), "but for where gradients arrive"
