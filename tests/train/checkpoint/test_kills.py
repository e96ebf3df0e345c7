"""SIGKILL of a random rank at random moments: a restart resumes from a valid checkpoint, bitwise identical."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.support.running import NARROW, exact, lines
from tests.train.checkpoint.killed import PHASES, Fate, end, place_of_death, samples_of_steps, start, steps_read
from train.checkpoint.manifest import list_checkpoints, verify

RANKS, STEPS, BATCH = 2, 16, 4
ENDS_WITHIN = 60.0  # seconds in which the other ranks must notice
# How many calls of a phase's function a rank makes in a save or two, so that the moments lie all over it
CALLS = {
    "staging": 300, "planning": 18, "writing": 3000, "committing": 4, "renaming": 3, "pruning": 12, "moving": 6,
    "removing": 12, "loading": 120, "verifying": 3,
}  # fmt: skip
BY_THE_FIRST = ("committing", "renaming", "pruning", "moving", "removing")  # only rank 0 does this
MET = (*PHASES, "renaming in commit, before", "renaming in commit, after")  # where 200 kills must have fallen at least


@dataclass
class Campaign:
    """Runs that are killed, restarted and compared with an uninterrupted one."""

    words: list[str]
    folder: Path
    reference: dict[int, dict[str, str]]
    chance: random.Random
    kills: dict[str, int] = field(default_factory=dict)
    runs: int = 0

    @property
    def run(self) -> Path:
        return self.folder / f"run-{self.runs}"

    def go_on(self) -> None:
        """Start the current run, kill a rank, and check that nothing is lost; or wait for the run's end."""
        phase = self.chance.choice([*PHASES, "any moment", "any moment"])
        victim = self.chance.randrange(RANKS)
        if phase in BY_THE_FIRST:
            victim = 0
        fate = None
        if phase in CALLS:
            fate = Fate(phase, self.chance.randint(1, CALLS[phase]), self.chance.random() < 0.5)
        before = self.committed()
        read_before = [steps_read(self.samples, rank) for rank in range(RANKS)]
        words = [*self.words, f"run.dir={self.folder}", f"run.name={self.run.name}"]
        ranks = start(RANKS, words, self.samples, victim, fate)
        if fate is None:
            self.kill_at_any_moment(ranks[victim])
        codes = end(ranks, ENDS_WITHIN)
        assert None not in codes, f"{phase}: ranks that did not end by themselves: {codes}, {self.said()}"
        for rank, earlier in enumerate(read_before):
            now = steps_read(self.samples, rank)[len(earlier) :]
            assert now == list(range(before + 1, before + 1 + len(now))), f"{phase}: {now} from step {before}"
        if codes == [0] * RANKS:
            self.compare()
            self.runs += 1
            return
        assert -9 in codes, f"{phase}: no rank was killed, yet {codes}: {self.said()}"
        place = place_of_death(self.samples) or "any moment"
        assert place.startswith(phase), f"{phase}, yet it died {place}"
        self.kills[place] = self.kills.get(place, 0) + 1
        assert self.committed() >= before, f"{phase}: a committed checkpoint is lost"
        for path in list_checkpoints(self.run / "checkpoints"):
            assert verify(path).problem is None, f"{phase}: {verify(path)}"

    def kill_at_any_moment(self, process: BaseProcess) -> None:
        process.join(self.chance.uniform(0.0, 2.0))
        process.kill()

    def committed(self) -> int:
        """The newest committed step."""
        found = list_checkpoints(self.run / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    @property
    def samples(self) -> Path:
        return self.folder / f"samples-{self.runs}"

    def said(self) -> str:
        return "".join(Path(f"{self.samples}.{rank}.log").read_text()[-1500:] for rank in range(RANKS))

    def compare(self) -> None:
        """Bitwise equal to an uninterrupted run, with every sample read once, in order."""
        assert exact(self.run) == self.reference
        assert [row["first_sample"] for row in lines(self.run)] == list(range(0, STEPS * BATCH, BATCH))
        read = samples_of_steps(self.samples, RANKS)
        assert read == {step: list(range((step - 1) * BATCH, step * BATCH)) for step in range(1, STEPS + 1)}


@pytest.fixture
def campaign(overrides: list[str], tmp_path: Path) -> Campaign:
    words = [*overrides, *NARROW, f"train.steps={STEPS}", "parallel.timeout_seconds=20"]
    uninterrupted = tmp_path / "uninterrupted"
    straight = [*words, f"run.dir={uninterrupted}", "run.name=run"]
    assert end(start(RANKS, straight, tmp_path / "straight"), 120) == [0] * RANKS
    seed = time.time_ns() % 1_000_000
    print(f"seed of the moments: {seed}")
    words += ["checkpoint.every=2", "checkpoint.keep=2", "checkpoint.keep_every=8"]
    return Campaign(words, tmp_path, exact(uninterrupted / "run"), random.Random(seed))


def test_another_number_of_ranks_resumes_at_the_next_sample(overrides: list[str], tmp_path: Path) -> None:
    """From one rank to two and back: no sample is left out or read twice."""
    words = [*overrides, *NARROW, f"run.dir={tmp_path}", "run.name=run"]
    for world_size, steps in ((1, 3), (2, 7), (1, 9)):
        samples = tmp_path / f"samples-{world_size}-{steps}"
        assert end(start(world_size, [*words, f"train.steps={steps}"], samples), 120) == [0] * world_size
    found: dict[int, list[int]] = {}
    for world_size, steps in ((1, 3), (2, 7), (1, 9)):
        found |= samples_of_steps(tmp_path / f"samples-{world_size}-{steps}", world_size)
    assert found == {step: list(range((step - 1) * BATCH, step * BATCH)) for step in range(1, 10)}
    assert [row["first_sample"] for row in lines(tmp_path / "run")] == list(range(0, 9 * BATCH, BATCH))


def kill(campaign: Campaign, count: int) -> None:
    """Kill ``count`` ranks, then let the last run end; prints where they died."""
    began = time.monotonic()
    while sum(campaign.kills.values()) < count:
        campaign.go_on()
    finished = campaign.runs
    words = [*campaign.words, f"run.dir={campaign.folder}", f"run.name={campaign.run.name}"]
    assert end(start(RANKS, words, campaign.samples), 120) == [0] * RANKS, campaign.said()
    campaign.compare()
    result = {
        "kills": dict(sorted(campaign.kills.items())),
        "runs": finished + 1,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result))


def test_resume_is_exact_after_4_kills(campaign: Campaign) -> None:
    kill(campaign, 4)


@pytest.mark.long
def test_resume_is_exact_after_200_kills(campaign: Campaign) -> None:
    kill(campaign, 200)
    missed = [place for place in MET if not any(met.startswith(place) for met in campaign.kills)]
    assert not missed, f"no kill fell in: {missed}"
