"""`longcat transfer`: Table 1 by hand, what it leaves open, what is refused, and a target that trains."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml

from launch.__main__ import main as longcat
from launch.sweeps.folder import note_finished
from launch.sweeps.sweep import Result, best_run
from longcat.config import ModelConfig
from longcat.init import initialise
from longcat.json_text import dumps
from longcat.model import LongCat
from longcat.names import stored_state
from longcat.roles import RULES, TRAINED, Role, role, writes_to_residual
from parallel.state_store import ShardedAdamW
from tests.support.fixtures import Refused
from tests.support.running import run_cleanly
from train.compose import compose
from train.config import Config
from train.optimizer import RateScales, make_adamw
from train.run_dir.exit_file import EXIT
from train.run_dir.folder import CONFIG, as_mapping
from train.transfer import CARRIED, CONSTANT, DEPTH, PROPORTIONAL, SPARSITY

# Sizes of a proxy; a width s times as large has s times the heads, ranks and inner widths
SIZES = {
    "hidden_size": 64, "num_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "ffn_hidden_size": 96,
    "expert_hidden_size": 32,
}  # fmt: skip
RATES = [
    "optim.lr=2e-3", "optim.lr_scale.router=0.5", "optim.lr_scale.expert=2", "optim.weight_decay=0.05",
    "optim.eps=1e-12", "model.hidden_std=0.04", "model.embedding_std=0.3",
]  # fmt: skip
TARGET = "conf/experiment/debug-from-proxy.yaml"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes below the current folder."""
    monkeypatch.chdir(tmp_path)


def sizes(width: int) -> list[str]:
    return ["model=debug", *(f"model.{name}={size * width}" for name, size in SIZES.items())]


def finished(folder: Path, overrides: list[str], code: int = 0) -> Config:
    """A run folder as a run of these overrides leaves it, without training."""
    config = compose(overrides)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(yaml.safe_dump(as_mapping(config)))
    (folder / EXIT).write_text(dumps({"code": code, "message": ""}))
    return config


def transferred(width: int, *words: str) -> Config:
    """The target of ``width`` times the proxy's width, as `longcat train` reads it."""
    assert longcat(["transfer", "proxy=runs/proxy", *sizes(width), *words]) == 0
    return compose(["experiment=debug-from-proxy"])


def built(config: Config) -> LongCat:
    model = LongCat(config.model)
    initialise(model, config.model, seed=0)
    return model


def measured_scales(model: LongCat) -> dict[str, float]:
    """The standard deviation of the initial values by role, without the matrices that write to the residual stream."""
    values = defaultdict(list)
    for name, tensor in stored_state(model):
        if not writes_to_residual(name):
            values[role(name)].append(tensor.detach().flatten())
    return {kind: float(torch.cat(parts).std()) for kind, parts in values.items()}


def rates_and_decays(model: LongCat, config: Config) -> dict[str, tuple[float, float]]:
    """(rate, weight decay) that AdamW has for each role, by the names that the engines group parameters by."""
    members = defaultdict(list)
    for name, parameter in model.named_parameters():
        members[role(name).value].append(parameter)
    optimizer = make_adamw([{"params": each, "role": kind} for kind, each in members.items()], config.optim)
    assert all(group["eps"] == config.optim.eps for group in optimizer.param_groups)
    return {group["role"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}


def test_scales_and_rates_at_four_times_the_width_by_hand() -> None:
    """Every number here is computed by hand from the proxy's and s = 4; variance ÷ 4 is a scale ÷ 2."""
    finished(Path("runs/proxy"), [*sizes(1), *RATES])
    config = transferred(4)
    model = built(config)
    scales = measured_scales(model)
    by_hand = {"embedding": 0.3, "hidden": 0.02, "expert": 0.02, "head": 0.02, "router": 0.02}
    for kind, scale in by_hand.items():
        assert scales[kind] == pytest.approx(scale, rel=0.03), kind
    assert scales["norm"] == 0.0 and scales["bias"] == 0.0
    groups = rates_and_decays(model, config)
    assert groups == {
        "embedding": (2e-3, 0.0),
        "hidden": (pytest.approx(5e-4), pytest.approx(0.2)),
        "expert": (pytest.approx(1e-3), pytest.approx(0.2)),
        "head": (pytest.approx(5e-4), pytest.approx(0.2)),
        "router": (pytest.approx(2.5e-4), 0.0),
        "norm": (2e-3, 0.0),
    }
    assert config.optim.eps == pytest.approx(2.5e-13)


def test_a_step_takes_the_same_share_of_a_weight_at_each_width() -> None:
    """Decoupled decay shrinks weights by rate × decay: the product stays."""
    proxy = finished(Path("runs/proxy"), [*sizes(1), *RATES])
    wide = transferred(2)
    narrow, wider = (rates_and_decays(built(config), config) for config in (proxy, wide))
    for kind in ("hidden", "expert", "head"):
        assert wider[kind][0] * wider[kind][1] == pytest.approx(narrow[kind][0] * narrow[kind][1])


def test_two_transfers_in_a_row_are_one() -> None:
    finished(Path("runs/proxy"), [*sizes(1), *RATES])
    once = transferred(4)
    assert longcat(["transfer", "proxy=runs/proxy", *sizes(2), "target=conf/experiment/half.yaml"]) == 0
    finished(Path("runs/half"), ["experiment=half"])
    assert longcat(["transfer", "proxy=runs/half", *sizes(4), "target=conf/experiment/full.yaml"]) == 0
    twice = compose(["experiment=full"])
    assert twice.optim == once.optim and twice.model == once.model


def test_the_same_width_changes_nothing() -> None:
    """So no rule has a hidden constant; γ, selection biases' gains and the other sections are carried whole."""
    proxy = finished(Path("runs/proxy"), [*sizes(1), *RATES, "balance.kp=0.5", "schedule=cosine", *COSINE])
    target = transferred(1)
    for section in ("model", "loss", "balance", "optim", "schedule", "train", "data"):
        assert asdict(getattr(target, section)) == asdict(getattr(proxy, section)), section


COSINE = ["schedule.decay_steps=300"]


def test_each_role_is_named_once() -> None:
    """The optimizer has a rate for each trained role, every parameter has one, and roles that share a key agree."""
    assert [field.name for field in fields(RateScales)] == [kind.value for kind in TRAINED]
    model = built(compose(sizes(1)))
    assert {role(name) for name, _ in model.named_parameters()} == set(TRAINED)
    assert {role(name) for name, _ in stored_state(model)} == set(Role)
    variances = defaultdict(set)
    for rule in RULES.values():
        variances[rule.initial].add(rule.variance)
    assert all(len(found) == 1 for found in variances.values())


def test_every_value_says_where_it_comes_from() -> None:
    finished(Path("runs/proxy"), [*sizes(1), *RATES])
    transferred(4, "train.steps=70", "parallel.recompute=full")
    text = Path(TARGET).read_text()
    assert text.startswith("# @package _global_\n# debug with the hyperparameters of runs/proxy")
    assert "s = 256 / 64 = 4" in text
    lines = {line.strip().partition(":")[0]: line for line in text.splitlines()}
    assert lines["hidden_std"].endswith("# 0.04 ÷ √s (Table 1: initial variance)")
    assert lines["router"].endswith("# 0.5 ÷ s (not in Table 1)")
    assert lines["lr"].endswith("# as runs/proxy")
    for key in ("steps", "recompute", "num_heads"):
        assert lines[key].endswith("# given on the command line")
    body = text[text.index("\nmodel:") + 1 :].splitlines()
    assert all(line.rstrip().endswith(":") or "  # " in line for line in body)


DIFFERENT = {
    "depth": "model.num_layers=3",
    "sparsity": "model.num_experts=16",
    "batch": "train.global_batch_size=16",
    "shape": "model.expert_hidden_size=32",
    "vocabulary": "model.vocab_size=512",
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_other_differences_are_refused_unless_allowed(kind: str, refused: Refused) -> None:
    finished(Path("runs/proxy"), sizes(1))
    words = ["transfer", "proxy=runs/proxy", *sizes(2), DIFFERENT[kind]]
    key = DIFFERENT[kind].partition("=")[0]
    refused(words, key, "Table 1 carries rates over widths only", f"transfer.allow={kind}")
    assert not Path(TARGET).exists()
    assert longcat([*words, f"transfer.allow={kind}"]) == 0
    assert f"Allowed to differ, although no rule carries rates over it: {kind}." in Path(TARGET).read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "needs proxy=RUN"),
        (["proxy=runs/proxy"], "needs model=TARGET"),
        (["proxy=runs/none", "model=debug"], "proxy=runs/none has no config.yaml"),
        (["proxy=runs/proxy", *sizes(2), "transfer.allow=width"], "transfer.allow=width is not known"),
        (["proxy=runs/proxy", *sizes(2), "experiment=quickstart"], "experiment= sets rates of its own"),
        (["proxy=runs/proxy", *sizes(2), "target=elsewhere.yaml"], "must be DIR/experiment/NAME.yaml"),
        (["proxy=runs/proxy", *sizes(2), "target=conf/experiment/quickstart.yaml"], "built-in choice"),
        (["proxy=runs/proxy", *sizes(2), "optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["proxy=runs/stopped", *sizes(2)], "proxy=runs/stopped ended with exit code 3"),
        (["proxy=runs/running", *sizes(2)], "proxy=runs/running has not ended"),
        (["proxy=runs/early", *sizes(2)], "proxy=runs/early was stopped early"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], part: str, refused: Refused) -> None:
    finished(Path("runs/proxy"), sizes(1))
    finished(Path("runs/stopped"), sizes(1), code=3)
    finished(Path("runs/running"), sizes(1))
    Path("runs/running", EXIT).unlink()
    finished(Path("runs/early"), sizes(1))
    Path("runs/early", EXIT).write_text(dumps({"code": 0, "message": "stopped", "stopped_early": {"step": 1}}))
    refused(["transfer", *words], part)
    assert not list(Path().glob("conf/experiment/*"))


def test_stages_go_along_and_other_ones_are_refused(refused: Refused) -> None:
    stages = "data.stages=[{start_tokens: 1000000, sequence_length: 64, rope_theta: 5e6}]"
    finished(Path("runs/proxy"), [*sizes(1), stages])
    assert transferred(2).data.stages == compose([stages]).data.stages
    other = ["transfer", "proxy=runs/proxy", *sizes(4), "target=conf/experiment/other.yaml"]
    words = [*other, stages.replace("1000000", "2000000")]
    refused(words, "data.stages is not the proxy's", "Table 1 carries rates over widths only", "transfer.allow=batch")
    assert longcat([*other, stages]) == 0


def test_a_target_is_not_overwritten(refused: Refused) -> None:
    finished(Path("runs/proxy"), sizes(1))
    transferred(2)
    refused(["transfer", "proxy=runs/proxy", *sizes(2)], f"{TARGET} exists")


def test_the_best_run_of_a_sweep_by_its_mean_over_seeds(tmp_path: Path) -> None:
    """The lowest single loss is of a rate whose other seed is bad; a failed run and one without a loss do not count."""
    losses = {(1e-3, 0): 3.0, (1e-3, 1): 3.1, (2e-3, 0): 2.5, (2e-3, 1): 9.0, (4e-3, 0): 0.1, (8e-3, 0): float("nan")}
    folder = Path("runs/rates-sweep")
    folder.mkdir(parents=True)
    for number, ((rate, seed), loss) in enumerate(losses.items()):
        run = Path(f"runs/rates-{number}")
        code = 4 if rate == 4e-3 else 0
        finished(run, [*sizes(1), f"optim.lr={rate}", f"train.seed={seed}"], code)
        (run / "metrics.jsonl").write_text(dumps({"step": 1, "loss": loss}) + "\n")
        (folder / f"{number}.json").write_text(dumps(asdict(Result(str(run), code, "", ""))))
    assert best_run(folder) == Path("runs/rates-0").absolute()
    assert longcat(["transfer", "proxy=runs/rates-sweep", *sizes(2)]) == 0
    assert compose(["experiment=debug-from-rates-0"]).optim.lr == 1e-3


def test_the_header_says_what_the_best_run_is_best_of(capsys: pytest.CaptureFixture[str]) -> None:
    """A better run may come where a sweep has not finished: the command says so too."""
    folder = Path("runs/rates-sweep")
    folder.mkdir(parents=True)
    finished(Path("runs/rates-0"), sizes(1))
    Path("runs/rates-0/metrics.jsonl").write_text(dumps({"step": 1, "loss": 3.0}) + "\n")
    (folder / "0.json").write_text(dumps(asdict(Result("runs/rates-0", 0, "", ""))))
    (folder / "1.json").write_text(dumps(asdict(Result("runs/rates-1", None, "", ""))))
    for name, is_done in (("early", False), ("late", True)):
        note_finished(folder, [], is_done)
        target = Path(f"conf/experiment/{name}.yaml")
        assert longcat(["transfer", "proxy=runs/rates-sweep", f"target={target}", *sizes(2)]) == 0
        sentence = "of the 1 runs of runs/rates-sweep that reached their last step"
        sentence += "" if is_done else "; the sweep has not finished"
        assert f"# The proxy: lowest loss, by the mean over seeds, {sentence}.\n" in target.read_text()
        assert f"{sentence}\n" in capsys.readouterr().out


def test_model_keys_that_are_no_sizes_are_the_proxys() -> None:
    """Found by looking: a proxy's RoPE base gave way to the preset's, without a word."""
    given = ["model.rope_theta=1e4", "model.rope_scaling={factor: 4, original_max_position_embeddings: 32}"]
    proxy = finished(Path("runs/proxy"), [*sizes(1), *given, "model.rms_norm_eps=1e-3", "model.latent_norm_eps=1e-4"])
    target = transferred(2, "model.latent_norm_eps=1e-2")
    assert (target.model.rope_theta, target.model.rope_scaling) == (1e4, proxy.model.rope_scaling)
    assert (target.model.rms_norm_eps, target.model.latent_norm_eps) == (1e-3, 1e-2)
    assert "rope_theta: 10000.0  # as runs/proxy\n" in Path(TARGET).read_text()
    scaled = {rule.initial.value for rule in RULES.values()}
    known = {"name", "hidden_size", "vocab_size", *DEPTH, *SPARSITY, *CONSTANT, *PROPORTIONAL, *CARRIED, *scaled}
    assert {field.name for field in fields(ModelConfig)} <= known, "a key of the model that a transfer would lose"


def test_proxy_768_to_the_560b_model(capsys: pytest.CaptureFixture[str]) -> None:
    finished(Path("runs/proxy"), ["model=proxy_768", "optim.lr=3e-3"])
    assert longcat(["transfer", "proxy=runs/proxy", "model=flash"]) == 0
    capsys.readouterr()
    assert longcat(["counts", "experiment=flash-from-proxy"]) == 0
    assert "560.66B" in capsys.readouterr().out
    config = compose(["experiment=flash-from-proxy"])
    assert config.optim.lr == 3e-3 and config.optim.lr_scale == RateScales(1, 0.125, 0.125, 0.125, 0.125, 1)
    assert config.model.hidden_std == pytest.approx(0.02 / 8**0.5) and config.model.embedding_std == 0.02


def test_a_finished_run_carried_to_twice_its_width_trains(overrides: list[str], tmp_path: Path) -> None:
    narrow = [*overrides, "model.expert_hidden_size=24", "train.steps=2", "optim.lr=4e-3"]
    assert run_cleanly(lambda: longcat(["train", *narrow])) == 0
    doubled = ["model=debug", "model.vocab_size=512", "model.hidden_size=64", "model.num_heads=8"]
    doubled += ["model.q_lora_rank=96", "model.kv_lora_rank=64", "model.ffn_hidden_size=96"]
    doubled += ["model.expert_hidden_size=48", f"run.dir={tmp_path}"]
    assert longcat(["transfer", f"proxy={tmp_path}/run", *doubled]) == 0
    words = ["train", "experiment=debug-from-run", "validation.documents=0", "logging.wandb=disabled"]
    assert run_cleanly(lambda: longcat(words)) == 0
    assert len((tmp_path / "debug-from-run" / "metrics.jsonl").read_text().splitlines()) == 2


EDITED = {
    "section": ("model", 5, "model is no section"),
    "list": ("train", [1], "train is no section"),
    "size": ("model", {"hidden_size": "wide"}, "hidden_size"),
    "negative": ("model", {"num_layers": -1}, "model.num_layers=-1 must be above 0"),
    "unknown-size": ("model", {"depth": 3}, "depth"),
    "rate": ("optim", {"lr": "fast"}, "lr"),
    "rates": ("optim", {"lr_scale": 3}, "RateScales"),
}


@pytest.mark.parametrize("case", EDITED)
def test_proxy_of_a_wrong_configuration_is_refused(case: str, refused: Refused) -> None:
    section, value, part = EDITED[case]
    finished(Path("runs/proxy"), sizes(1))
    path = Path("runs/proxy/config.yaml")
    stored = yaml.safe_load(path.read_text())
    stored[section] = {**stored[section], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(stored))
    refused(["transfer", "proxy=runs/proxy", *sizes(2)], "runs/proxy/config.yaml", part)


def test_last_of_two_models_is_the_target(tmp_path: Path) -> None:
    """As everywhere: of a key that is given twice the last value counts."""
    finished(Path("runs/proxy"), sizes(1))
    assert longcat(["transfer", "proxy=runs/proxy", "model=tiny", *sizes(2), "target=conf/experiment/a.yaml"]) == 0
    assert "override /model: debug" in Path("conf/experiment/a.yaml").read_text()


def test_engines_group_parameters_by_these_roles() -> None:
    """The store that training uses asks for the same groups as the tests above."""
    config = compose(sizes(1))
    groups: list[dict[str, object]] = []

    def keep(given: list[dict[str, object]]) -> torch.optim.AdamW:
        groups.extend(given)
        return make_adamw(given, config.optim)

    class OneRank:
        holds_first_replica = True

    ShardedAdamW([built(config)], OneRank(), keep)  # type: ignore[arg-type]
    assert {group["role"] for group in groups} == {kind.value for kind in TRAINED}
