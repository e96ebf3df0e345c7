"""A real client: mlx-lm on a CPU reads the released float32 layout unmodified, computes the same and serves it."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.generate import GenerateOptions, generate_text
from tests.support.exporting import our_logits, run_command, trained
from tests.support.ports import free_ports

PYTHON = "LONGCAT_MLX_PYTHON"  # of an environment with mlx-lm; `make test-long` makes one
CLIENT = Path(__file__).resolve().parents[2] / "support" / "mlx_client.py"
PROMPTS = ["def main(", "import ", "class Message:\n", "    return ", "# "]
MAX_TOKENS = 48
TOLERANCE = 2e-5  # of the largest logit
VARIANTS = {
    "plain": [],
    "yarn": [
        "model.rope_theta=100",
        "model.rope_scaling.factor=4",
        "model.rope_scaling.original_max_position_embeddings=16",
        "model.rope_scaling.mscale=1",
        "model.rope_scaling.mscale_all_dim=0.8",
    ],
}
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"needs a Python with mlx-lm in {PYTHON}"),
]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, export) of a short run that has learnt a little."""
    folder = tmp_path_factory.mktemp(request.param)
    words = ["train.steps=60", "train.sequence_length=96", *VARIANTS[request.param]]
    trained(corpus, folder, *words)
    checkpoint = folder / "run" / "checkpoints" / "step-00000060"
    run_command("export", f"source={checkpoint}", f"target={folder / 'export'}", "export.dtype=float32")
    return checkpoint, folder / "export"


def our_text(export: Path, prompt: str) -> str:
    options = GenerateOptions(source=str(export), prompt=prompt, max_tokens=MAX_TOKENS, dtype="float32", drafts=False)
    return generate_text(options)[0]


def test_mlx_lm_computes_the_same(model: tuple[Path, Path]) -> None:
    """Token ids, logits and greedy texts."""
    checkpoint, export = model
    wanted = json.dumps({"folder": str(export), "prompts": PROMPTS, "max_tokens": MAX_TOKENS})
    command = [os.environ[PYTHON], str(CLIENT)]
    ended = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    theirs: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])

    from train.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(export / "tokenizer.json")
    assert theirs["ids"] == [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    worst = 0.0
    for ids, logits in zip(theirs["ids"], theirs["logits"], strict=True):
        ours = our_logits(checkpoint, torch.tensor([ids]))[0]
        worst = max(worst, float((ours - torch.tensor(logits)).abs().max() / ours.abs().max()))
    print(f"largest difference of logits: {worst:.1e} of the largest")
    assert worst <= TOLERANCE
    assert theirs["texts"] == [our_text(export, prompt) for prompt in PROMPTS]


def test_mlx_lm_serves_the_same_text(model: tuple[Path, Path]) -> None:
    """Over HTTP, in OpenAI's form."""
    _, export = model
    (port,) = free_ports(1)
    words = ["-m", "mlx_lm.server", "--model", str(export), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([os.environ[PYTHON], *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for prompt in PROMPTS[:2]:
            body = {"model": "default_model", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
            answer = asked(server, f"http://127.0.0.1:{port}/v1/completions", body)
            assert answer["choices"][0]["text"] == our_text(export, prompt)
    finally:
        server.terminate()
        server.wait(30)


def asked(server: subprocess.Popen[bytes], url: str, body: dict[str, Any], seconds: float = 120) -> dict[str, Any]:
    """The server's answer; waits until it has started."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error}: {error.read()[:500]!r}") from error
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "mlx_lm.server does not answer"
            time.sleep(0.5)
