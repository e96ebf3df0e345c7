"""Generation: KV caches against full forwards, greedy against transformers, with drafts against without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.attention import LatentAttention
from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.generation import Decoder, Sampler, SamplingParams, generate
from longcat.model import LongCat
from longcat.names import stored_state
from longcat.ops.attention import QUERY_BLOCK
from longcat.roles import role
from tests.longcat.peers import BASE, our_model, plain_peer, randomise

TOLERANCE = 2e-5  # of the largest logit


@torch.no_grad()
def decided_model(config: ModelConfig, seed: int = 0) -> LongCat:
    """Values under which every term matters, MTP's too."""
    model = LongCat(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in stored_state(model):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            tensor.copy_(noise / config.num_routed)
        elif role(name) == "norm":
            tensor.copy_(1 + 0.2 * noise)
        else:
            tensor.copy_(noise * (1.0 if role(name) == "embedding" else tensor.shape[-1] ** -0.5))
    return model


def ids(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (length,), generator=generator).tolist()


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())


@pytest.mark.parametrize("counts", [[1] * 9, [5, 1, 3], [QUERY_BLOCK + 20, 1, 2, QUERY_BLOCK + 5]])
def test_logits_with_caches_equal_those_of_one_forward(counts: list[int]) -> None:
    model = decided_model(BASE)
    tokens = ids(BASE, sum(counts))
    full = model.logits(torch.tensor([tokens]))[0]
    with torch.no_grad(), Decoder(model, len(tokens)) as decoder:
        position = 0
        for count in counts:
            logits = decoder.logits(decoder.forward(tokens[position : position + count]))
            assert close(logits, full[position : position + count])
            position += count


def test_truncated_cache_equals_one_that_was_never_longer() -> None:
    model = decided_model(BASE)
    tokens = ids(BASE, 12)
    with torch.no_grad(), Decoder(model, 20) as decoder:
        decoder.forward([*tokens[:8], 1, 2, 3])
        decoder.truncate(8)
        logits = decoder.logits(decoder.forward(tokens[8:]))
    assert close(logits, model.logits(torch.tensor([tokens]))[0, 8:])


def test_cache_holds_latents_and_the_model_is_restored() -> None:
    model = decided_model(replace(BASE, num_mtp_layers=1))
    with Decoder(model, 7) as decoder:
        shapes = {tuple(cache.rows.shape) for cache in decoder.trunk_caches}
        assert shapes == {(7, BASE.kv_lora_rank + BASE.qk_rope_head_dim)}
        assert len(decoder.trunk_caches) == 2 * BASE.num_layers
    assert all("attend" not in vars(module) for module in model.modules() if isinstance(module, LatentAttention))


@pytest.mark.parametrize("length", [1, 6, 40])
def test_greedy_equals_transformers_token_for_token(length: int) -> None:
    peer: Any = plain_peer(BASE)
    randomise(peer, BASE, seed=3)
    model = our_model(peer, BASE)
    prompt = ids(BASE, length, seed=length)
    expected = peer.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, length, dtype=torch.int64),
        max_new_tokens=60,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )[0, length:].tolist()
    assert len(set(expected)) > 5, "a text of so few tokens says little"
    assert generate(model, prompt, 60).tokens == expected


@pytest.mark.parametrize("num_mtp_layers", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 30])
def test_speculative_equals_greedy(num_mtp_layers: int, length: int) -> None:
    """A vocabulary of five: drafts of untrained MTP layers are accepted often and rejected often."""
    config = replace(BASE, num_mtp_layers=num_mtp_layers, vocab_size=5)
    model = decided_model(config, seed=1)
    plain = generate(model, ids(config, length), 40, draft=False)
    drafted = generate(model, ids(config, length), 40)
    assert len(set(plain.tokens)) > 2, "a text of so few tokens says little"
    assert drafted.tokens == plain.tokens
    assert plain.acceptance_rate is None and plain.forwards == 40
    assert 0 < drafted.accepted < drafted.drafted
    assert drafted.forwards < plain.forwards


@torch.no_grad()
def test_drafts_equal_mtp_predictions_on_the_full_text() -> None:
    config = replace(BASE, num_mtp_layers=2)
    model = decided_model(config)
    assert model.mtp is not None and model.embed_tokens is not None and model.norm is not None
    sampler = Sampler(SamplingParams(temperature=1.0))
    tokens, position = ids(config, 9), 0
    rounds = []
    with Decoder(model, 40) as decoder:
        for accepted in (0, 2, 1, 0, 2):
            drafts, draft_probs = decoder.draft(tokens, decoder.forward(tokens[position:-1]), sampler)
            rounds.append((tokens, drafts, draft_probs))
            position = len(tokens) - 1
            tokens = [*tokens, *drafts[:accepted], (drafts[-1] + 1) % config.vocab_size]
    for tokens, drafts, draft_probs in rounds:
        text = torch.tensor([tokens + drafts])
        length = len(tokens) - 1
        angles = model.angles(text)[:length]
        states = model.norm(model.trunk(text, None)[0])[:, :length]
        for depth, layer in enumerate(model.mtp.layers, start=1):
            embedded = model.embed_tokens(text[:, depth : depth + length])
            states = model.mtp.norm(layer(states, embedded, angles, None))
            expected = sampler.sampling.probabilities(decoder.logits(states[0, -1:]))[0]
            torch.testing.assert_close(draft_probs[depth - 1], expected, rtol=1e-4, atol=1e-6)


def test_speculative_sampling_keeps_the_model_s_distribution() -> None:
    draft_probs = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    target_probs = torch.tensor([[0.2, 0.3, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    sampler = Sampler(SamplingParams(temperature=1.0))
    seen, accepted, rounds = torch.zeros(4), 0, 20000
    for _ in range(rounds):
        draft = sampler.sample(draft_probs)
        count, token = sampler.verify([draft], [draft_probs], target_probs)
        seen[draft if count else token] += 1
        accepted += count
    assert torch.allclose(seen / rounds, target_probs[0].float(), atol=0.015)
    assert accepted / rounds == pytest.approx(float(torch.minimum(draft_probs, target_probs[0]).sum()), abs=0.015)


def test_sampling_from_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -5.0]])
    assert SamplingParams().probabilities(logits).tolist() == [[0, 1, 0, 0]]
    plain = SamplingParams(temperature=0.5).probabilities(logits)
    torch.testing.assert_close(plain, torch.softmax(logits.double() / 0.5, -1))
    some = SamplingParams(temperature=1.0, top_p=0.8).probabilities(logits)
    assert (some > 0).tolist() == [[False, True, True, False]]  # 0.66 is not enough, 0.91 is
    assert float(some.sum()) == pytest.approx(1.0)
    first = SamplingParams(temperature=1.0, top_p=1e-9).probabilities(logits)
    assert first.tolist() == [[0, 1, 0, 0]]


def test_the_seed_decides_a_sampled_text() -> None:
    model = decided_model(replace(BASE, num_mtp_layers=1))
    texts = [generate(model, [1, 2], 20, SamplingParams(1.0, 0.9, seed)).tokens for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_stops_at_the_end_token_or_the_limit() -> None:
    model = decided_model(replace(BASE, num_mtp_layers=2, vocab_size=5))
    text = generate(model, [1], 40, draft=False).tokens
    for end in set(text):
        assert generate(model, [1], 40, end=end).tokens == text[: text.index(end) + 1]
    for most in (1, 2, 3, 7):
        assert generate(model, [1], most).tokens == text[:most]


@pytest.mark.parametrize(
    "prompt,most,sampling",
    [
        ([], 3, SamplingParams()),
        ([1], 0, SamplingParams()),
        ([61], 3, SamplingParams()),
        ([1], 3, SamplingParams(-1.0)),
        ([1], 3, SamplingParams(1.0, 0.0)),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], most: int, sampling: SamplingParams) -> None:
    with pytest.raises(ConfigError):
        generate(decided_model(BASE), prompt, most, sampling)
