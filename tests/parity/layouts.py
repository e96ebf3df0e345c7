"""The layouts of the parity tests: name, ranks and overrides; and the problems that they compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest


class Layout(NamedTuple):
    """One layout, compared with one process on the same ``problem``."""

    name: str
    ranks: int
    parallel: str  # overrides of parallel.*, overlap.* as words
    problem: str = "plain"

    @property
    def overrides(self) -> list[str]:
        words = [word if "." in word.partition("=")[0] else f"parallel.{word}" for word in self.parallel.split()]
        return [*words, *PROBLEMS[self.problem]]


PROBLEMS: dict[str, list[str]] = {
    "plain": [],
    "two_per_micro_batch": ["train.micro_batch_size=2"],
    "documents": ["data.mask_documents=true"],
    "no_mtp": ["model.num_mtp_layers=0", "train.seed=3"],
    "late_mtp": ["loss.mtp_start_tokens=256"],  # on from the second step
    "seven_layers": ["model.num_layers=7"],
    "eight_layers": ["model.num_layers=8", "train.seed=2"],
    "quantile": ["balance.method=quantile", "train.seed=5"],
    "packed": ["data.mask_documents=true", "data.packing=best_fit", "balance.method=quantile", "train.seed=5"],
    "yarn": [
        "model.rope_theta=100",
        "model.rope_scaling.factor=4",
        "model.rope_scaling.original_max_position_embeddings=8",
        "model.rope_scaling.mscale=1",
        "model.rope_scaling.mscale_all_dim=0.8",
    ],
}

LAYOUTS = [
    Layout("fsdp2", 2, "fsdp=2"),
    Layout("dp2", 2, "fsdp=1 dp=2"),
    Layout("ep2", 2, "ep=2"),
    Layout("ep2-all_gather", 2, "ep=2 transport=all_gather"),
    Layout("ep2-chunks2", 2, "ep=2 overlap.num_chunks=2"),
    Layout("ep2-chunks3", 2, "ep=2 overlap.num_chunks=3", "two_per_micro_batch"),
    Layout("ep2-chunks2-blocking", 2, "ep=2 overlap.num_chunks=2 overlap.enabled=false"),
    Layout("ep2-chunks2-after_attention", 2, "ep=2 overlap.num_chunks=2 overlap.experts_after=attention"),
    Layout("tp2", 2, "tp=2"),
    Layout("cp2", 2, "cp=2"),
    Layout("cp2-documents", 2, "cp=2", "documents"),
    Layout("cp2-ep2", 2, "cp=2 ep=2"),
    Layout("cp2-ep2-chunks2", 2, "cp=2 ep=2 overlap.num_chunks=2"),
    Layout("cp2-ep2-chunks2-blocking", 2, "cp=2 ep=2 overlap.num_chunks=2 overlap.enabled=false"),
    Layout("tp2-ep2", 2, "tp=2 ep=2", "two_per_micro_batch"),
    Layout("tp2-ep2-chunks2-after_attention", 2, "tp=2 ep=2 overlap.num_chunks=2 overlap.experts_after=attention"),
    Layout("ep2-recompute_full", 2, "ep=2 recompute=full"),
    Layout("ep2-recompute_selective", 2, "ep=2 recompute=selective"),
    Layout("pp2-1f1b", 2, "pp=2 schedule=1f1b"),
    Layout("pp2-interleaved", 2, "pp=2 schedule=interleaved", "two_per_micro_batch"),
    Layout("pp2-zbv", 2, "pp=2 schedule=zbv"),
    Layout("pp2-dualpipev", 2, "pp=2 schedule=dualpipev"),
    Layout("pp2-zbv-seven_layers", 2, "pp=2 schedule=zbv", "seven_layers"),
    Layout("pp2-zbv-recompute_full", 2, "pp=2 schedule=zbv recompute=full", "documents"),
    Layout("pp2-1f1b-no_mtp", 2, "pp=2 schedule=1f1b", "no_mtp"),
    Layout("pp2-zbv-ep2", 4, "pp=2 schedule=zbv ep=2"),
    Layout("pp2-zbv-ep2-recompute_full-chunks2", 4, "pp=2 schedule=zbv ep=2 recompute=full overlap.num_chunks=2"),
    Layout("pp2-1f1b-tp2", 4, "pp=2 schedule=1f1b tp=2"),
    Layout("pp2-zbv-tp2-compile", 4, "pp=2 schedule=zbv tp=2 compile=true"),
    Layout("pp2-dualpipev-cp2-ep2", 4, "pp=2 schedule=dualpipev cp=2 ep=2", "documents"),
    Layout("pp4-1f1b-seven_layers", 4, "pp=4 schedule=1f1b", "seven_layers"),
    Layout("pp4-zbv", 4, "pp=4 schedule=zbv", "eight_layers"),
    Layout("zero1", 2, "sharding=zero1"),
    Layout("zero2", 2, "sharding=zero2", "two_per_micro_batch"),
    Layout("zero3", 2, "sharding=zero3"),
    Layout("ep2-late_mtp", 2, "ep=2", "late_mtp"),
    Layout("pp2-zbv-late_mtp", 2, "pp=2 schedule=zbv", "late_mtp"),
    Layout("zero1-late_mtp", 2, "sharding=zero1", "late_mtp"),
    Layout("zero3-late_mtp", 2, "sharding=zero3", "late_mtp"),
    Layout("zero1-ep2", 2, "sharding=zero1 ep=2"),
    Layout("zero2-ep2-recompute_full", 2, "sharding=zero2 ep=2 recompute=full", "documents"),
    Layout("zero2-offload", 2, "sharding=zero2 offload=cpu", "two_per_micro_batch"),
    Layout("zero1-dp2-fsdp2-ep2", 4, "sharding=zero1 dp=2 fsdp=2 ep=2"),
    Layout("zero1-cp2-ep2", 4, "sharding=zero1 fsdp=2 cp=2 ep=2"),
    Layout("zero3-recompute_selective", 4, "sharding=zero3 recompute=selective", "two_per_micro_batch"),
    Layout("cp2-tp2-ep4", 4, "cp=2 tp=2 ep=4", "documents"),
    Layout("fsdp2-cp2-ep4", 4, "fsdp=2 cp=2 ep=4"),
    Layout("dp2-fsdp2-ep2", 4, "dp=2 fsdp=2 ep=2"),
    Layout("fsdp4-ep2", 4, "fsdp=4 ep=2", "two_per_micro_batch"),
    Layout("cp4-ep2", 4, "cp=4 ep=2"),
    Layout("tp4", 4, "tp=4"),
    Layout("fsdp2-tp2-ep2-recompute_full", 4, "fsdp=2 tp=2 ep=2 recompute=full", "documents"),
    Layout("fsdp2-cp2-tp2-ep8", 8, "fsdp=2 cp=2 tp=2 ep=8"),
    Layout("dp2-fsdp2-cp2-ep4", 8, "dp=2 fsdp=2 cp=2 ep=4"),
    Layout("pp2-zbv-fsdp2-ep2", 4, "pp=2 schedule=zbv fsdp=2 ep=2"),
    Layout("pp2-zbv-tp2-ep4-chunks2", 8, "pp=2 schedule=zbv fsdp=2 tp=2 ep=4 overlap.num_chunks=2 recompute=full"),
    Layout("pp2-1f1b-fsdp2-cp2-ep4", 8, "pp=2 schedule=1f1b fsdp=2 cp=2 ep=4 recompute=selective"),
]

COMPILED = Layout("tp2-compile", 2, "tp=2 compile=true")
COMPILED_PACKED = Layout("tp2-compile-packed", 2, "tp=2 compile=true", "packed")
QUANTILE = [
    Layout("tp2-ep2-recompute_full-quantile", 2, "tp=2 ep=2 recompute=full", "quantile"),
    Layout("pp2-zbv-fsdp2-cp2-quantile", 8, "pp=2 schedule=zbv fsdp=2 cp=2", "quantile"),
]
PACKED = [
    Layout("tp2-ep2-recompute_full-packed", 2, "tp=2 ep=2 recompute=full", "packed"),
    Layout("cp2-ep2-all_gather-packed", 2, "cp=2 ep=2 transport=all_gather overlap.num_chunks=2", "packed"),
    Layout("pp2-zbv-packed", 2, "pp=2 schedule=zbv", "packed"),
    Layout("dp2-fsdp2-ep2-packed", 4, "dp=2 fsdp=2 ep=2", "packed"),
    Layout("zero1-ep2-packed", 2, "sharding=zero1 ep=2", "packed"),
]
YARN = [Layout("cp2-yarn", 2, "cp=2", "yarn"), Layout("pp2-zbv-tp2-yarn", 4, "pp=2 schedule=zbv tp=2", "yarn")]

# Of the layouts with more than two ranks, those in `make test`: with pp2-zbv-tp2-yarn they combine every axis with
# every other one. tp2-compile compiles on two ranks what pp2-zbv-tp2-compile compiles on four.
IN_EVERY_RUN = ("zero1-dp2-fsdp2-ep2", "cp2-tp2-ep4", "dp2-fsdp2-ep2", "pp2-zbv-fsdp2-ep2")
# Of those with two ranks, the ones that another layout of `make test` covers: it does the same and more
COVERED = {
    "ep2-chunks2-blocking": "cp2-ep2-chunks2-blocking",
    "ep2-chunks2-after_attention": "tp2-ep2-chunks2-after_attention",
    "tp2-ep2": "tp2-ep2-chunks2-after_attention",
    "cp2": "cp2-documents",
    "cp2-ep2": "cp2-ep2-chunks2",
    "zero1": "zero1-ep2",
    "zero1-ep2-packed": "tp2-ep2-recompute_full-packed",
}


def marked(layouts: list[Layout]) -> list[Any]:
    """The layouts as pytest's parameters; those that `make test` leaves to `make parity` are long."""
    long = [one.name in COVERED or (one.ranks > 2 and one.name not in IN_EVERY_RUN) for one in layouts]
    return [
        pytest.param(one, id=one.name, marks=[pytest.mark.long] * is_long)
        for one, is_long in zip(layouts, long, strict=True)
    ]
