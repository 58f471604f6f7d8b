"""LoRAs for the demo's base that each force a token of their own, so that an answer tells whose it is.

A bias on the head decides the token. Random rows on the attention decide what else is likely, so that keys and values
of another adapter's prefix would show in the other tokens' probabilities.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from safetensors.numpy import save

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_demo.data import BASE_DIR
from heddle_server.api.tokenizer import Tokenizer

RANKS = (6, 8, 12, 16)  # 3 to 8 pages of the pool
HEAD_BIAS = 100.0  # far above every logit of the base
STRENGTH = 0.08  # of random weights
FIRST_TOKEN = 300  # from here on every token is a piece of a word
NUM_FINGERPRINTS = 700
NUM_LAYERS, WIDTH, KV_WIDTH, VOCABULARY = 6, 256, 128, 1024
ATTENTION = {"q_proj": WIDTH, "k_proj": KV_WIDTH, "v_proj": KV_WIDTH, "o_proj": WIDTH}  # to out_features


@dataclass(frozen=True)
class Fingerprint:
    """One adapter's content; no two numbers below NUM_FINGERPRINTS force the same token."""

    number: int

    @property
    def token_id(self) -> int:
        return FIRST_TOKEN + self.number

    @property
    def rank(self) -> int:
        return RANKS[self.number % len(RANKS)]

    @cached_property
    def files(self) -> dict[str, bytes]:
        """What PEFT would have saved: file name to content."""
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": {"lm_head": 1},
            "lora_alpha": self.rank,
            "alpha_pattern": {"lm_head": 1},
            "lora_bias": True,
            "target_modules": [*ATTENTION, "lm_head"],
        }
        random = np.random.default_rng(self.number)
        tensors = self._module(random, "lm_head", 1, VOCABULARY)
        tensors["base_model.model.lm_head.lora_B.bias"][self.token_id] = HEAD_BIAS
        for layer in range(NUM_LAYERS):
            for name, out_features in ATTENTION.items():
                path = f"model.layers.{layer}.self_attn.{name}"
                tensors |= self._module(random, path, self.rank, out_features)
        return {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors)}

    def _module(
        self, random: np.random.Generator, path: str, rank: int, out_features: int
    ) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float16]]]:
        shapes = {"lora_A.weight": (rank, WIDTH), "lora_B.weight": (out_features, rank)}
        weights = {
            f"base_model.model.{path}.{part}": random.normal(0, STRENGTH, shape).astype(np.float16)
            for part, shape in shapes.items()
        }
        return {**weights, f"base_model.model.{path}.lora_B.bias": np.zeros(out_features, np.float16)}


def token_bytes() -> dict[int, bytes]:
    """What each fingerprint's token looks like in an answer; no two look the same."""
    tokenizer = Tokenizer(BASE_DIR)
    return {
        token_id: tokenizer.token_bytes(token_id) for token_id in range(FIRST_TOKEN, FIRST_TOKEN + NUM_FINGERPRINTS)
    }
