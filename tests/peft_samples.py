"""Tiny random models and real PEFT saves for them: the oracle for everything that reads or serves adapters.

Nothing here is trained. Adapter weights are random and large, so that a wrong fold is far outside any tolerance.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.utils.warning import PeftWarning
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import Floats

KINDS = ("lora", "rslora", "patterns", "lora_bias", "ia3", "ia3_feedforward")
KINDS_OF_WEIGHTS = ("dora",)  # beside these: what the adapter computes depends on the base's own numbers

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(seed: int = 0) -> Any:
    """Two layers, grouped key/value heads, no biases; float32, eval mode."""
    return _random_model(LlamaForCausalLM, LlamaConfig(**SIZES), seed)


def tiny_qwen2(seed: int = 0) -> Any:
    """As the Llama, with biases on q, k and v that are not zero."""
    return _random_model(Qwen2ForCausalLM, Qwen2Config(**SIZES), seed)


def tiny_gpt2(seed: int = 0) -> Any:
    """Conv1D layers: weights stored [in, out], all with biases."""
    sizes = GPT2Config(
        vocab_size=128, n_embd=64, n_inner=112, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    )
    return _random_model(GPT2LMHeadModel, sizes, seed)


def _random_model(architecture: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = architecture(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model.eval()


def layout_of(model: Any) -> BaseLayout:
    """The layout of a transformers model: each of its linear layers but the head."""
    return BaseLayout(
        model_name=f"tiny {model.config.model_type}",
        fingerprint="sha256:" + "0" * 64,
        quantization="none",
        sites=tuple(
            Site(path, "linear", *_widths(module), has_bias=module.bias is not None)
            for path, module in _linear_layers(model).items()
        ),
    )


class ModelWeights:
    """`source.BaseWeights` out of a torch model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def weight(self, path: str) -> Floats:
        module = self._model.get_submodule(path)
        weight: Floats = module.weight.detach().float().numpy()
        return weight.T if isinstance(module, Conv1D) else weight

    def bias(self, path: str) -> Floats | None:
        bias = getattr(self._model.get_submodule(path), "bias", None)
        return None if bias is None else bias.detach().float().numpy()


def make_adapter(
    model: Any, kind: str, folder: Path, *, rank: int = 4, targets: tuple[str, ...] | None = None, seed: int = 0
) -> Any:
    """Saves a random adapter of such a kind into `folder` and returns its PeftModel, which wraps a copy of `model`.

    `targets` are module path endings; by default all linear layers but the head.
    """
    chosen = targets or tuple(sorted({path.rpartition(".")[2] for path in _linear_layers(model)}))
    torch.manual_seed(seed)
    peft_model = adapted(copy.deepcopy(model), _config(model, kind, rank, chosen))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "ia3_" in name:
                parameter.normal_(1, 0.4)
            elif "lora_" in name:
                parameter.normal_(0, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # it takes the bias of B for a shard of a torn save
        peft_model.save_pretrained(folder)
    return peft_model


def adapted(model: Any, config: Any) -> Any:
    """PEFT's `get_peft_model`, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers deprecates
        warnings.simplefilter("ignore", PeftWarning)  # lora_bias on a layer without a bias cannot be merged
        return get_peft_model(model, config).eval()


def _config(model: Any, kind: str, rank: int, targets: tuple[str, ...]) -> Any:
    is_transposed = model.config.model_type == "gpt2"
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "fan_in_fan_out": is_transposed}
    if kind == "ia3":
        return IA3Config(target_modules=list(targets), feedforward_modules=[], **common)
    if kind == "ia3_feedforward":
        down = "mlp.c_proj" if is_transposed else "down_proj"
        return IA3Config(target_modules=[*targets, down], feedforward_modules=[down], **common)
    common |= {"r": rank, "lora_alpha": 3 * rank, "target_modules": list(targets)}
    if kind == "lora":
        return LoraConfig(**common)
    if kind == "rslora":
        return LoraConfig(use_rslora=True, **common)
    if kind == "lora_bias":
        return LoraConfig(lora_bias=True, **common)
    if kind == "dora":
        return LoraConfig(use_dora=True, **common)
    if kind == "patterns":
        first, second = list(_linear_layers(model))[:2]
        last = targets[-1]
        # The first module matches two keys of each map; PEFT takes the first in the file, which is sorted.
        return LoraConfig(
            rank_pattern={f"^{first}": rank + 3, first.rpartition(".")[2]: rank + 1, last: rank + 2},
            alpha_pattern={f"^{first}$": 1.5, first.rpartition(".")[2]: 7, second: 0.5},
            **common,
        )
    raise ValueError(f"unknown kind {kind}")


def _linear_layers(model: Any) -> dict[str, Any]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path != "lm_head"
    }


def _widths(module: Any) -> tuple[int, int]:
    """In and out; a Conv1D stores its weight [in, out], a Linear [out, in]."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)
