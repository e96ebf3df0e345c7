"""Train a small model from Python on one process: compose, build, step, checkpoint. Takes less than a minute.

Each `# %%` is a cell: editors run them one by one. From a shell: python examples/train_from_python.py
"""

# %% Compose a configuration, from the same keys as on the command line
import asyncio
from pathlib import Path

from train.api import build_corpus, build_session, compose

TEXT = Path(asyncio.__file__).parent  # half a megabyte of text that every Python has

config = compose(
    "model=debug",  # 2M parameters; configs/model has the others
    f"data.source={TEXT}/*.py",
    "data.out=data/from_python",
    "data.paths=[data/from_python/corpus]",
    "data.validation_fraction=0.1",
    "train.sequence_length=64",
    "train.global_batch_size=8",
    "train.steps=20",
    "optim.lr=5e-3",
    "schedule.warmup_steps=5",
    "validation.batches=2",
    "run.name=from_python",
)
print("FFN experts per token:", config.model.expected_ffn_experts, "of", config.model.num_experts)

# %% Build a tokenizer and a corpus. A finished corpus of the same settings is kept
corpus = build_corpus(config)
print(f"{corpus.tokens:,} tokens, vocabulary {corpus.vocab_size:,}")

# %% Build model, optimizer and data, and train
session = build_session(config)
parameters = sum(p.numel() for model in session.state.models for p in model.parameters())
print(f"{parameters:,} parameters")

losses = []
for _ in range(config.train.steps):
    metrics = session.step()
    losses.append(metrics["loss"])
    if metrics["step"] % 5 == 0:
        print(f"step {metrics['step']}: loss {metrics['loss']:.3f}, gradient norm {metrics['grad_norm']:.3f}")
assert losses[-1] < losses[0]

# %% Validate, save, and take one more step
print(f"validation: {session.validate().loss:.3f} nats per token")
checkpoint = session.save()
print(f"saved {checkpoint}")
next_loss = session.step()["loss"]
final_hash = session.state_hash()
session.close()

# %% A new session resumes from the checkpoint; its next step is bitwise identical
with build_session(config) as resumed:
    resumed.resume(checkpoint)
    assert resumed.step()["loss"] == next_loss
    assert resumed.state_hash() == final_hash
print("the resumed session took the same step, bit for bit")
