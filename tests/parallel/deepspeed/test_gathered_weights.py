"""What ZeRO-3 keeps gathered at the points of a step: the backward of a layer releases the layer's weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor, nn

from parallel.deepspeed import setup
from tests.support.pool import close_pools, pool
from tests.support.steppers import make_stepper
from tests.support.three_steps import MODEL

LAYERS, STEPS = 3, 3
WHOLE_BACKWARD = {"embed_tokens.weight", "lm_head.weight"}  # which MTP, the first part of it, uses too


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def gathered_bytes(recompute: str) -> list[dict[str, int]]:
    """By step: bytes of gathered layers' and MTP's weights after each layer's backward, and after the whole one."""
    setup.PERSISTENT_NUMEL = 100  # larger weights are sharded
    words = [*MODEL, "model.hidden_size=24", f"model.num_layers={LAYERS}", "train.micro_batch_size=2"]
    stepper = make_stepper([*words, "parallel.sharding=zero3", f"parallel.recompute={recompute}"])
    engine, steps = stepper.state.engine, []

    def gathered() -> int:
        found = [weight for weight, name in engine.names.items() if name not in WHOLE_BACKWARD]
        return sum(w.nbytes for w in found if w.ds_status.name == "AVAILABLE" and not w.ds_persist)

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        inputs[0].register_hook(lambda _: steps[-1].__setitem__(name, gathered()))

    for name, layer in engine.model.layers.items():
        layer.register_forward_pre_hook(lambda module, inputs, name=name: watch(module, inputs, f"layer {name}"))
    backward = engine.backward

    def watched(*arguments: object, **named: object) -> None:
        backward(*arguments, **named)
        steps[-1]["all"] = gathered()

    engine.backward = watched
    for _ in range(STEPS):
        steps.append({})
        stepper.step()
    engine.close()
    return steps


@pytest.mark.parametrize("recompute", ["none", "light", "selective"])
def test_a_layers_backward_releases_its_weights(recompute: str) -> None:
    """With `selective` the projections that are computed again stayed gathered to the end of the backward.

    From the second step on DeepSpeed keeps what it will use again soon: all of a small model, so the last layer counts.
    """
    for steps in pool(2).run(gathered_bytes, recompute):
        assert set(steps[0]) == {"all", *(f"layer {number}" for number in range(LAYERS))}
        assert set(steps[0].values()) == {0}
        assert all((step["layer 0"], step["all"]) == (0, 0) for step in steps)
