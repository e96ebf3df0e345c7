"""Text from a model: latent caches, greedy choice and sampling, and MTP layers that draft what the model verifies."""

# S positions so far, q new positions, D width, H heads, R latent rank, V key/value width, m drafts

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from longcat.attention import LatentAttention
from longcat.errors import ConfigError
from longcat.layer import MTPLayer
from longcat.model import LongCat
from longcat.ops.attention import QUERY_BLOCK
from longcat.ops.elementwise import rotary, rotary_angles
from longcat.ops.matmul import product, raw_product

MIN_TEMPERATURE = 1e-6  # logits that are divided by less may become infinite


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from logits: the best at temperature 0, else drawn from the smallest set of share top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature} must be 0, which takes the likeliest token, or a number from "
                f"{MIN_TEMPERATURE} on"
            )
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise ConfigError(f"seed={self.seed} has more than 64 bits; give a smaller number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [q, vocabulary] → float64 probabilities; all on the likeliest token at temperature 0."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, best, 1.0)
        scaled = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_p == 1:
            return scaled
        ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0.0  # what stands before it fills the share already
        kept = torch.zeros_like(scaled).scatter_(-1, order, ordered)
        return kept / kept.sum(-1, keepdim=True)


@dataclass
class Generated:
    """The new tokens, and how the drafts among them fared."""

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    forwards: int = 0  # of the model, the prompt's among them

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that stood; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None


class LatentCache:
    """Keeps one attention block's normed latents and rotated shared keys, and attends over them.

    Its `attend` takes the place of the block's own. Keys and values are not kept: behind the prompt, what expands them
    is moved to the query and to the result, so a position costs R + rotary numbers and a step reads nothing else of it.
    """

    def __init__(self, attention: LatentAttention, capacity: int, like: Tensor) -> None:
        config = attention.config
        self.attention = attention
        self.rows = like.new_empty(capacity, config.kv_lora_rank + config.qk_rope_head_dim)
        self.length = 0
        attention.attend = self.attend  # type: ignore[method-assign]

    def release(self) -> None:
        """Give the block its own `attend` back."""
        del self.attention.attend

    def attend(self, query: Tensor, latents: Tensor, angles: Tensor, documents: Tensor | None) -> Tensor:
        """query [1, q, H·C] and latents [1, q, R + rotary] of the next q positions → [1, q, H·V]."""
        config = self.attention.config
        nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        before, after = self.length, self.length + query.shape[1]
        latent, k_rope = latents.split((rank, rope), -1)
        k_rope = rotary(k_rope[:, :, None], angles)[:, :, 0]
        self.rows[before:after] = torch.cat((latent, k_rope), -1)[0]
        self.length = after
        if before == 0:  # a prompt: expanding its keys and values once takes fewer multiplications
            return LatentAttention.attend(self.attention, query, latents, angles, documents)

        expand = self.attention.kv_b_proj.weight.to(query.dtype).unflatten(0, (-1, nope + config.v_head_dim))
        to_key, to_value = expand.split((nope, config.v_head_dim), 1)  # [H, nope, R], [H, V, R]
        q_nope, q_rope = query[0].unflatten(-1, (-1, nope + rope)).split((nope, rope), -1)
        asked = product(q_nope.transpose(0, 1), to_key)  # [H, q, R]
        asked = torch.cat((asked, rotary(q_rope, angles).transpose(0, 1)), -1)
        scale = config.softmax_scale * config.query_scale
        firsts = range(0, after - before, QUERY_BLOCK)
        out = [self._block(asked[:, first : first + QUERY_BLOCK], before + first, scale) for first in firsts]
        values = product(torch.cat(out, 1), to_value.mT)  # [H, q, V]
        return values.transpose(0, 1).flatten(1)[None]

    def _block(self, asked: Tensor, start: int, scale: float) -> Tensor:
        """asked [H, q, R + rotary] of the positions from ``start`` on → attended latents [H, q, R]."""
        stop = start + asked.shape[1]
        rows = self.rows[:stop]
        position = torch.arange(stop, device=rows.device)
        scores = raw_product(asked, rows.mT).float() * scale
        scores = scores.masked_fill_(position[None, :] > position[start:, None], float("-inf"))
        latents = rows[:, : self.attention.config.kv_lora_rank]
        return product(torch.softmax(scores, -1).to(rows.dtype), latents)


class Decoder:
    """A model that goes on from where it stands: a context in which its attention blocks keep caches."""

    def __init__(self, model: LongCat, capacity: int) -> None:
        assert model.embed_tokens is not None and model.norm is not None and model.lm_head is not None
        self.model, self.embed, self.norm, self.head = model, model.embed_tokens, model.norm, model.lm_head
        like = model.embed_tokens.weight.detach()
        self.trunk = [
            LatentCache(attention, capacity, like)  # type: ignore[arg-type]
            for layer in model.shortcut_layers()
            for attention in layer.self_attn
        ]
        layers = [] if model.mtp is None else [layer for layer in model.mtp.layers]
        self.predictors: list[tuple[MTPLayer, LatentCache]] = [
            (layer, LatentCache(layer.self_attn, capacity, like))  # type: ignore[arg-type, misc]
            for layer in layers
        ]
        # Of predictor k what the next one has still to read: its output at its last position
        self.waiting = [like.new_empty(0, like.shape[1]) for _ in self.predictors]

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for cache in [*self.trunk, *(cache for _, cache in self.predictors)]:
            cache.release()

    def _angles(self, start: int, count: int) -> Tensor:
        config = self.model.config
        positions = torch.arange(start, start + count, device=self.embed.weight.device)
        return rotary_angles(positions, config.qk_rope_head_dim, config.rope_theta)

    def _embedded(self, tokens: list[int]) -> Tensor:
        return self.embed(torch.tensor([tokens], device=self.embed.weight.device))  # type: ignore[no-any-return]

    def advance(self, tokens: list[int]) -> Tensor:
        """The next q tokens → their hidden states after the final norm, [q, D]."""
        angles = self._angles(self.trunk[0].length, len(tokens))
        x = self._embedded(tokens)
        for layer in self.model.shortcut_layers():
            x, _ = layer(x, angles)
        return self.norm(x)[0]  # type: ignore[no-any-return]

    def cut(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        for cache in self.trunk:
            cache.length = length

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [q, D] → [q, vocabulary] float32."""
        return self.head(hidden).float()  # type: ignore[no-any-return]

    def draft(self, tokens: list[int], hidden: Tensor, draws: Sampler) -> tuple[list[int], list[Tensor]]:
        """One draft from each MTP layer, and the distribution that each was drawn from.

        ``tokens`` are all so far, the last of which the model has not read; ``hidden`` [q, D] the model's states at
        the positions that no call has been given yet. Layer k reads at position t the token at t + k: past the known
        ones that is a draft, and what it kept of that is forgotten again.
        """
        assert self.model.mtp is not None
        last = len(tokens) - 1
        sequence, likely = list(tokens), []
        for depth, (layer, cache) in enumerate(self.predictors, start=1):
            start = cache.length
            embedded = self._embedded(sequence[start + depth : last + depth])
            out = self.model.mtp.norm(layer(hidden[None], embedded, self._angles(start, last - start), None))[0]
            likely.append(draws.sampling.probabilities(self.logits(out[-1:]))[0])
            sequence.append(draws.draw(likely[-1]))
            hidden = torch.cat((self.waiting[depth - 1], out))
            first, cache.length = max(0, last - depth), max(0, last - depth + 1)
            begin = last - hidden.shape[0]
            self.waiting[depth - 1] = hidden[first - begin : cache.length - begin]
        return sequence[len(tokens) :], likely


class Sampler:
    """Random choices of one text, a function of its seed."""

    def __init__(self, sampling: SamplingParams) -> None:
        sampling.validate()
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, probabilities: Tensor) -> int:
        """[vocabulary] → a token."""
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self.generator))

    def verify(self, drafts: list[int], likely: list[Tensor], right: Tensor) -> tuple[int, int]:
        """How many drafts stand, and the token behind them; ``right`` [m + 1, vocabulary] is the model's word.

        A draft stands with probability min(1, right / likely), and the first that does not is replaced by a draw from
        what `likely` gave too little to: so tokens are distributed as if each had been drawn from ``right``. At
        temperature 0 both are certain, and a draft stands when it is the model's own choice.
        """
        for place, (draft, drawn_from) in enumerate(zip(drafts, likely, strict=True)):
            share = float(right[place, draft] / drawn_from[draft])
            if float(torch.rand((), generator=self.generator, dtype=torch.float64)) >= share:
                return place, self.draw((right[place] - drawn_from).clamp_min(0.0))
        return len(drafts), self.draw(right[-1])


def make_decoder(model: LongCat, prompt_length: int, max_tokens: int) -> Decoder:
    """A decoder with room for a prompt, new tokens and drafts; raises ConfigError where memory has not that much."""
    try:
        return Decoder(model, prompt_length + max_tokens + model.config.num_mtp_layers + 1)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise ConfigError(f"max_tokens={max_tokens} are more than memory has room for; lower it") from error


@torch.no_grad()
def generate(
    model: LongCat,
    prompt: list[int],
    max_tokens: int,
    sampling: SamplingParams | None = None,
    end: int | None = None,
    draft: bool = True,
) -> Generated:
    """At most ``max_tokens`` tokens that follow ``prompt``, up to and with the token ``end``.

    With ``draft`` the model's MTP layers, where it has any, guess ahead and one forward of the model verifies the
    guesses; what comes out is the same as without, but for sums that a wider forward rounds differently.

    Raises:
        ConfigError: an empty prompt, tokens that the model does not know, or a choice that cannot be.
    """
    if not prompt or max_tokens < 1:
        raise ConfigError("generation needs a prompt of at least one token, and max_tokens of at least 1")
    if not all(0 <= token < model.config.vocab_size for token in prompt):
        raise ConfigError(f"the prompt has tokens beyond model.vocab_size={model.config.vocab_size}: another tokenizer")
    draws = Sampler(sampling or SamplingParams())
    with make_decoder(model, len(prompt), max_tokens) as decoder:
        hidden = decoder.advance(prompt)
        right = draws.sampling.probabilities(decoder.logits(hidden[-1:]))
        made = Generated([draws.draw(right[0])], forwards=1)
        while len(made.tokens) < max_tokens and end not in made.tokens:
            tokens = prompt + made.tokens
            drafts, likely = decoder.draft(tokens, hidden, draws) if draft and model.mtp is not None else ([], [])
            hidden = decoder.advance([tokens[-1], *drafts])
            right = draws.sampling.probabilities(decoder.logits(hidden))
            count, token = draws.verify(drafts, likely, right)
            made.tokens += [*drafts[:count], token]
            made.drafted += len(drafts)
            made.accepted += count
            made.forwards += 1
            hidden = hidden[: count + 1]
            decoder.cut(len(tokens) + count)
    stop = made.tokens.index(end) + 1 if end is not None and end in made.tokens else max_tokens
    made.tokens = made.tokens[: min(stop, max_tokens)]
    return made
