"""`longcat generate`: text from a checkpoint or an export, with MTP drafts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from longcat.config import ModelConfig
from longcat.config_choices import check_choice
from longcat.errors import ConfigError
from longcat.generation import Generated, SamplingParams, generate
from longcat.model import LongCat
from parallel.device import fastest_dtype
from parallel.kernels import install
from train.checkpoint.offline_reader import Checkpoint, TensorSource, load_model
from train.config import ComputeDtype
from train.data.config import TOKENIZER_NAME, tokenizer_file
from train.data.tokens import end_of_document_id, load_tokenizer
from train.huggingface.config_json import CONFIG
from train.huggingface.import_folder import configuration_of
from train.huggingface.record import check_tokenizer
from train.huggingface.safetensors_folder import SafetensorsFolder


@dataclass
class GenerateOptions:
    """The options of `longcat generate`."""

    source: str = ""  # a checkpoint, a run folder or a Hugging Face folder
    prompt: str = ""  # empty = the start of a document
    max_tokens: int = 128  # most tokens to generate; the end of a document stops earlier
    temperature: float = 0.0  # 0 = always the most likely token
    top_p: float = 1.0  # nucleus sampling: the smallest set of tokens with this probability
    seed: int = 0  # of the sampler
    drafts: bool = True  # speculative decoding: each MTP layer drafts one token, one forward of the model verifies them
    dtype: ComputeDtype = ComputeDtype.auto  # compute type: bfloat16, float32 or auto, as train.dtype
    tokenizer: str = ""  # a tokenizer.json; empty = the one of the source

    def validate(self) -> None:
        if not self.source:
            raise ConfigError("say longcat generate source=CHECKPOINT prompt=TEXT")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")
        check_choice("dtype", self.dtype, ComputeDtype)
        self.sampling.validate()

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_p, self.seed)


def generate_text(options: GenerateOptions) -> tuple[str, Generated, float]:
    """(text after the prompt, its tokens and draft counts, seconds without loading)."""
    options.validate()
    model, tokenizer_path, end = load(options)
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ConfigError(
            f"{tokenizer_path} has {tokenizer.get_vocab_size()} ids and the model {model.config.vocab_size}; "
            f"give the model's own with tokenizer=FILE"
        )
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids or [end]
    started = time.perf_counter()
    generated = generate(model, prompt, options.max_tokens, options.sampling, end, options.drafts)
    seconds = time.perf_counter() - started
    return continuation(tokenizer, prompt, generated.tokens), generated, seconds


def continuation(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of ``tokens`` behind ``prompt``: some tokenizers drop the space at the start of what they decode."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *tokens]))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True)


def load(options: GenerateOptions) -> tuple[LongCat, Path, int]:
    """The model, on the first GPU or else the CPU, the path of its tokenizer, and the id that ends a document."""
    folder = Path(options.source)
    source: TensorSource
    config: ModelConfig
    if (folder / CONFIG).is_file():
        source = SafetensorsFolder(folder)
        config = configuration_of(source, [], training=False).model
        source.check(config)
        tokenizer = Path(tokenizer_file(options.tokenizer) or folder / TOKENIZER_NAME)
        if not options.tokenizer:
            check_tokenizer(folder, source.record)
        end = end_of_document_id(load_tokenizer(tokenizer), str(tokenizer))
    else:
        checkpoint = source = Checkpoint(folder)
        config = checkpoint.model
        tokenizer = checkpoint.tokenizer(options.tokenizer, "tokenizer")
        end = checkpoint.end_of_document(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    install(device)
    dtype = fastest_dtype() if options.dtype == ComputeDtype.auto else getattr(torch, options.dtype)
    return load_model(config, source, dtype, device), tokenizer, end


def summary(generated: Generated, seconds: float) -> str:
    """One line: number of tokens, time, accepted drafts."""
    text = f"{len(generated.tokens)} tokens in {seconds:.1f} s, {generated.forwards} forwards of the model"
    if generated.acceptance_rate is None:
        return f"{text}; no drafts"
    return f"{text}; {generated.accepted} of {generated.drafted} drafts accepted ({generated.acceptance_rate:.1%})"
