"""A plan: extended depth and micro-batches against whole traces, its lines, clusters, availability, wrong input."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.__main__ import main
from launch.local import num_ranks
from launch.plan.candidates import layouts
from launch.plan.cluster import PRESETS, find_cluster
from launch.plan.links import Group, TrafficPattern, seconds
from launch.plan.nearest import plan_or_nearest
from launch.plan.plan import PlanOptions, availability, plan, read
from launch.plan.search import SearchResult, lines, search
from launch.plan.show import as_json, search_as_json, table
from launch.plan.summary import peak_bytes, summarise
from launch.plan.trace import Scope, trace
from longcat.errors import BAD_INPUT, OK, ConfigError
from parallel.mesh import resolve_sizes
from tests.launch.plan.allocations import COMMON
from tests.support.corpora import write_corpus
from tests.support.distributed import run_ranks
from train.compose import compose

LONG = 600.0


def peaks(overrides: Sequence[str], exact: bool) -> tuple[list[float], float, float]:
    """(peak of each place in the pipeline, FLOPs that are computed, seconds of a step)."""
    config, options = read([*COMMON, *overrides, f"plan.exact={str(exact).lower()}"])
    found = plan(config, options)
    return [one.peak[1.0] for one in found.memory], found.executed, found.times[1.0].seconds


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.recompute=full", "model.num_layers=5", "train.global_batch_size=2"],
        pytest.param(["model.num_layers=9"], marks=pytest.mark.long),
        pytest.param(["parallel.ep=2", "plan.ranks=2", "model.num_layers=8"], marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_two_layers_extend_to_all(overrides: list[str]) -> None:
    ((extended, extended_flops, extended_seconds),) = run_ranks(peaks, 1, overrides, False, timeout=LONG)
    ((whole, flops, taken),) = run_ranks(peaks, 1, overrides, True, timeout=LONG)
    assert extended == pytest.approx(whole, rel=0.005)
    assert extended_flops == pytest.approx(flops, rel=1e-6)
    assert extended_seconds == pytest.approx(taken, rel=0.01)


def test_mtp_that_is_off_costs_nothing() -> None:
    """As in a run: a stage of loss.mtp_weight=0 computes what a model without MTP layers does."""
    (on, off, without) = (
        run_ranks(peaks, 1, words, False, timeout=LONG)[0]
        for words in ([], ["loss.mtp_weight=0"], ["model.num_mtp_layers=0"])
    )
    assert off[1] == without[1] < 0.9 * on[1] and off[2] < 0.95 * on[2]


def followed(overrides: Sequence[str], ranks: int) -> list[tuple[float, float]]:
    """(peak that follows the schedule from a few micro-batches, peak of a trace of all) of each place."""
    config = compose([*COMMON, *overrides])
    sizes = resolve_sizes(config.parallel, ranks)
    hidden_bytes = 2 * 128 * config.model.hidden_size * 2
    count = config.train.global_batch_size // config.train.micro_batch_size
    found = []
    for rank in range(ranks):
        few = summarise(trace(config, ranks, Scope(rank=rank, micro_batches=2)), rank)
        whole = trace(config, ranks, Scope(rank=rank))
        found.append((peak_bytes(few, config.parallel, sizes, rank, count, hidden_bytes), float(whole.peak)))
    return found


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["zbv", "1f1b", "interleaved"])
def test_schedules_are_followed(schedule: str) -> None:
    overrides = ["parallel.pp=2", f"parallel.schedule={schedule}", "model.num_layers=4", "train.global_batch_size=16"]
    (found,) = run_ranks(followed, 1, overrides, 2, timeout=LONG)
    for followed_peak, whole in found:
        assert 0.98 * whole <= followed_peak <= 1.05 * whole


def planned(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    found = plan(*read([*COMMON, *overrides]))
    return table(found), json.loads(as_json(found))


def test_lines_are_narrow_and_numbers_add_up() -> None:
    overrides = ["parallel.ep=2", "plan.ranks=2", "train.global_batch_size=4"]
    ((lines, numbers),) = run_ranks(planned, 1, overrides, timeout=LONG)
    assert max(map(len, lines)) <= 100
    assert any("It fits" in line for line in lines)
    times = numbers["times"]["1.0"]
    tokens = 4 * 128
    assert times["tokens_per_gpu"] * times["seconds"] * 2 == pytest.approx(tokens)
    peak = numbers["cluster"]["bfloat16"]
    assert times["mfu"] == pytest.approx(numbers["model_flops"] / times["seconds"] / 2 / peak)
    assert {line["axis"] for line in times["links"]} == {"ep", "fsdp"}
    assert numbers["memory"][0]["peak"]["2.0"] > numbers["memory"][0]["peak"]["1.0"]


def test_auto_plans_the_number_that_it_would_choose(tmp_path: Path) -> None:
    """It planned one chunk's time and memory, whatever the links."""
    slow = tmp_path / "slow.yaml"
    rates = "bfloat16: 1.0e11\nmemory: 1.0e11\nnetwork: 3.0e7\nnetwork_latency: 0\ncall: 0\n"
    slow.write_text(f"like: h800\ngpus_per_node: 1\n{rates}")
    words = ["parallel.ep=2", "plan.ranks=2", f"plan.cluster={slow}"]
    both = ([*words, f"overlap.num_chunks={value}"] for value in ("auto", 2))
    (((lines, auto), (_, two)),) = run_ranks(planned_both, 1, *both, timeout=LONG)
    assert any("best 2, auto takes 2" in line for line in lines)
    assert auto["num_chunks"] == 2
    assert auto == two


def planned_both(here: Sequence[str], gone: Sequence[str]) -> list[tuple[list[str], dict[str, Any]]]:
    return [planned(here), planned(gone)]


def test_padding_is_planned_and_not_counted(tmp_path: Path) -> None:
    """A quarter of each sample is padding: the same times, three quarters of tokens and FLOPs."""
    prefix = write_corpus(tmp_path / "corpus", [np.arange(1, 97)] * 40)
    packed = ["plan.ranks=1", "data.mask_documents=true", "data.packing=best_fit", "model.num_layers=1"]
    here, gone = ([*packed, f"data.paths=[{path}]"] for path in (prefix, tmp_path / "gone"))
    (((lines, found), (words, full)),) = run_ranks(planned_both, 1, here, gone, timeout=LONG)
    assert (found["padding"]["share"], full["padding"]["share"]) == (0.25, 0.0)
    assert any("25.00% of the positions" in line for line in lines)
    assert any(f"none assumed: {tmp_path / 'gone'} is not here" in line for line in words)
    assert found["model_flops"] == pytest.approx(0.75 * full["model_flops"])
    assert found["executed_flops"] == full["executed_flops"]
    (less,), (more,) = found["times"].values(), full["times"].values()
    assert less["seconds"] == more["seconds"]
    for name in ("tokens_per_gpu", "mfu"):
        assert less[name] == pytest.approx(0.75 * more[name])
    assert max(map(len, lines)) <= 100
    assert not (tmp_path / "index").exists()


def test_train_with_plan_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", "model=debug", "plan=true", "plan.cluster=nothing", f"run.dir={tmp_path}"])
    assert code == BAD_INPUT  # the plan's own key is read: it is planned, not trained
    assert "plan.cluster=nothing is not known; use h100, h800, h200, b200" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_daly_interval_costs_least() -> None:
    options = PlanOptions(faults_per_gpu_year=1.0, save_seconds=10.0, restart_seconds=300.0)
    found = availability(options, 1000, step_seconds=1.0)
    assert found.hours_between_faults == pytest.approx(8.76)
    mean = found.hours_between_faults * 3600
    assert found.interval_seconds == pytest.approx(math.sqrt(2 * 10 * mean))

    def lost(interval: float) -> float:
        return 10 / interval + (interval / 2 + 300) / mean

    assert 1 - found.share == pytest.approx(lost(found.interval_seconds))
    assert lost(found.interval_seconds) < min(lost(found.interval_seconds * factor) for factor in (0.8, 1.25))


def test_links_of_a_group() -> None:
    cluster = replace(PRESETS["h800"], links_reached=1.0, inside_latency=0.0, network_latency=0.0)
    sent = 1e9
    assert seconds(cluster, Group(8, 1), TrafficPattern.ring, sent) == pytest.approx(sent / 200e9)
    over = seconds(cluster, Group(16, 1), TrafficPattern.all_to_all, sent)
    assert over == pytest.approx(sent * 8 / 15 / 50e9)  # to the eight ranks of the other node
    assert seconds(cluster, Group(16, 1), TrafficPattern.ring, sent) == pytest.approx(
        sent / 200e9
    )  # the eighth by network
    assert seconds(cluster, Group(4, 8), TrafficPattern.ring, sent) == pytest.approx(sent / 50e9)  # one rank a node
    assert seconds(cluster, Group(1, 1), TrafficPattern.ring, sent) == 0.0


def test_cluster_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("like: h800\nnetwork: 25e9\nmemory_gib: 64\n")
    found = find_cluster(str(path))
    assert (found.name, found.network, found.memory_gib) == ("ours", 25e9, 64.0)
    assert found.bfloat16 == PRESETS["h800"].bfloat16


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("like: a100\n", "`like`"),
        ("like: h800\nnetwork: fast\n", "network=fast"),
        ("like: h800\nspeed: 1\n", "a field"),
        ("network: 1e9\n", "lacks gpus_per_node"),
        ("- 1\n", "must have lines"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_wrong_cluster_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        find_cluster(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan.speed=1"], "unknown key 'plan.speed'; longcat plan has plan.ranks"),
        (["plan.ranks=x"], "plan.ranks=x must be a whole number"),
        (["plan.ranks=-1"], "plan.ranks=-1 must be at least 0"),
        (["plan.ranks=1000000007"], "plan.ranks=1000000007 must be at most 1000000"),
        (["plan.ranks=999983"], "which 999983 data-parallel ranks cannot share"),
        (["plan.restart_seconds=-1"], "plan.restart_seconds=-1.0 must be at least 0"),
        (["plan.save_seconds=nan"], "plan.save_seconds=nan must be a finite number"),
        (["plan.faults_per_gpu_year=inf"], "plan.faults_per_gpu_year=inf must be a finite number"),
        (["plan.ranks=3", "parallel.pp=2"], "does not give the 3 ranks"),
        (["plan.ranks=3", "train.global_batch_size=4"], "which 3 data-parallel ranks cannot share equally"),
        (["plan.cluster=none.yaml"], "plan.cluster=none.yaml is no file"),
    ],
)
def test_wrong_plan_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=debug", *arguments]) == BAD_INPUT
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_refused_layout_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=debug", "plan.ranks=8", "parallel.ep=3", "train.global_batch_size=8"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "parallel.ep=3 does not divide" in error and error.count("\n") == 1
    assert "the nearest layout that works: parallel.pp=1 parallel.cp=1 parallel.tp=1 parallel.ep=" in error


def test_help_names_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == OK
    assert capsys.readouterr().out.startswith("plan key=value")


def searched(overrides: Sequence[str]) -> tuple[list[str], list[tuple[bool, float]], dict[str, Any]]:
    """(the table, whether each layout on it fits with its step's seconds, the same as JSON)."""
    config, options = read([*COMMON, *overrides])
    found = search(config, options)
    fitting = [(one.fits(), one.times[1.0].seconds) for one in found.fitting]
    shown = lines(found, options, find_cluster(options.cluster).capacity)
    return shown, fitting, json.loads(search_as_json(found, "none"))


def test_search_ranks_what_fits() -> None:
    """One rank: three recomputations, of which two are traced."""
    overrides = ["plan.ranks=1", "plan.candidates=2", "model.num_layers=2", "train.global_batch_size=2"]
    ((shown, fitting, numbers),) = run_ranks(searched, 1, overrides, timeout=LONG)
    assert (numbers["refused"], numbers["too_large"], numbers["nearest"]) == (0, [], "none")
    assert [one["times"]["1.0"]["seconds"] for one in numbers["fitting"]] == [seconds for _, seconds in fitting]
    assert len(fitting) == 2 and all(fits for fits, _ in fitting)
    assert fitting == sorted(fitting, key=lambda one: one[1])
    assert max(map(len, shown)) <= 100
    assert shown[-2].startswith("The fastest: parallel.pp=1 parallel.fsdp=1")


def test_search_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It printed the table."""
    monkeypatch.setattr("launch.plan.search.search", lambda config, options: SearchResult([], [], 3, 1, "why"))
    monkeypatch.setattr("launch.plan.nearest.fitting_near", lambda config, options, cluster: "near")
    assert main(["plan", "search", "model=debug", "plan.ranks=2", "--json"]) == OK
    numbers = json.loads(capsys.readouterr().out)
    assert numbers == {
        "accepted": 3, "refused": 1, "refusal": "why", "nearest": "near", "fitting": [], "too_large": [],
    }  # fmt: skip


def test_plan_counts_the_ranks_of_all_nodes() -> None:
    config, _ = read([*COMMON, "launch.nodes=3", "launch.rendezvous=a:1", "run.num_processes=2"])
    assert num_ranks(config) == 6
    with pytest.raises(ConfigError, match="6 data-parallel ranks"):
        plan_or_nearest(config, PlanOptions())


def test_search_tries_every_axis() -> None:
    tried = [layout.parallel for layout in layouts(compose([*COMMON]), 8)]
    assert {one.ep for one in tried} == {1, 2, 4, 8}
    assert {one.pp for one in tried} == {1, 2}  # debug has two layers
    assert {one.tp for one in tried} == {one.cp for one in tried} == {1, 2, 4, 8}


def test_search_names_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    """Three GPUs cannot share two sequences: every layout is refused, the last with its reason."""
    arguments = ["model=debug", "plan.ranks=3", "train.global_batch_size=2", "model.num_layers=1"]
    assert main(["plan", "search", *arguments]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "layouts of 3 GPUs is possible; the last: " in error
    assert "the nearest layout that works: plan.ranks=2 parallel.pp=1" in error
    assert main(["plan", "search", "model=debug"]) == BAD_INPUT
    assert "add plan.ranks=N" in capsys.readouterr().err
