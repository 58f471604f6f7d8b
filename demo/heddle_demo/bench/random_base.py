"""A base of random weights as a transformers folder, so that whoever loads it has the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from heddle_demo.bench.shapes import ModelShape

BIAS_STD = 0.1


def write_random_base(shape: ModelShape, folder: Path, device: torch.device, seed: int = 0) -> None:
    """config.json and model.safetensors in bfloat16, drawn on `device`: 1 GB of a 0.5B shape takes seconds.

    A weight's standard deviation is fan_in ** -0.5, so that logits spread and the best token leads.
    """
    shape.write_config(folder)
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {name: _random_tensor(name, size, generator).cpu() for name, size in shape.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    std = BIAS_STD if name.endswith(".bias") else size[-1] ** -0.5
    return tensor.normal_(0.0, std, generator=generator)
