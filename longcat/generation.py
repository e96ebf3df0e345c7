"""Text generation with an MLA latent KV cache: greedy or sampled, with speculative decoding by the MTP layers."""

# S positions so far, q new positions, D width, H heads, R latent rank, V key/value width, m drafts

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from longcat.attention import LatentAttention
from longcat.documents import Documents
from longcat.errors import ConfigError
from longcat.layer import MTPLayer
from longcat.model import LongCat
from longcat.ops import fusion
from longcat.ops.attention import QUERY_BLOCK
from longcat.ops.matmul import product, raw_product
from longcat.ops.rotation import rotary
from longcat.rope import rotary_angles

MIN_TEMPERATURE = 1e-6  # logits divided by less may overflow


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from logits: greedily at temperature 0, else by nucleus sampling with ``top_p``."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature} must be 0 (the likeliest token) or at least {MIN_TEMPERATURE}"
            )
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise ConfigError(f"seed={self.seed} has more than 64 bits; give a smaller number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [q, vocabulary] → float64 probabilities; one-hot at the likeliest token at temperature 0."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, best, 1.0)
        scaled = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_p == 1:
            return scaled
        ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0.0  # likelier tokens reach top_p without it
        kept = torch.zeros_like(scaled).scatter_(-1, order, ordered)
        return kept / kept.sum(-1, keepdim=True)


@dataclass
class Generated:
    """The new tokens, and counts of drafts and forwards."""

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    forwards: int = 0  # of the model, including the prompt's

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts over all drafts; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None


class LatentCache:
    """The KV cache of one attention block: its normed latents and rotated shared keys, R + rotary numbers per position.

    Its `attend` replaces the block's own. Keys and values are not cached: after the prompt, the matrices that expand
    them are absorbed into the query and the output (MLA's weight absorption), so a step reads only the cache.
    """

    def __init__(self, attention: LatentAttention, capacity: int, like: Tensor) -> None:
        config = attention.config
        self.attention = attention
        self.rows = like.new_empty(capacity, config.kv_lora_rank + config.qk_rope_head_dim)
        self.length = 0
        attention.attend = self.attend  # type: ignore[method-assign]

    def release(self) -> None:
        """Restore the block's own `attend`."""
        del self.attention.attend

    def attend(self, query: Tensor, latents: Tensor, angles: Tensor, documents: Documents | None) -> Tensor:
        """query [1, q, H·C] and latents [1, q, R + rotary] of the next q positions → [1, q, H·V]."""
        config = self.attention.config
        nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        before, after = self.length, self.length + query.shape[1]
        latent, k_rope = latents.split((rank, rope), -1)
        k_rope = rotary(k_rope[:, :, None], angles)[:, :, 0]
        self.rows[before:after] = torch.cat((latent, k_rope), -1)[0]
        self.length = after
        if before == 0:  # prefill: expanding the prompt's keys and values once takes fewer FLOPs
            return LatentAttention.attend(self.attention, query, latents, angles, documents)

        expand = self.attention.kv_b_proj.weight.to(query.dtype).unflatten(0, (-1, nope + config.v_head_dim))
        key_up, value_up = expand.split((nope, config.v_head_dim), 1)  # [H, nope, R], [H, V, R]
        q_nope, q_rope = query[0].unflatten(-1, (-1, nope + rope)).split((nope, rope), -1)
        absorbed_query = product(q_nope.transpose(0, 1), key_up)  # [H, q, R]
        q_rope = q_rope if fusion.is_on_gpu(query) else rotary(q_rope, angles)
        absorbed_query = torch.cat((absorbed_query, q_rope.transpose(0, 1)), -1)
        scale = config.softmax_scale * config.query_scale
        starts = range(0, after - before, QUERY_BLOCK)
        blocks = ((start, absorbed_query[:, start : start + QUERY_BLOCK]) for start in starts)
        out = [self._attend_block(block, before + start, scale) for start, block in blocks]
        values = product(torch.cat(out, 1), value_up.mT)  # [H, q, V]
        return values.transpose(0, 1).flatten(1)[None]

    def _attend_block(self, absorbed_query: Tensor, start: int, scale: float) -> Tensor:
        """absorbed_query [H, q, R + rotary] of the positions from ``start`` on → attended latents [H, q, R]."""
        stop = start + absorbed_query.shape[1]
        rows = self.rows[:stop]
        position = torch.arange(stop, device=rows.device)
        scores = raw_product(absorbed_query, rows.mT).float() * scale
        scores = scores.masked_fill_(position[None, :] > position[start:, None], float("-inf"))
        latents = rows[:, : self.attention.config.kv_lora_rank]
        return product(torch.softmax(scores, -1).to(rows.dtype), latents)


class Decoder:
    """A model with KV caches of ``capacity`` positions; a context manager that removes them from the model at exit."""

    def __init__(self, model: LongCat, capacity: int) -> None:
        assert model.embed_tokens is not None and model.norm is not None and model.lm_head is not None
        self.model, self.embed_tokens, self.norm, self.head = model, model.embed_tokens, model.norm, model.lm_head
        like = model.embed_tokens.weight.detach()
        self.trunk_caches = [
            LatentCache(attention, capacity, like)
            for layer in model.shortcut_layers()
            for attention in layer.self_attn
            if isinstance(attention, LatentAttention)
        ]
        layers = [] if model.mtp is None else [layer for layer in model.mtp.layers if isinstance(layer, MTPLayer)]
        self.mtp_caches = [(layer, LatentCache(layer.self_attn, capacity, like)) for layer in layers]
        # The outputs of MTP layer k that layer k + 1 has not read yet
        self.pending_hidden = [like.new_empty(0, like.shape[1]) for _ in self.mtp_caches]

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for cache in [*self.trunk_caches, *(cache for _, cache in self.mtp_caches)]:
            cache.release()

    def _angles(self, start: int, count: int) -> Tensor:
        config = self.model.config
        positions = torch.arange(start, start + count, device=self.embed_tokens.weight.device)
        return rotary_angles(positions, config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)

    def _embed(self, tokens: list[int]) -> Tensor:
        return self.embed_tokens(torch.tensor([tokens], device=self.embed_tokens.weight.device))

    def forward(self, tokens: list[int]) -> Tensor:
        """Append q tokens to the caches → their hidden states after the final norm, [q, D]."""
        angles = self._angles(self.trunk_caches[0].length, len(tokens))
        x = self._embed(tokens)
        for layer in self.model.shortcut_layers():
            x, _ = layer(x, angles)
        return self.norm(x)[0]

    def truncate(self, length: int) -> None:
        """Roll the model's caches back to ``length`` positions."""
        for cache in self.trunk_caches:
            cache.length = length

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [q, D] → [q, vocabulary] float32."""
        return self.head(hidden).float()

    def draft(self, tokens: list[int], hidden: Tensor, sampler: Sampler) -> tuple[list[int], list[Tensor]]:
        """One draft from each MTP layer, and the distribution [vocabulary] from which each was sampled.

        ``tokens`` are all tokens so far, of which the model has not read the last; ``hidden`` [q, D] are the model's
        states at the positions since the previous call. At position t layer k reads the token at t + k. Beyond the
        known tokens that is a draft, so its cache is rolled back to the known ones afterwards.
        """
        assert self.model.mtp is not None
        last = len(tokens) - 1
        sequence, draft_probs = list(tokens), []
        for depth, (layer, cache) in enumerate(self.mtp_caches, start=1):
            start = cache.length
            embedded = self._embed(sequence[start + depth : last + depth])
            out = self.model.mtp.norm(layer(hidden[None], embedded, self._angles(start, last - start), None))[0]
            draft_probs.append(sampler.sampling.probabilities(self.logits(out[-1:]))[0])
            sequence.append(sampler.sample(draft_probs[-1]))
            hidden = torch.cat((self.pending_hidden[depth - 1], out))
            first, cache.length = max(0, last - depth), max(0, last - depth + 1)
            begin = last - hidden.shape[0]
            self.pending_hidden[depth - 1] = hidden[first - begin : cache.length - begin]
        return sequence[len(tokens) :], draft_probs


class Sampler:
    """Samples tokens and verifies drafts; the seed in ``sampling`` determines all random choices."""

    def __init__(self, sampling: SamplingParams) -> None:
        sampling.validate()
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def sample(self, probabilities: Tensor) -> int:
        """probabilities [vocabulary] → a token."""
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self.generator))

    def verify(self, drafts: list[int], draft_probs: list[Tensor], target_probs: Tensor) -> tuple[int, int]:
        """The number of accepted drafts, and the token after them (speculative sampling, Leviathan et al. 2023).

        ``draft_probs`` [m][vocabulary] are the drafts' distributions, ``target_probs`` [m + 1, vocabulary] the model's.
        A draft is accepted with probability min(1, target / draft). The first rejected one is replaced by a sample from
        max(0, target - draft), normalised, so that tokens are distributed as ``target_probs``. At temperature 0 a draft
        is accepted if it is the model's own choice.
        """
        for index, (draft, distribution) in enumerate(zip(drafts, draft_probs, strict=True)):
            acceptance_probability = float(target_probs[index, draft] / distribution[draft])
            if float(torch.rand((), generator=self.generator, dtype=torch.float64)) >= acceptance_probability:
                return index, self.sample((target_probs[index] - distribution).clamp_min(0.0))
        return len(drafts), self.sample(target_probs[-1])


def make_decoder(model: LongCat, prompt_length: int, max_tokens: int) -> Decoder:
    """A decoder with capacity for the prompt, new tokens and drafts; raises ConfigError if memory does not suffice."""
    try:
        return Decoder(model, prompt_length + max_tokens + model.config.num_mtp_layers + 1)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise ConfigError(f"max_tokens={max_tokens} needs more memory than there is; lower it") from error


@torch.no_grad()
def generate(
    model: LongCat,
    prompt: list[int],
    max_tokens: int,
    sampling: SamplingParams | None = None,
    end: int | None = None,
    draft: bool = True,
) -> Generated:
    """Generate at most ``max_tokens`` tokens after ``prompt``, up to and including the token ``end``.

    With ``draft``, the model's MTP layers (if any) draft tokens and one forward of the model verifies them. The result
    is distributed as without drafts, up to rounding: the sums of a wider forward are rounded differently.

    Raises:
        ConfigError: an empty prompt, tokens outside the model's vocabulary, or invalid sampling parameters.
    """
    if not prompt or max_tokens < 1:
        raise ConfigError("generation needs a prompt of at least one token, and max_tokens of at least 1")
    if not all(0 <= token < model.config.vocab_size for token in prompt):
        raise ConfigError(
            f"the prompt has tokens outside model.vocab_size={model.config.vocab_size}: another tokenizer's"
        )
    sampler = Sampler(sampling or SamplingParams())
    with make_decoder(model, len(prompt), max_tokens) as decoder:
        hidden = decoder.forward(prompt)
        target_probs = sampler.sampling.probabilities(decoder.logits(hidden[-1:]))
        generated = Generated([sampler.sample(target_probs[0])], forwards=1)
        while len(generated.tokens) < max_tokens and end not in generated.tokens:
            tokens = prompt + generated.tokens
            use_drafts = draft and model.mtp is not None
            drafts, draft_probs = decoder.draft(tokens, hidden, sampler) if use_drafts else ([], [])
            hidden = decoder.forward([tokens[-1], *drafts])
            target_probs = sampler.sampling.probabilities(decoder.logits(hidden))
            count, token = sampler.verify(drafts, draft_probs, target_probs)
            generated.tokens += [*drafts[:count], token]
            generated.drafted += len(drafts)
            generated.accepted += count
            generated.forwards += 1
            hidden = hidden[: count + 1]
            decoder.truncate(len(tokens) + count)
    stop = generated.tokens.index(end) + 1 if end is not None and end in generated.tokens else max_tokens
    generated.tokens = generated.tokens[: min(stop, max_tokens)]
    return generated
