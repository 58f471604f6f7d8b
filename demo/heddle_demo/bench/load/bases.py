"""The bases that the tables are measured on: the demo's own, and random weights of a 0.5B model's sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from heddle_demo.bench.random_base import write_random_base
from heddle_demo.bench.shapes import SHAPES
from heddle_demo.bench.word_tokenizer import write_word_tokenizer
from heddle_demo.data import BASE_DIR

DEMO = "demo"
ROW_DTYPE_BYTES = 2


@dataclass(frozen=True)
class LoadBase:
    """A transformers folder, and what memory its requests take."""

    name: str
    path: Path

    def kv_bytes(self, num_tokens: int) -> int:
        """Keys and values of so many tokens, in 16 bits."""
        config = json.loads((self.path / "config.json").read_text())
        num_heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        width = config.get("num_key_value_heads", num_heads) * head_dim
        return int(2 * config["num_hidden_layers"] * width * ROW_DTYPE_BYTES * num_tokens)


def make_base(name: str, folder: Path) -> LoadBase:
    """The base of that name: `demo`, or one of `shapes`, whose files are written into `folder`."""
    if name == DEMO:
        return LoadBase(DEMO, BASE_DIR)
    shape, path = SHAPES[name], folder / name
    write_random_base(shape, path, torch.device("cpu"))
    write_word_tokenizer(path, shape.vocabulary_size)
    return LoadBase(name, path)
