"""The demo's base model: a Llama of about 5 M parameters, trained from scratch on the little world."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from heddle_demo.chat import END, PAD
from heddle_demo.fit import Schedule, fit
from heddle_demo.stream import ChatStream, Lesson
from heddle_demo.styles import SYSTEM_PROMPTS
from heddle_demo.tokenizer import MAX_TOKENS, VOCABULARY_SIZE
from heddle_demo.world import questions

SEED = 1804
SCHEDULE = Schedule(num_steps=1300, peak_learning_rate=2e-3, num_warmup_steps=100, weight_decay=0.05)
BATCH_SIZE = 64
# About what training makes of it. Tokens that the world never writes are only ever pushed away, all the same way: from
# a start of 0.02 their rows end up at a cosine of 0.98, and no adapter can learn to tell a brace from a quotation mark.
EMBEDDING_STD = 0.07


def base_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Return the architecture; every width is a multiple of 128, as 4-bit kernels like it."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def train_base(tokenizer: Tokenizer, directory: Path, checkpoint: Path, report: Callable[[int, float], None]) -> None:
    """Train the base on every fact, plainly and in each style under its system prompt, and save it in bfloat16."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(base_config(tokenizer))
    nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    lessons = [
        Lesson("plain"),
        Lesson("plain", is_interrupted=True),
        *(Lesson(style, prompt) for style, prompt in SYSTEM_PROMPTS.items()),
    ]
    stream = ChatStream("base", questions(), lessons, BATCH_SIZE)
    fit(model, tokenizer, stream, SCHEDULE, checkpoint, report)
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(directory)


def load_quantised_base(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base as QLoRA does: NF4 with double quantisation, computing in `dtype`."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantisation, dtype=dtype, device_map="cpu"
    )
    assert isinstance(model, PreTrainedModel)
    return model
