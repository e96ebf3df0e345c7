"""Roles of parameters: a role sets the initial values, the weight decay, and how both change with the model's width.

The one table that initial values (longcat/init.py), the optimizer's groups (train/optimizer.py) and `longcat transfer`
(train/transfer.py) read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a parameter does in the model."""

    embedding = "embedding"
    hidden = "hidden"  # matrices of attention, dense FFN and MTP
    expert = "expert"  # FFN experts
    head = "head"  # the unembedding
    router = "router"
    norm = "norm"  # gains of the norms
    bias = "bias"  # selection biases, which the bias controller moves and the optimizer never sees


class Initial(StrEnum):
    """Initial values: drawn with the standard deviation of this key of the model's section, or a constant."""

    embedding_std = "embedding_std"
    hidden_std = "hidden_std"
    ones = "ones"
    zeros = "zeros"


@dataclass(frozen=True)
class Rule:
    """How a role is initialised and trained, and how both change at s times the width.

    ``in_table`` says whether the exponents are those of the report's Table 1 (section 7) or this project's choice
    (docs/decisions/2026-11-29-transfer.md).
    """

    initial: Initial
    decays: bool  # whether weight decay acts on it
    variance: int = 0  # the initial variance is multiplied by s to this power
    rate: int = 0  # and the learning rate by s to this power
    in_table: bool = False


RULES = {
    Role.embedding: Rule(Initial.embedding_std, decays=False, in_table=True),
    Role.hidden: Rule(Initial.hidden_std, decays=True, variance=-1, rate=-1, in_table=True),
    Role.expert: Rule(Initial.hidden_std, decays=True, variance=-1, rate=-1, in_table=True),
    Role.head: Rule(Initial.hidden_std, decays=True, variance=-1, rate=-1, in_table=True),
    # From the width to a fixed number of scores, as the head to the vocabulary
    Role.router: Rule(Initial.hidden_std, decays=False, variance=-1, rate=-1),
    Role.norm: Rule(Initial.ones, decays=False),  # one gain per channel, as the embedding: its inputs do not grow
    Role.bias: Rule(Initial.zeros, decays=False),  # compared with scores of mean 1/(N+Z), whatever the width
}
TRAINED = tuple(role for role in Role if role is not Role.bias)


def role(stored_name: str) -> Role:
    """The role of a parameter or buffer by its stored name."""
    if stored_name.endswith("bias"):
        return Role.bias
    if stored_name.startswith("embed_tokens."):
        return Role.embedding
    if stored_name.startswith("lm_head."):
        return Role.head
    if "norm" in stored_name:
        return Role.norm
    if ".router." in stored_name:
        return Role.router
    return Role.expert if ".experts." in stored_name else Role.hidden


def writes_to_residual(stored_name: str) -> bool:
    """Whether a matrix is the last of a block, whose output is added to the residual stream."""
    return stored_name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
