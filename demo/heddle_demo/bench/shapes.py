"""Sizes of well-known models, so that measurements need their shape and not their weights. Knows nothing of heddle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of the Llama family."""

    name: str
    architecture: str  # "llama" or "qwen2", which has biases on q, k and v
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary_size: int
    has_tied_embeddings: bool
    context_length: int
    rope_theta: float

    @property
    def has_qkv_bias(self) -> bool:
        return self.architecture == "qwen2"

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of one layer's linears by path, in module order."""
        hidden, wide = self.hidden_size, self.intermediate_size
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }

    def has_bias(self, linear: str) -> bool:
        """Whether the linear at this path within a layer has one."""
        return self.has_qkv_bias and linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of a checkpoint."""
        yield "model.embed_tokens.weight", (self.vocabulary_size, self.hidden_size)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for name, shape in self.linears().items():
                yield f"{prefix}.{name}.weight", shape
                if self.has_bias(name):
                    yield f"{prefix}.{name}.bias", shape[:1]
            yield f"{prefix}.input_layernorm.weight", (self.hidden_size,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden_size,)
        yield "model.norm.weight", (self.hidden_size,)
        if not self.has_tied_embeddings:
            yield "lm_head.weight", (self.vocabulary_size, self.hidden_size)

    @property
    def num_weights(self) -> int:
        return sum(math.prod(size) for _, size in self.tensors())

    def config(self) -> dict[str, Any]:
        """What transformers needs to build it."""
        return {
            "architectures": ["Qwen2ForCausalLM" if self.has_qkv_bias else "LlamaForCausalLM"],
            "model_type": self.architecture,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocabulary_size,
            "tie_word_embeddings": self.has_tied_embeddings,
            "max_position_embeddings": self.context_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def write_config(self, folder: Path) -> None:
        """A model folder without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config(), indent=1) + "\n")


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape(
            name="tiny",
            architecture="qwen2",
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            intermediate_size=256,
            vocabulary_size=512,
            has_tied_embeddings=True,
            context_length=512,
            rope_theta=1e4,
        ),
        ModelShape(
            name="qwen2.5-0.5b",
            architecture="qwen2",
            hidden_size=896,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=4864,
            vocabulary_size=32_000,  # the original's 151,936 would make a small machine measure its output layer
            has_tied_embeddings=True,
            context_length=32_768,
            rope_theta=1e6,
        ),
        ModelShape(
            name="qwen2.5-7b",
            architecture="qwen2",
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            intermediate_size=18_944,
            vocabulary_size=152_064,
            has_tied_embeddings=False,
            context_length=32_768,
            rope_theta=1e6,
        ),
        ModelShape(
            name="llama-3.1-8b",
            architecture="llama",
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=14_336,
            vocabulary_size=128_256,
            has_tied_embeddings=False,
            context_length=131_072,
            rope_theta=5e5,
        ),
    )
}
