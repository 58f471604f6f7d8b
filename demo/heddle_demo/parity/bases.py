"""The two bases that methods are compared on: a tiny random Llama in float32, and the demo's in 4 bits and bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from heddle_demo.data import BASE_DIR
from heddle_demo.parity.dequantised import dequantised_twin
from heddle_demo.parity.measure import Bases

POOL_BYTES = 256 << 20
NUM_PROMPT_TOKENS = 40
NUM_NEW_TOKENS = 16
# Enough places for a 99th percentile of bfloat16's errors; in float32 all of them are the same few digits.
NUM_PROMPTS_FP32, NUM_PROMPTS_BF16 = 2, 24
# What some samples act on: the invocation of an activated LoRA, and tokens that have rows of their own.
MARKED = {20: 5, 21: 9, 25: 3, 30: 17, 33: 42, 36: 64}


def tiny_llama(folder: Path, num_new_tokens: int = NUM_NEW_TOKENS) -> Bases:
    """Two layers, random, untied; served and computed in float32."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    settings = {"quantization": "none", "dtype": "float32", "pool_bytes": POOL_BYTES}
    prompts = prompts_for(config.vocab_size, NUM_PROMPTS_FP32)
    return Bases(folder, model, None, settings, prompts, num_new_tokens)


def demo_base(num_prompts: int = NUM_PROMPTS_BF16, num_new_tokens: int = NUM_NEW_TOKENS) -> Bases:
    """The demo's base in NF4, served in bfloat16; its oracles hold the dequantised weights."""
    truth = dequantised_twin(BASE_DIR, double_quantization=True)
    rounded = copy.deepcopy(truth).to(torch.bfloat16)
    settings = {"dtype": "bfloat16", "pool_bytes": POOL_BYTES}
    return Bases(BASE_DIR, truth, rounded, settings, prompts_for(truth.config.vocab_size, num_prompts), num_new_tokens)


def prompts_for(vocabulary_size: int, num_prompts: int) -> list[list[int]]:
    """Random, with the tokens that samples act on."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary_size, (num_prompts, NUM_PROMPT_TOKENS), generator=generator).tolist()
    for prompt in prompts:
        for place, token in MARKED.items():
            prompt[place] = token
    return prompts
