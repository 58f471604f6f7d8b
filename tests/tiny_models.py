"""Tiny random checkpoints of the model families that heddle serves, saved as plain transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96}
LONGROPE_LENGTH = 32  # positions beyond it want the long factors
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": LONGROPE_LENGTH,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0],
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "layer_types": ALTERNATING, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 24, "layer_types": ALTERNATING, "query_pre_attn_scalar": 16},
    "phi3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "glm4": {"partial_rotary_factor": 0.5},
    "cohere": {"logit_scale": 0.5},
    "starcoder2": {"sliding_window": 24},
    "gpt_neox": {},
    "gpt2": GPT2,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
}


def make_tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model whose logits spread over several units, so that differences would show."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    torch.manual_seed(sorted(FAMILIES).index(family))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_tiny_model(folder: Path, family: str, **overrides: Any) -> PreTrainedModel:
    model = make_tiny_model(family, **overrides)
    model.save_pretrained(folder)
    return model
