"""Trials of injected faults: a few training steps on the ranks of a layout, one fault, what the checks say.

A trial starts from the same state each time. Its record says what changed, whether, when and as what it was noticed,
and, if it was not, whether the state after the last step differs from that of a clean run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from longcat.errors import CorruptionError
from longcat.faults import Place, install_hook
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from parallel.sdc.recompute import Recomputer
from parallel.sdc.spec import InjectedFault, Pattern
from parallel.watchdog.events import Event, SpanKind
from tests.support.running import TINY, PaddedSamples, RandomSamples
from train.batches import BatchReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.data.config import Packing
from train.run import build_state
from train.step import Stepper

STEPS = 3  # of a trial; faults strike in the first or the second
COUNTS = Event(SpanKind.EXPERT_COUNTS).text
MEMORY = (Place.weight, Place.moment, Place.optimizer)
COMPUTATION = (Place.activation, Place.gradient, Place.attention_backward)
# A layer each, so that a step takes some hundredths of a second
LAYOUTS: dict[str, tuple[int, str]] = {
    "one process": (1, ""),
    "fsdp 2, ep 2, bfloat16": (2, "parallel.fsdp=2 parallel.ep=2 model.num_experts=4 train.dtype=bfloat16"),
    "cp 2, ep 2, all-gather": (
        2,
        "parallel.cp=2 parallel.ep=2 model.num_experts=4 parallel.transport=all_gather",
    ),
    "tp 2": (2, "parallel.tp=2 model.vocab_size=98"),
    "pp 2, zbv": (2, "parallel.pp=2 parallel.schedule=zbv model.num_layers=4 train.global_batch_size=4"),
    "dp 2": (2, "parallel.dp=2"),
    "dp 2, fsdp 2": (4, "parallel.dp=2 parallel.fsdp=2 train.global_batch_size=4"),
    "zero2": (2, "parallel.fsdp=2 parallel.sharding=zero2"),
}


class Everything(Recomputer):
    """Repeats every call."""

    def _is_chosen(self) -> bool:
        super()._is_chosen()
        return True


@dataclass
class Trial:
    """What became of one fault."""

    fault: str
    layout: str
    place: str
    pattern: str
    rank: int  # that it struck
    struck: int = 0  # the step in which it first changed something; 0: it never did
    noticed: int = 0  # the step that ended with a finding; 0: none did
    kind: str = ""
    what: str = ""  # the tensor or transfer that was named
    suspects: tuple[int, ...] = ()
    harmless: bool = False  # not noticed, and the state is that of a clean run


class Rank:
    """One rank's model, which every trial takes back to the same state."""

    def __init__(self, words: list[str]) -> None:
        torch.set_num_threads(1)
        self.config = compose([*TINY, "model.num_mtp_layers=0", "train.global_batch_size=2", *words])
        rank, _, world_size = world_from_environment()
        sizes = resolve_sizes(self.config.parallel, world_size)
        self.topology = make_topology(sizes, rank, world_size, torch.device("cpu"))
        self.state = build_state(self.config, self.topology)
        is_packed = self.config.data.packing == Packing.best_fit
        samples: Any = (PaddedSamples if is_packed else RandomSamples)(self.config.train.sequence_length)
        self.reader = BatchReader(samples, self.config, self.topology)
        self.stepper(()).step()  # so that moments are not zero
        self.counters, self.health = dict(vars(self.state.counters)), deepcopy(vars(self.state.health))
        self.kept = [tensor.clone() for tensor in self.tensors()]

    def tensors(self) -> Iterator[Tensor]:
        yield from (box.values for box in self.state.store.local_boxes(write=True))
        yield from (step for _, step in self.state.store.steps(write=True))
        yield from (tensor for _, tensor in self.state.replicated())

    @torch.no_grad()
    def stepper(self, faults: tuple[InjectedFault, ...]) -> Stepper:
        self.config.sdc.inject = [str(fault) for fault in faults]
        return Stepper(self.state, self.reader, self.config, self.topology)

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, kept in zip(self.tensors(), self.kept, strict=True):
            tensor.copy_(kept)
        vars(self.state.counters).update(self.counters)
        vars(self.state.health).update(deepcopy(self.health))  # it is part of the state's hash
        self.state.store.refresh()
        self.state.set_biases(self.state.biases)
        self.state.checksums = None
        self.state.store.optimizer.zero_grad(set_to_none=True)

    def clean(self, steps: int) -> str:
        """The state's hash after ``steps`` steps without a fault; a finding raises."""
        self.restore()
        stepper = self.stepper(())
        for _ in range(steps):
            stepper.step()
        return state_hash(self.state, self.topology)

    def calls(self) -> Counter[str]:
        """The calls at each place in one step on this rank."""
        found: Counter[str] = Counter()
        self.restore()
        stepper = self.stepper(())
        install_hook(lambda place, name, tensor: found.update([place, f"{place} {name}"]))
        try:
            stepper.step()
        finally:
            install_hook(None)
        return found

    def attempt(self, layout: str, fault: InjectedFault, clean: str) -> Trial:
        """Train with one fault. A collective; the record is this rank's, complete on the rank that was struck."""
        self.restore()
        first = self.state.counters.step
        trial = Trial(str(fault), layout, fault.place, fault.pattern, fault.rank)
        stepper = self.stepper((fault,))
        try:
            for _ in range(STEPS):
                if not stepper.step().healthy:
                    trial.noticed, trial.kind = self.state.counters.step, "not finite"
                    break
            else:
                trial.harmless = state_hash(self.state, self.topology) == clean
        except CorruptionError as error:
            finding = error.details["finding"]
            trial.noticed, trial.kind, trial.what = finding["step"], finding["kind"], finding["what"]
            trial.suspects = tuple(one["rank"] for one in finding["suspects"])
            assert self.state.counters.step == finding["step"] - 1, "the step was not counted"
        finally:
            install_hook(None)
        strikes = stepper.guard.injector.strikes
        trial.struck = strikes[0].step - first if strikes else 0
        trial.noticed = max(0, trial.noticed - first)
        return trial


def draw(chance: random.Random, calls: list[Counter[str]], first: int, places: tuple[Place, ...]) -> InjectedFault:
    """A random fault that some rank meets in a step after ``first``; ``calls`` are each rank's in a step."""
    place = chance.choice([one for one in places if any(found[one] for found in calls)])
    rank = chance.choice([number for number, found in enumerate(calls) if found[place]])
    key, name = str(place), ""
    if (
        place is Place.payload
    ):  # not counts of rows, which end the struck rank alone: see tests/parallel/sdc/test_counts.py
        names = sorted(one for one in calls[rank] if one.startswith(f"{place} ") and COUNTS not in one)
        key = chance.choice(names)
        name = key.removeprefix(f"{place} ")
    return InjectedFault(
        place,
        chance.choice(list(Pattern)),
        step=first + chance.randint(1, 2),
        rank=rank,
        call=chance.randint(1, calls[rank][key]),
        name=name,
        count=chance.randint(1, 5),
        factor=chance.choice([1.0625, 2.0, -1.0]),
        seed=chance.randrange(1 << 30),
    )


def campaign(layout: str, words: list[str], faults: range, seed: int, clean_steps: int = 0) -> list[dict[str, Any]]:
    """The trials ``faults`` of a layout's sequence of random faults, then clean steps; run on every rank of a pool."""
    install_hook(None)
    here = Rank(words)
    try:
        clean, calls = here.clean(STEPS), _gather(here.calls())
        for place in MEMORY:
            for rank, found in enumerate(calls):
                found[place] = _gather(_memory_calls(here, place))[rank][place]
        found = []
        for number in faults:
            chance = random.Random(f"{seed} {layout} {number}")
            trial = here.attempt(layout, draw(chance, calls, here.counters["step"], tuple(Place)[:-2]), clean)
            found.append({"number": number, **asdict(trial)})
        if clean_steps:
            here.clean(clean_steps)
        return found
    finally:
        install_hook(None)
        here.state.engine.close()


def _memory_calls(here: Rank, place: Place) -> Counter[str]:
    """Tensors at rest that a fault at ``place`` may strike."""
    kinds = Counter(box.kind == "weight" for box in here.state.store.local_boxes(write=True))
    return Counter({place: {Place.weight: kinds[True], Place.moment: kinds[False]}.get(place, kinds.total())})


def _gather(value: Counter[str]) -> list[Counter[str]]:
    from parallel.reduce import all_gather_object

    return all_gather_object(value)


def struck_rank(records: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of all ranks' records of the same trials, those of the rank that was struck; all ranks must agree on the end."""
    merged = []
    for same in zip(*records, strict=True):
        assert len({(one["noticed"], one["kind"], one["what"]) for one in same}) == 1, f"ranks disagree: {same}"
        merged.append(same[same[0]["rank"]])
    return merged


Run = Callable[..., list[list[dict[str, Any]]]]
