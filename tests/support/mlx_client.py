"""Runs in an environment of its own with mlx-lm: token ids, logits and greedy texts of an exported folder, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(folder: str, prompts: list[str], max_tokens: int) -> dict[str, Any]:
    """``folder`` is loaded unmodified, as `mlx_lm.generate --model` does."""
    import mlx.core as mx
    from mlx_lm import generate, load
    from mlx_lm.sample_utils import make_sampler

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(folder)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    greedy = make_sampler(temp=0.0)
    return {
        "ids": ids,
        "logits": [model(mx.array([one]))[0].astype(mx.float32).tolist() for one in ids],
        "texts": [
            generate(model, tokenizer, prompt=one, max_tokens=max_tokens, sampler=greedy, verbose=False) for one in ids
        ],
    }


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    print(json.dumps(main(wanted["folder"], wanted["prompts"], wanted["max_tokens"])))
