"""The run folder: checks, lock, config.yaml, and refusals before it has a run."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import sys
import time
import uuid
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from longcat.errors import ConfigError, FolderInUseError, LongCatError
from parallel.sizes import number_in_environment
from train.checkpoint.compatibility import CORPORA, TOKENIZER, differences, refusal
from train.checkpoint.failures import describe
from train.checkpoint.files import read_text, regular
from train.checkpoint.manifest import list_checkpoints
from train.config import Config
from train.data.corpus import fingerprints, tokenizer_sha256
from train.process.environment import software
from train.process.git import git_commit
from train.process.refusal import leave_refusal
from train.run_dir.exit_file import EXIT, write_exit
from train.run_dir.files import Note, write_file
from train.run_dir.sealed import is_yaml_changed, seal_yaml

CONFIG, LOCK = "config.yaml", ".lock"
FIRST_RANK_PRINTS_SECONDS = 20.0
PACKAGES = ("torch", "numpy", "megatron-core", "datasets", "tokenizers", "hydra-core", "wandb", "safetensors")


def check_folder(config: Config) -> None:
    """Make the run folder; refuse one that belongs to another run or cannot be written.

    The first rank of each machine tries to write, as machines may mount the folder differently; if it cannot, its
    launcher ends the machine's other ranks.

    Raises:
        ConfigError: with the differing keys; nothing in the folder has changed.
    """
    folder = config.run.folder
    try:
        check_not_another_run(config)
        folder.mkdir(parents=True, exist_ok=True)
        if number_in_environment("LOCAL_RANK", 0) == 0:
            probe = folder / f".probe-{uuid.uuid4().hex}"  # ranks of several hosts probe the same folder
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"run.dir={config.run.dir}: cannot write in {folder} ({error.strerror}); choose another run.dir"
        ) from error


def check_not_another_run(config: Config) -> None:
    """Raise ConfigError if the folder has a run that this one would mix with or overwrite."""
    folder = config.run.folder
    check_same_configuration(config)
    if config.checkpoint.resume == "never" and (
        list_checkpoints(folder / "checkpoints") or (folder / "metrics.jsonl").exists()
    ):
        raise ConfigError(
            f"{folder} already has a run, which checkpoint.resume=never would overwrite; choose another run.name"
        )


def check_same_configuration(config: Config) -> None:
    """Raise ConfigError if the folder has a run of another configuration."""
    folder = config.run.folder
    wrong = []
    if (folder / CONFIG).is_file():
        wrong = differences(read_config(folder), as_mapping(config) | describe_corpora(config))
    if wrong:
        raise ConfigError(refusal(f"{folder} belongs to another configuration, by its {CONFIG}", wrong))


def lock(folder: Path) -> IO[str]:
    """Lock the folder while the returned file is open; raises FolderInUseError if another run has it."""
    try:
        file = open(folder / LOCK, "a", opener=regular)  # noqa: SIM115  it is open as long as the run
    except OSError as error:
        raise ConfigError(
            f"{folder / LOCK} cannot be opened ({error.strerror}), so a second run would go unseen; make it writable "
            f"or choose another run.name"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise FolderInUseError(f"{folder} is in use by a running training; choose another run.name") from error
    except OSError as error:
        print(f"note: {folder} cannot be locked ({error.strerror}): do not start a second run in it", file=sys.stderr)
    return file


def as_mapping(config: Config) -> dict[str, Any]:
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def describe_corpora(config: Config) -> dict[str, Any]:
    """Fingerprints of the data, stored in config.yaml and checkpoints beside the configuration.

    Raises:
        ConfigError: a corpus is missing or damaged.
    """
    return {CORPORA: fingerprints(config.data.paths), TOKENIZER: tokenizer_sha256(config.data.paths)}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in a run folder's config.yaml.

    Raises:
        ConfigError: it cannot be read.
    """
    import yaml

    cure = (
        "restore it, or remove this file alone: the checkpoints hold the configuration too; or choose another run.name"
    )
    try:
        stored = yaml.safe_load(read_text(folder / CONFIG))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read ({describe(error)}); {cure}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{folder / CONFIG} is no configuration; {cure}")
    for section in fields(Config):
        if not isinstance(stored.get(section.name, {}), dict):
            raise ConfigError(f"{folder / CONFIG} is no configuration: {section.name} is no section; {cure}")
    return {str(key): value for key, value in stored.items()}


def read_unchanged_config(folder: Path) -> dict[str, Any]:
    """As `read_config`; raises ConfigError also where the file has changed since its run wrote it."""
    stored = read_config(folder)
    if is_config_changed(folder):
        raise ConfigError(f"{folder / CONFIG} has changed since its run wrote it; restore it, or name another run")
    return stored


def is_config_changed(folder: Path) -> bool:
    """Whether the text of a run folder's config.yaml is not the one that its run wrote."""
    return is_yaml_changed(read_text(folder / CONFIG, "replace"))


def initial_checkpoint(folder: Path) -> str:
    """The folder in ``checkpoint.resume`` of a run's config.yaml, or `auto`.

    Raises:
        ConfigError: it is gone, or config.yaml cannot be read.
    """
    settings = read_config(folder).get("checkpoint") if (folder / CONFIG).is_file() else None
    source = str(settings.get("resume", "auto")) if isinstance(settings, dict) else "auto"
    if source in ("auto", "never"):
        return "auto"
    if not Path(source).is_dir():
        raise ConfigError(
            f"{folder} has no checkpoint of its own and started from checkpoint.resume={source}, which is gone; name "
            f"its new path or another run.name"
        )
    return source


def write_config(config: Config, derived: dict[str, Any], device: str, world_size: int, note: Note) -> bool:
    """Write config.yaml: the resolved configuration, derived values and the environment.

    Returns whether it is written; a failure goes to ``note`` and leaves an older config.yaml as it is.
    """
    import yaml

    target = config.run.folder / CONFIG
    before = None
    if target.is_file() and is_config_changed(config.run.folder):
        note(f"{target} has changed since the run wrote it; it is written anew")
    elif target.is_file():
        before = read_config(config.run.folder).get("environment")
    started = before.get("started") if isinstance(before, dict) else None
    environment = {
        "started": started or datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        **software(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": device,
        "world_size": world_size,
    }
    tree = {
        **as_mapping(config),
        **describe_corpora(config),
        "environment": environment,
        "derived": derived,
    }
    return write_file(target, seal_yaml(yaml.safe_dump(tree, sort_keys=False)), note)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def refuse(folder: Path | None, error: LongCatError) -> int:
    """Print why a run does not start and return the exit code; under torchrun, which hides it, write exit.json too.

    A folder that has a run, or is in use, does not change. All ranks find the same error: the first one prints it,
    while the others wait for the launcher to end them.
    """
    if not is_first_rank():
        time.sleep(FIRST_RANK_PRINTS_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
    leave_refusal(error)
    if "RANK" in os.environ and folder is not None:
        record_refusal(folder, error)
    return error.exit_code


def record_refusal(folder: Path, error: LongCatError) -> None:
    """Write exit.json for a run that does not start, unless the folder has a run, is in use or cannot be written."""
    if (folder / CONFIG).exists():
        return
    with contextlib.suppress(OSError, ConfigError):  # the error is printed in any case
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            write_exit(folder / EXIT, error.exit_code, str(error))


def is_first_rank() -> bool:
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0
