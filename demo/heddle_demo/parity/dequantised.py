"""A 4-bit base with its weights written out in float32: the truth that 4-bit serving is compared to."""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def dequantised_twin(folder: Path, double_quantization: bool) -> PreTrainedModel:
    """The NF4 base of a plain checkpoint as an ordinary float32 model with eager attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.float(), requires_grad=False)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plain)
    model.quantization_method = None
    return model.eval()
