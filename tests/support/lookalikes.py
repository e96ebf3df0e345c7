"""Small folders that look like released checkpoints, made from an export of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder of safetensors."""
    return {name: values for path in sorted(folder.glob("*.safetensors")) for name, values in load_file(path).items()}


def lookalike(
    export: Path,
    folder: Path,
    fields: dict[str, Any] | None = None,
    drop: Iterable[str] = (),
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    record: bool = False,
) -> Path:
    """A folder with an export's weights after ``change`` in one file, and its config.json with other ``fields``.

    Fields in ``drop`` are left out; ``record`` keeps longcat.json, which released folders do not have.
    """
    folder.mkdir()
    tree = json.loads((export / "config.json").read_text())
    tree = {name: value for name, value in tree.items() if name not in drop} | (fields or {})
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(change(read_tensors(export)), folder / "model.safetensors", metadata={"format": "pt"})
    for name in ["tokenizer.json", *(["longcat.json"] if record else [])]:
        shutil.copyfile(export / name, folder / name)
    return folder


def quantize(tensors: Tensors, block: tuple[int, int]) -> tuple[Tensors, Tensors]:
    """FP8 weights with scales as the released files have them, and the values that they stand for.

    Matrices of attention, FFNs and experts are quantised; routers, norms, embeddings and the head are not.
    """
    stored, values = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or any(part in name for part in ("router", "embed_tokens", "lm_head", "eh_proj")):
            stored[name] = values[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
        quantized, meaning = torch.empty_like(tensor, dtype=torch.float8_e4m3fn), torch.empty_like(tensor)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scales[i, j] = tensor[part].abs().max() / 448
                quantized[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
                meaning[part] = quantized[part].float() * scales[i, j]
        stored[name], stored[f"{name}_scale_inv"], values[name] = quantized, scales, meaning
    return stored, values


def fp8_config(block: tuple[int, int]) -> dict[str, Any]:
    """The quantization_config of the released FP8 files."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "ignored_layers": ["lm_head", "model.layers.0.mlp.router.classifier"],
    }
