"""A base as its config describes it: layers, shapes and bytes, without one weight.

The model is built on torch's meta device by the code that loads real ones, and looked at by the same probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from heddle_adapters.base_layout import Site
from heddle_kernels.site_group import MAX_SITES
from heddle_server.config import PAGE_TOKENS, ConfigError, EngineConfig
from heddle_server.engine.attention import ATTENTION_NAME, register_attention
from heddle_server.engine.model_loader import choose_dtype, fix_rope, own_quantization_name, quantization_of
from heddle_server.engine.probe import features, linears_of, probe
from heddle_server.engine.weave import site_of
from heddle_server.estimate.quantized_bytes import QuantizedForm

META = torch.device("meta")


@dataclass(frozen=True)
class BaseOutline:
    """What of a base decides what fits beside it."""

    dtype: str
    quantization: str  # "nf4", "fp4", "int8" or "none"
    sites: tuple[Site, ...]
    attention_paths: frozenset[str]  # of the sites inside attention modules
    vocabulary_size: int
    context_length: int
    weights_bytes: int
    quantized_bytes: int  # of weights_bytes
    page_bytes: int  # of PAGE_TOKENS tokens' keys and values


def outline(config: EngineConfig, device_type: str) -> BaseOutline:
    """As `heddle serve` would hold it on such a device. Raises ConfigError for what it would not serve."""
    model_config = AutoConfig.from_pretrained(Path(config.model_path), local_files_only=True)
    dtype = choose_dtype(config.dtype, model_config)
    model, quantization = _empty_model(model_config, config, dtype)
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    fix_rope(model, min(config.max_model_len or context_length, context_length))
    probed = probe(model)
    form = QuantizedForm.of(config, quantization, dtype, device_type)
    quantized, unquantized = _weights_bytes(model, probed.shared_inputs, form, dtype)
    return BaseOutline(
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        sites=tuple(site_of(path, module) for path, module in linears_of(model)),
        attention_paths=frozenset(_inside_attention(model)),
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
        context_length=context_length,
        weights_bytes=quantized + unquantized,
        quantized_bytes=quantized,
        page_bytes=probed.kv_layout.page_bytes(PAGE_TOKENS, dtype.itemsize),
    )


def _empty_model(model_config: Any, config: EngineConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """The model without weights, its linears as the quantisation makes them; and that one's name."""
    own = own_quantization_name(model_config)
    if own not in (None, "nf4", "fp4", "int8"):
        raise ConfigError(f"this checkpoint is quantised by {own}; only bitsandbytes' formats can be estimated.")
    wanted = model_config.quantization_config if own else quantization_of(config, dtype)
    register_attention()
    try:
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    except ValueError as error:  # transformers' own words for a model that is none of its causal ones
        raise ConfigError(f"{config.model_path} is no causal language model: {error}") from error
    if wanted is not None:
        quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": META})
    model.tie_weights()
    model.config.pad_token_id = None  # GPT-2's code would look for it in the probe's token, which has no value here
    return model.eval(), own or config.quantization


def _weights_bytes(
    model: PreTrainedModel, runs: tuple[tuple[str, ...], ...], form: QuantizedForm, dtype: torch.dtype
) -> tuple[int, int]:
    """Of what is held quantised, scales included, and of the rest."""
    quantized, rest, counted = 0, 0, set[int]()
    for linears in _computed_together(model, runs):
        first = linears[0]
        in_features, out_features = features(first)[0], tuple(features(linear)[1] for linear in linears)
        if isinstance(first, Linear8bitLt):
            quantized += out_features[0] * (in_features + 4)  # a byte a weight, and one float32 a row
        elif isinstance(first, Linear4bit):
            quantized += form.size_bytes(in_features, out_features, is_nested=first.weight.compress_statistics)
            rest += form.dense_bytes(in_features, out_features)
        else:
            continue
        has_bias = any(linear.bias is not None for linear in linears)  # joined ones have zeros where one has none
        if has_bias and not form.takes_bias(in_features, out_features):
            rest += sum(out_features) * dtype.itemsize
        counted.update(id(parameter) for linear in linears for parameter in linear.parameters())
    rest += sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in counted)
    return quantized, rest


def _computed_together(model: PreTrainedModel, runs: tuple[tuple[str, ...], ...]) -> Iterator[list[Any]]:
    """Every linear once: 4-bit ones that read the same input together, as `weave` joins them."""
    linears = dict(linears_of(model))
    for run in runs:
        if len(run) <= MAX_SITES and all(type(linears[path]) is Linear4bit for path in run):
            yield [linears.pop(path) for path in run]
    yield from ([linear] for linear in linears.values())


def _inside_attention(model: nn.Module) -> Iterator[str]:
    """Paths of linears whose module calls itself an attention."""
    for path, _ in linears_of(model):
        parent = model.get_submodule(path.rpartition(".")[0])
        if "Attention" in type(parent).__name__:
            yield path
