"""A hand-made base layout and a LoRA for it, for tests that need no model and no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors.numpy import save_file

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import Floats

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.0.mlp.down_proj"
RANK = 2

BASE = BaseLayout(
    model_name="hand-made",
    fingerprint="sha256:" + "0" * 64,
    quantization="none",
    sites=(Site(Q, "linear", 8, 8, False), Site(V, "linear", 8, 4, True), Site(DOWN, "linear", 16, 8, False)),
)


class NoBase:
    """`source.BaseWeights` for adapters that are compiled without them: asking for one fails."""

    def weight(self, path: str) -> NoReturn:
        raise AssertionError(f"asked for the base's weight of {path}")

    def bias(self, path: str) -> NoReturn:
        raise AssertionError(f"asked for the base's bias of {path}")


def tensor_name(site: str, part: str) -> str:
    return f"base_model.model.{site}.{part}"


def lora_config(**changes: Any) -> dict[str, Any]:
    """As PEFT 0.21 saves it, shortened; `changes` replace fields."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/folder",
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "r": RANK,
        "target_modules": ["q_proj", "v_proj"],
        **changes,
    }


def lora_tensors(seed: int = 0) -> dict[str, Floats]:
    random = np.random.default_rng(seed)
    shapes = {
        tensor_name(site.path, part): shape
        for site in BASE.sites
        if site.path != DOWN
        for part, shape in {
            "lora_A.weight": (RANK, site.in_features),
            "lora_B.weight": (site.out_features, RANK),
        }.items()
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def config_bytes(config: dict[str, Any]) -> bytes:
    return json.dumps(config).encode()


def write_weights(path: Path, tensors: dict[str, Any]) -> Path:
    save_file(tensors, path)
    return path
