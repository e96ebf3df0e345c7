"""The key that a person most likely means by an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names of other frameworks; the left side is the last part of what a person writes
SYNONYMS = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "peak_lr": "optim.lr",
    "min_lr": "schedule.final_factor",
    "min_lr_ratio": "schedule.final_factor",
    "wd": "optim.weight_decay",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "epsilon": "optim.eps",
    "adam_epsilon": "optim.eps",
    "clip_grad": "optim.grad_clip",
    "max_grad_norm": "optim.grad_clip",
    "max_norm": "optim.grad_clip",
    "gradient_clip_val": "optim.grad_clip",
    "warmup": "schedule.warmup_steps",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "train_iters": "train.steps",
    "iterations": "train.steps",
    "seq_len": "train.sequence_length",
    "seq_length": "train.sequence_length",
    "seqlen": "train.sequence_length",
    "max_seq_len": "train.sequence_length",
    "max_seq_length": "train.sequence_length",
    "context_length": "train.sequence_length",
    "block_size": "train.sequence_length",
    "sample_packing": "data.packing",
    "batch_size": "train.global_batch_size",
    "local_batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "precision": "train.dtype",
    "mixed_precision": "train.dtype",
    "n_layers": "model.num_layers",
    "n_layer": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "dim": "model.hidden_size",
    "d_model": "model.hidden_size",
    "n_embd": "model.hidden_size",
    "n_heads": "model.num_heads",
    "n_head": "model.num_heads",
    "num_attention_heads": "model.num_heads",
    "intermediate_size": "model.ffn_hidden_size",
    "moe_intermediate_size": "model.expert_hidden_size",
    "n_routed_experts": "model.num_experts",
    "num_experts_per_tok": "model.top_k",
    "moe_topk": "model.top_k",
    "tensor_parallel_size": "parallel.tp",
    "tensor_model_parallel_size": "parallel.tp",
    "tensor_parallel_degree": "parallel.tp",
    "pipeline_parallel_size": "parallel.pp",
    "pipeline_model_parallel_size": "parallel.pp",
    "pipeline_parallel_degree": "parallel.pp",
    "context_parallel_size": "parallel.cp",
    "context_parallel_degree": "parallel.cp",
    "expert_parallel_size": "parallel.ep",
    "expert_model_parallel_size": "parallel.ep",
    "expert_parallel_degree": "parallel.ep",
    "data_parallel_size": "parallel.dp",
    "nproc_per_node": "run.num_processes",
    "nproc": "run.num_processes",
    "num_gpus": "run.num_processes",
    "output_dir": "run.dir",
    "out_dir": "run.dir",
    "save_dir": "run.dir",
    "run_name": "run.name",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "eval_every": "validation.every",
    "eval_steps": "validation.every",
    "eval_interval": "validation.every",
    "log_every": "logging.every",
    "logging_steps": "logging.every",
    "log_interval": "logging.every",
    "dataset": "data.source",
    "data_path": "data.paths",
    "train_data": "data.paths",
}


def nearest_key(key: str, known: list[str], groups: Iterable[str]) -> str:
    """The most likely of ``known`` dotted keys and ``groups`` (sections and groups of choices).

    In this order: a name of another framework; the same last part in another section; the nearest last part in the
    named section; the nearest name of all.
    """
    groups = list(groups)
    section, _, leaf = key.rpartition(".")
    if leaf in SYNONYMS:
        return SYNONYMS[leaf]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    if same_leaf:
        return closest(key, same_leaf)
    inside = [name for name in known if section and name.startswith(f"{section}.")]
    if inside:
        return f"{section}.{closest(leaf, [name.removeprefix(f'{section}.') for name in inside])}"
    return closest(key, known if section else groups)


def closest(word: str, words: Iterable[str]) -> str:
    """The one of ``words`` that is most like ``word``."""
    return difflib.get_close_matches(word, sorted(words), n=1, cutoff=0.0)[0]
