"""Imports: our exports and transformers' folders become checkpoints for any layout; text from all of them."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from launch.__main__ import main as longcat
from tests.support.exporting import SMALL, assert_close, our_logits, peer_of, run_command, some_tokens, weights
from tests.support.fixtures import Refused
from tests.support.lookalikes import lookalike
from tests.support.running import contents, lines, train_here, train_two
from train.checkpoint import streamed
from train.checkpoint.files import is_locked
from train.checkpoint.offline_reader import Checkpoint, full_box
from train.data.tokens import load_tokenizer
from train.huggingface import import_folder as import_module
from train.huggingface.import_folder import model_overrides
from train.huggingface.safetensors_folder import SafetensorsFolder


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "float32"
    run_command("export", f"source={checkpoint}", f"target={folder}", "export.dtype=float32", "export.shard_gib=0.0001")
    return folder


@pytest.fixture(scope="module")
def imported(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports") / "checkpoint"
    run_command("import", f"source={export}", f"target={folder}")
    return folder


@pytest.mark.parametrize("layout", ["released", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(layout: str, dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    """checkpoint → export → import → export: the two exports are the same files."""
    words = [f"export.layout={layout}", f"export.dtype={dtype}", "export.shard_gib=0.0001"]
    run_command("export", f"source={checkpoint}", f"target={tmp_path / 'first'}", *words)
    run_command("import", f"source={tmp_path / 'first'}", f"target={tmp_path / 'back'}")
    run_command("export", f"source={tmp_path / 'back'}", f"target={tmp_path / 'second'}", *words)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.pop("longcat.json") != second.pop("longcat.json")  # the counters restart
    assert first == second
    if dtype == "float32":
        original, back = weights(checkpoint), weights(tmp_path / "back")
        assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)


def test_import_reads_at_most_one_expert_at_a_time(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in exports, where the shards are as small."""
    boxes = []
    for kind in (SafetensorsFolder, Checkpoint):
        plain = kind.read

        def read(self: Any, name: str, shape: Any, box: Any, plain: Any = plain) -> torch.Tensor:
            boxes.append((name, box))
            return plain(self, name, shape, box)

        monkeypatch.setattr(kind, "read", read)
    monkeypatch.setattr(streamed, "FILE_BYTES", 20000)
    run_command("import", f"source={export}", f"target={tmp_path / 'in'}")
    assert len(list((tmp_path / "in").glob("*.distcp"))) > 20
    words = ["export.dtype=float32", "export.shard_gib=0.0001"]
    run_command("export", f"source={tmp_path / 'in'}", f"target={tmp_path / 'out'}", *words)
    experts = [box for name, box in boxes if ".experts." in name]
    assert len(experts) == 2 * 2 * 2 * 8 and all(stop - start == 1 for (start, stop), *_ in experts)
    expected = {name: value for name, value in contents(export).items() if name != "longcat.json"}
    assert expected.items() <= contents(tmp_path / "out").items()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("number", [0, 20, 40])
def test_failed_import_leaves_nothing_behind(
    number: int, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """In any thread; torch's writer continues when one of its threads has failed."""
    plain, calls = SafetensorsFolder.read, iter(range(1000))

    def read(self: Any, *arguments: Any) -> torch.Tensor:
        if next(calls) == number + 2:
            raise OSError("the disk is gone")
        return plain(self, *arguments)

    monkeypatch.setattr(SafetensorsFolder, "read", read)
    monkeypatch.setattr(streamed, "FILE_BYTES", 20000)
    refused(["import", f"source={export}", f"target={tmp_path / 'in'}"], "could not be written", "nothing is left")
    assert not list(tmp_path.iterdir())


def test_import_locks_its_target(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = import_module.write, []

    def write(tensors: dict[str, Any], folder: Path) -> None:
        seen.append(is_locked(folder))
        plain(tensors, folder)

    monkeypatch.setattr(import_module, "write", write)
    run_command("import", f"source={export}", f"target={tmp_path / 'in'}")
    assert seen == [True] and not is_locked(tmp_path / "in")


def test_import_is_at_step_0_and_keeps_the_controller(checkpoint: Path, imported: Path) -> None:
    source = Checkpoint(imported)
    assert source.counters == {"step": 0, "samples": 0, "tokens": 0, "data_start": 0}
    assert source.model == Checkpoint(checkpoint).model
    assert source.configuration["train"]["sequence_length"] == 32
    integral = torch.zeros(2, 8, dtype=torch.float64)
    moment = torch.ones(source.model.vocab_size, 32)
    dcp.load(
        {"controller/integral": integral, "exp_avg/lm_head.weight": moment},
        storage_reader=dcp.FileSystemReader(imported),
        no_dist=True,
    )
    for layer in range(2):
        bias = source.read(f"layers.{layer}.mlp.router.e_score_correction_bias", (12,), full_box((12,)))
        assert torch.equal(integral[layer].float(), bias[:8]) and bias.any()
    assert not moment.any()
    files = sum(path.stat().st_size for path in imported.glob("*.distcp"))
    assert files > 3 * 4 * sum(values.numel() for values in weights(imported).values())


def test_import_starts_alike_on_one_process_and_ep2(imported: Path, corpus: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.paths=[{corpus}]", f"run.dir={tmp_path}", f"checkpoint.resume={imported}", "train.steps=1"]
    assert train_here([*words, "run.name=one"]) == 0
    assert train_two([*words, "run.name=two", "parallel.ep=2"]) == [0]
    one, two = (lines(tmp_path / name)[0] for name in ("one", "two"))
    assert one["step"] == two["step"] == 1
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["loss"] < math.log(512) + 3
    exported_is_stored(tmp_path / "two" / "checkpoints" / "step-00000001", tmp_path / "out")


def exported_is_stored(checkpoint: Path, target: Path) -> None:
    """The export of a checkpoint whose experts several ranks have saved equals torch's own loading."""
    run_command("export", f"source={checkpoint}", f"target={target}", "export.dtype=float32")
    found = load_file(target / "model-00001-of-00001.safetensors")
    gate_up, norm = torch.empty(8, 32, 32), torch.empty(32)
    dcp.load(
        {"weight/layers.1.mlp.experts.gate_up": gate_up, "weight/norm.weight": norm},
        storage_reader=dcp.FileSystemReader(checkpoint),
        no_dist=True,
    )
    assert torch.equal(found["model.norm.weight"], norm)
    for expert in range(8):
        names = [f"model.layers.1.mlp.experts.{expert}.{matrix}_proj.weight" for matrix in ("gate", "up")]
        assert torch.equal(torch.cat([found[name] for name in names]), gate_up[expert])
    boxes = Checkpoint(checkpoint).boxes("layers.1.mlp.experts.gate_up", (8, 32, 32))
    assert [box[0] for box in boxes] == [(0, 4), (4, 8)], "each rank has saved its experts"


def test_folder_saved_by_transformers_is_imported(checkpoint: Path, export: Path, tmp_path: Path) -> None:
    """It has unused projections of identity experts, and no MTP."""
    tensors = {name: values for path in export.glob("*.safetensors") for name, values in load_file(path).items()}
    peer: Any = peer_of(Checkpoint(checkpoint).model, tensors)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert list((tmp_path / "theirs").glob("*-of-*.safetensors"))
    words = [f"source={tmp_path / 'theirs'}", f"target={tmp_path / 'ours'}", "model.expected_ffn_experts=2"]
    run_command("import", *words)
    model = Checkpoint(tmp_path / "ours").model
    assert (model.num_mtp_layers, model.expected_ffn_experts) == (0, 2.0)
    assert_close(our_logits(tmp_path / "ours", some_tokens()), peer(input_ids=some_tokens()).logits)
    back, original = weights(tmp_path / "ours"), weights(checkpoint)
    assert all(torch.equal(values, original[name]) for name, values in back.items())


def test_overrides_that_an_import_prints_train_it(imported: Path, corpus: Path, tmp_path: Path) -> None:
    words = model_overrides(Checkpoint(imported).model)
    run = [word for word in SMALL if not word.startswith("model")]
    paths = [f"data.paths=[{corpus}]", f"run.dir={tmp_path}", f"checkpoint.resume={imported}", "train.steps=1"]
    assert train_here([*words, *run, *paths]) == 0


def test_printed_commands_can_be_pasted_where_paths_have_spaces(
    imported: Path, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a shell makes of the line are the words that were meant."""
    folder = tmp_path / "a model (1)"
    for verb, source in (("import", export), ("grow", imported), ("merge", f"{imported},{folder / 'import'}")):
        run_command(verb, f"source={source}", f"target={folder / verb}")
        last = capfd.readouterr().out.splitlines()[-1]
        assert f"checkpoint.resume={folder / verb}" in shlex.split(last)


def changed(export: Path, folder: Path, name: str, change: Any) -> Path:
    """A copy of an export with one tensor changed, or removed (None), and its index."""
    shutil.copytree(export, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    after = change(tensors.pop(name))
    if after is None:
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors[name] = after.contiguous()
    save_file(tensors, path)
    return folder


def test_wrong_files_are_refused(export: Path, tmp_path: Path, refused: Refused) -> None:
    expert, target = "model.layers.1.mlp.experts.5.up_proj.weight", f"target={tmp_path / 'out'}"

    def attempt(source: Path, *fragments: str) -> None:
        refused(["import", f"source={source}", target], *fragments)

    attempt(changed(export, tmp_path / "a", expert, lambda values: None), "lacks", expert)
    attempt(changed(export, tmp_path / "b", expert, lambda values: values.T), expert, "[32, 16]", "[16, 32]")
    attempt(changed(export, tmp_path / "c", expert, lambda values: values.to(torch.float8_e4m3fn)), expert, "F8_E4M3")
    embedding = "model.mtp.embed_tokens.weight"
    own = changed(export, tmp_path / "d", embedding, lambda values: values + 1)
    attempt(own, embedding, "model.num_mtp_layers=0")

    shutil.copytree(export, tmp_path / "e")
    sorted((tmp_path / "e").glob("*.safetensors"))[3].unlink()
    attempt(tmp_path / "e", "missing or damaged")
    attempt(tmp_path / "nowhere", "does not exist", "hf download OWNER/NAME")
    attempt(export / "config.json", "is no folder", "name the folder")
    attempt(export.parent, "has neither")
    refused(["import", f"source={export}"], "target=CHECKPOINT")
    refused(["import", f"source={export}", f"target={tmp_path / 'a'}"], "not overwritten")
    step = f"target={tmp_path / 'step-00000500'}"
    refused(["import", f"source={export}", step], "names another step", "so step-00000000")
    refused(["import", f"source={export}", target, "model.num_experts=9"], "lacks")
    refused(["import", f"source={export}", target, "model.no_such=9"], "unknown key")
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob("step*"))
    run_command("import", f"source={own}", target, "model.num_mtp_layers=0")


def test_files_without_contents_are_refused(export: Path, checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    """A clone without Git LFS, pipes, and a tokenizer that is none or of another model."""
    target = f"target={tmp_path / 'out'}"
    refused(["import", f"source={checkpoint}", target], "needs no import", f"checkpoint.resume={checkpoint}")
    shutil.copytree(export, tmp_path / "copy")
    source = f"source={tmp_path / 'copy'}"

    def attempt(file: Path, text: str | None, *fragments: str, words: tuple[str, ...] = ()) -> None:
        before = file.read_bytes()
        file.unlink()
        os.mkfifo(file) if text is None else file.write_text(text)
        refused(["import", source, target, *words], file.name, *fragments)
        file.unlink()
        file.write_bytes(before)

    shard = sorted((tmp_path / "copy").glob("*.safetensors"))[0]
    attempt(shard, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull")
    attempt(shard, None, "is no regular file")
    attempt(tmp_path / "copy" / "config.json", None, "it is no regular file")
    (tmp_path / "copy" / "longcat.json").unlink()
    tokenizer, budget = tmp_path / "copy" / "tokenizer.json", ("model.expected_ffn_experts=2",)
    attempt(tokenizer, "{}", "is not a tokenizer.json", words=budget)
    larger = load_tokenizer(tokenizer)
    larger.add_tokens(["one more"])
    attempt(tokenizer, larger.to_str(), "has 513 ids and the model 512", words=budget)
    refused(["import", source, target, *budget, f"data.tokenizer={tmp_path}/no.json"], "no.json does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field,value,fragments",
    [
        ("model_type", "llama", "longcat_flash"),
        ("mla_scale_q_lora", False, "mla_scale_q_lora"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("zero_expert_type", "copy", "zero_expert_type"),
        ("rope_scaling", {"type": "yarn", "factor": 4}, "yarn"),
        ("num_layers", 3, "num_layers is 3 and was 2"),
        ("num_layers", 1, "num_layers is 1 and was 2"),
        ("hidden_size", 64, "hidden_size is 64 and was 32"),
        ("qk_rope_head_dim", 7, "head_dim is 8; the other sizes make it 7 or 23"),
        ("n_routed_experts", None, "n_routed_experts is None; it must be a whole number"),
        ("n_routed_experts", 0, "n_routed_experts must be at least 1"),
        ("zero_expert_num", -8, "zero_expert_num not negative"),
        ("num_attention_heads", True, "num_attention_heads is True; it must be a whole number"),
        ("rope_theta", "x", "rope_theta is 'x'; it must be a number"),
        ("rope_theta", float("nan"), "rope_theta is nan; it must be a number"),
        ("rope_scaling", "linear", "rope_scaling is 'linear'; it must be an object or null"),
        ("max_position_embeddings", -5, "max_position_embeddings is -5; it must not be negative"),
        ("max_position_embeddings", "many", "max_position_embeddings is 'many'; it must be a whole number"),
        ("moe_topk", "3", "moe_topk is '3'; it must be a whole number"),
    ],
)
def test_a_config_of_another_model_is_refused(
    field: str, value: Any, fragments: str, export: Path, tmp_path: Path, refused: Refused
) -> None:
    shutil.copytree(export, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(["import", f"source={tmp_path / 'source'}", f"target={tmp_path / 'out'}"], fragments)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"num_layers": 3}, "lacks"),
        ({"num_layers": 1}, "unknown"),
        ({"hidden_size": 64}, "asks for"),
        ({"qk_rope_head_dim": 7, "head_dim": 7, "qk_head_dim": 23}, "even"),
    ],
)
def test_sizes_of_other_weights_are_refused(
    changes: dict[str, Any], fragment: str, export: Path, tmp_path: Path, refused: Refused
) -> None:
    """By names and shapes, where no record says what was exported."""
    source = lookalike(export, tmp_path / "source", changes)
    words = [f"source={source}", f"target={tmp_path / 'out'}", "model.expected_ffn_experts=2"]
    refused(["import", *words], fragment)


def test_text_of_run_checkpoint_and_export_is_equal(
    checkpoint: Path, imported: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for source in (checkpoint.parents[1], checkpoint, imported, export):
        words = [f"source={source}", "prompt=def main(", "max_tokens=24", "dtype=float32"]
        assert longcat(["generate", *words]) == 0
        text, _, summary = capsys.readouterr().out.rstrip().rpartition("\n")
        assert text.startswith("def main(") and "drafts accepted (" in summary
        said.append(text)
        assert longcat(["generate", *words, "drafts=false"]) == 0
        plain, _, summary = capsys.readouterr().out.rstrip().rpartition("\n")
        assert plain == text and "no drafts" in summary
    assert len(set(said)) == 1


def test_wrong_options_of_generate_are_refused(export: Path, refused: Refused) -> None:
    source = f"source={export}"
    refused(["generate"], "source=CHECKPOINT")
    refused(["generate", source, "max_tokens=0"], "max_tokens=0")
    refused(["generate", source, "max_token=3"], "'max_tokens'")
    for value in ("-1", "nan", "inf", "1e-320"):
        refused(["generate", source, f"temperature={value}"], f"temperature={value}", "must be 0")
    for value in ("99999999999999999999999", "-99999999999999999999999"):
        refused(["generate", source, f"seed={value}"], f"seed={value}", "64 bits")
    for value in ("1000000000000", "1" + "0" * 30):
        refused(["generate", source, f"max_tokens={value}"], f"max_tokens={value}", "lower it")
    refused(["generate", source, "drafts=maybe"], "true or false")
    refused(["generate", source, "dtype=int8"], "bfloat16")
    refused(["generate", source, "tokenizer=nowhere.json"], "nowhere.json")
