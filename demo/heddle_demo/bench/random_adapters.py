"""Adapters by the thousand, for measuring: LoRAs of random weights on every linear of a base.

An adapter's files depend on the seed and on its number alone. They go straight into a store, as an upload would put
them there, without a server and without torch, so that two thousand take seconds.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorFile

RANKS = (8, 16, 32, 64)  # in turn, so that any number of adapters has them equally often
WEIGHT_LIMIT = 0.02  # of each weight's size: an effect, and nothing that could overflow in any dtype
NOISE_LENGTH = (1 << 19) - 1  # a prime: no width divides it, so no two rows are alike
ROW_DTYPE_BYTES = 2  # rows are kept in the demo base's bfloat16


@dataclass(frozen=True)
class RandomAdapters:
    """An endless numbered row of adapters for one base."""

    base: BaseLayout
    seed: int = 0
    ranks: tuple[int, ...] = RANKS  # in turn
    weight_limit: float = WEIGHT_LIMIT

    def name(self, number: int) -> str:
        return f"random-{number:05d}"

    def names(self, count: int) -> list[str]:
        return [self.name(number) for number in range(count)]

    def rank(self, number: int) -> int:
        return self.ranks[number % len(self.ranks)]

    def row_bytes(self, number: int) -> int:
        """What its rows take in a pool, without page ends."""
        widths = sum(site.in_features + site.out_features for site in self.base.sites)
        return self.rank(number) * widths * ROW_DTYPE_BYTES

    def mean_row_bytes(self, count: int) -> float:
        """Mean of the first `count`, each as likely as the other."""
        return sum(map(self.row_bytes, range(count))) / count

    def config(self, number: int) -> bytes:
        """adapter_config.json"""
        fields = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base.model_name,
            "r": self.rank(number),
            "lora_alpha": self.rank(number),
            "target_modules": sorted({site.path.rpartition(".")[2] for site in self.base.sites}),
        }
        return json.dumps(fields).encode()

    def tensors(self, number: int) -> dict[str, NDArray[np.float16]]:
        """adapter_model.safetensors: per linear, A [rank, in_features] and B [out_features, rank]."""
        random = np.random.default_rng((self.seed, number))
        rank = self.rank(number)
        shapes = {
            f"base_model.model.{site.path}.{part}.weight": shape
            for site in self.base.sites
            for part, shape in (("lora_A", (rank, site.in_features)), ("lora_B", (site.out_features, rank)))
        }
        noise = _noise(self.seed, self.weight_limit)
        return {name: _weights(random, shape, noise) for name, shape in shapes.items()}


def write_peft_folder(folder: Path, adapters: RandomAdapters, number: int) -> None:
    """The adapter as PEFT saves one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(adapters.config(number))
    save_file(adapters.tensors(number), folder / WEIGHTS_FILE)


def fill_store(path: Path, adapters: RandomAdapters, count: int) -> None:
    """Makes a store at `path` that knows the first `count` adapters."""
    with AdapterStore(path) as store:
        for number in range(count):
            with store.upload_folder() as folder:
                weights_path = folder / WEIGHTS_FILE
                save_file(adapters.tensors(number), weights_path)
                config = adapters.config(number)
                checkpoint = read_checkpoint(config, weights_path, adapters.base)
                store.put(adapters.name(number), checkpoint, config, weights_path)


def linear_layout(model_path: Path) -> BaseLayout:
    """The linears of a checkpoint's layers, read from the header of its model.safetensors.

    Enough to check adapters against. Its fingerprint is that of no loaded base, so none may name one.
    """
    tensors = TensorFile(model_path / "model.safetensors").tensors
    sites = tuple(
        Site(
            path=name.removesuffix(".weight"),
            kind="linear",
            in_features=tensor.shape[1],
            out_features=tensor.shape[0],
            has_bias=name.removesuffix("weight") + "bias" in tensors,
        )
        for name, tensor in tensors.items()
        if ".layers." in name and name.endswith(".weight") and len(tensor.shape) == 2
    )
    return BaseLayout(model_path.name, "sha256:" + "0" * 64, "none", sites)


def _weights(random: np.random.Generator, shape: tuple[int, int], noise: NDArray[np.float16]) -> NDArray[np.float16]:
    """From somewhere in the noise on, around and around."""
    start = int(random.integers(len(noise)))
    return np.resize(np.roll(noise, -start), shape)


@functools.cache
def _noise(seed: int, limit: float) -> NDArray[np.float16]:
    """Uniform in [-limit, limit). Drawn once: drawing each weight would take an 8B model's adapter a second."""
    uniform = np.random.default_rng(seed).random(NOISE_LENGTH, dtype=np.float32)
    return ((uniform * 2 - 1) * np.float32(limit)).astype(np.float16)
