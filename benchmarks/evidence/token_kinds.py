"""FFN experts by kind of token: what is registered, the kinds of Python's text, and the measurement of a finished run.

The model is that of an arm of another claim, at its end; `docs/evidence/token_kinds.yaml` says which. `Runner` measures
each of these runs as soon as it has ended, because the checkpoints are not kept with the results.
"""

from __future__ import annotations

import io
import json
import keyword
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from benchmarks.evidence.claims import FOLDER, Comparison, Expectation, load
from benchmarks.evidence.jobs import Job
from benchmarks.evidence.looks import judged_job
from benchmarks.evidence.measures import Interval, Verdict, interval, judge
from benchmarks.evidence.routing import chosen_experts
from longcat.json_text import dumps

if TYPE_CHECKING:
    from longcat.model import LongCat

NAME = "token_kinds"
RESULTS = FOLDER / NAME
LEVEL = 0.95  # confidence of the intervals
KINDS = ("function word", "other word", "keyword", "name", "number", "punctuation", "space")
PROSE = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
WORDS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d[\w.]*|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Registered:
    """docs/evidence/token_kinds.yaml."""

    tree: dict[str, Any]

    @cached_property
    def function_words(self) -> frozenset[str]:
        return frozenset(self.tree["function_words"].split())

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return tuple(Comparison(*one["kinds"], NAME, Expectation(one["expect"])) for one in self.tree["compare"])

    def jobs(self) -> list[Job | None]:
        """The measured run of each seed; None while its tuned value is not known."""
        claim = load()[self.tree["claim"]]
        return [judged_job(claim, self.tree["arm"], seed) for seed in range(1, self.tree["seeds"] + 1)]

    def results(self) -> list[dict[str, Any]]:
        """What was measured up to now, by seed."""
        paths = [RESULTS / f"{job.key}.json" for job in self.jobs() if job]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

    def wants(self, job: Job) -> bool:
        """Whether this run is to be measured and is not yet."""
        return any(job.key == one.key for one in self.jobs() if one) and not (RESULTS / f"{job.key}.json").is_file()

    def found(self) -> list[tuple[Interval, str]]:
        """Interval and verdict of each comparison, in FFN experts a token."""
        results = self.results()
        found = []
        for one in self.comparisons:
            numbers = [result["kinds"][one.first]["mean"] - result["kinds"][one.second]["mean"] for result in results]
            bounds = interval(numbers, LEVEL)
            found.append((bounds, judge(one, bounds) if len(numbers) == self.tree["seeds"] else Verdict.UNFINISHED))
        return found

    def verdict(self) -> str:
        """One word: shown where all comparisons are, refuted where one is."""
        verdicts = {verdict for _, verdict in self.found()}
        return next(
            one for one in (Verdict.UNFINISHED, Verdict.REFUTED, Verdict.NOT_SHOWN, Verdict.SHOWN) if one in verdicts
        )


@cache
def registered() -> Registered:
    return Registered(yaml.safe_load((FOLDER / f"{NAME}.yaml").read_text(encoding="utf-8")))


def kinds_of_characters(source: str) -> list[str] | None:
    """The kind of each character of Python code; None if Python cannot split it into tokens."""
    starts = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    kinds = ["space" if character.isspace() else "punctuation" for character in source]
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    for token in tokens:
        first, last = (int(starts[row - 1]) + column for row, column in (token.start, token.end))
        if token.type in PROSE:
            for start, stop, kind in kinds_of_prose(source[first:last]):
                kinds[first + start : first + stop] = [kind] * (stop - start)
        elif token.type in (tokenize.NAME, tokenize.NUMBER):
            is_name = token.type == tokenize.NAME
            kind = ("keyword" if keyword.iskeyword(token.string) else "name") if is_name else "number"
            kinds[first:last] = [kind] * (last - first)
    return kinds


def kinds_of_prose(text: str) -> Iterator[tuple[int, int, str]]:
    """(first character, the one after the last, kind) of the words, numbers, signs and spaces of a text."""
    for match in WORDS.finditer(text):
        word = match.group()
        if word.isspace():
            kind = "space"
        elif word[0].isdigit():
            kind = "number"
        elif word[0].isalpha():
            kind = "function word" if word.lower() in registered().function_words else "other word"
        else:
            kind = "punctuation"
        yield match.start(), match.end(), kind


def kinds_of_tokens(source: str, offsets: list[tuple[int, int]]) -> list[str] | None:
    """The kind of each token by its (first character, the one after its last); None as for `kinds_of_characters`."""
    characters = kinds_of_characters(source)
    if characters is None:
        return None
    return [
        next((kind for kind in characters[start:stop] if kind != "space"), "space") if stop > start else "punctuation"
        for start, stop in offsets
    ]


def measure(job: Job) -> None:
    """Store the FFN experts by kind of token of a run that has ended, from its last checkpoint."""
    import torch

    from train.checkpoint.offline_reader import Checkpoint, load_model
    from train.data.tokens import load_tokenizer

    checkpoint = Checkpoint(job.folder)
    model = load_model(checkpoint.model, checkpoint, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(checkpoint.tokenizer("", "tokenizer"))
    numbers: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    length = job.config.train.sequence_length
    for ids, kinds in documents(job, tokenizer):
        for start in range(0, min(len(ids), length * registered().tree["windows"]), length):
            by_token = ffn_experts(model, ids[start : start + length])
            for kind, one in zip(kinds[start : start + length], by_token, strict=True):
                numbers[kind].append(one)
    found = {kind: np.array(rows) for kind, rows in numbers.items() if rows}
    every = np.concatenate(list(found.values()))
    result = {
        "key": job.key,
        "seed": job.seed,
        "chosen": checkpoint.model.top_k,
        "all": summary(every),
        "kinds": {kind: summary(rows) for kind, rows in found.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{job.key}.json"
    part = path.with_suffix(".partial")
    part.write_text(dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def ffn_experts(model: LongCat, ids: np.ndarray) -> np.ndarray:
    """FFN experts among the chosen ones of each token of one text, int64 [tokens, layers]."""
    return (chosen_experts(model, ids[None]) < model.config.num_experts).sum(-1).T


def documents(job: Job, tokenizer: Any) -> Iterator[tuple[np.ndarray, list[str]]]:
    """(token ids, kinds) of validation documents that are Python and that the tokenizer makes the same ids of again."""
    from train.data.samples import TokenSamples
    from train.samples import index_folders

    config = job.config
    samples = TokenSamples(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=job.seed,
        vocab_size=config.model.vocab_size,
        split="validation",
        cache_dir=index_folders(config)[0],
    )
    for ids in samples.validation_documents(registered().tree["documents"]):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        encoded = tokenizer.encode(text, add_special_tokens=False)
        kept = ids[: len(encoded.ids)]
        kinds = kinds_of_tokens(text, encoded.offsets) if np.array_equal(kept, encoded.ids) else None
        if kinds:
            yield kept, kinds


def summary(rows: np.ndarray) -> dict[str, Any]:
    """FFN experts, [tokens, layers]: their mean, the deviation between a layer's tokens, and the mean of each layer."""
    return {
        "tokens": len(rows),
        "mean": round(float(rows.mean()), 4),
        "deviation": round(float(rows.std(0).mean()), 4),
        "layers": [round(float(one), 4) for one in rows.mean(0)],
    }


def section(drawn: bool) -> list[str]:
    """Lines of the page: the comparisons, and each kind's mean and spread over seeds. ``drawn``: it has a picture."""
    tree, results = registered().tree, registered().results()
    lines = [f"## {tree['title']}", ""]
    lines += [
        f"**{registered().verdict().capitalize()}.** In the report: {tree['report']}. {tree['equal'].strip()}",
        "",
    ]
    lines += [f"Measured: {tree['measure'].strip()}", ""]
    if drawn:
        lines += [f"![FFN experts by kind of token](images/evidence/{NAME}.png)", ""]
    lines += ["| difference | expected | mean, FFN experts | interval | seeds | verdict |", "|---|---|---|---|---|---|"]
    for one, (bounds, verdict) in zip(registered().comparisons, registered().found(), strict=True):
        numbers = ["", ""]
        if bounds.seeds > 1:
            numbers = [f"{bounds.mean:+.3f}", f"{bounds.low:+.3f} to {bounds.high:+.3f}"]
        row = [f"{one.first} − {one.second}", f"{one.expect} 0", *numbers, str(bounds.seeds), verdict]
        lines.append(f"| {' | '.join(row)} |".replace("-", "−"))
    if results:
        lines += ["", f"Of {results[0]['chosen']} experts that a token chooses:", ""]
        lines += ["| kind | tokens | FFN experts, mean | spread between tokens (standard deviation in a layer) |"]
        lines += ["|---|---|---|---|"]
        for kind in ("all", *KINDS):
            of = [one["all"] if kind == "all" else one["kinds"][kind] for one in results]
            mean, deviation = (sum(one[name] for one in of) / len(of) for name in ("mean", "deviation"))
            lines.append(f"| {kind} | {of[0]['tokens']:,} | {mean:.2f} | {deviation:.2f} |")
    command = f"python -m benchmarks.evidence run {tree['claim']}"
    lines += ["", f"[Registered]({FOLDER.name}/{NAME}.yaml); {len(results)} of {tree['seeds']} runs. `{command}`", ""]
    return lines
