"""The activations that rows can apply, by the names that transformers gives them (`activations.ACT2FN`)."""

from __future__ import annotations

from collections.abc import Mapping

from heddle_adapters.adapter_config import AdapterConfig
from heddle_adapters.canonical import Activation
from heddle_adapters.errors import quoted

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_fast": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "linear": Activation.IDENTITY,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


def activation_of(config: AdapterConfig, field: str, default: str = "linear") -> Activation:
    """What a config names there; raises `InvalidAdapter` for what no row can apply."""
    name = (config.text(field) or default).lower()
    if name not in ACTIVATIONS:
        config.refuse(field, f"is {quoted(name)}, and served are {', '.join(ACTIVATIONS)}; train with one of these.")
    return ACTIVATIONS[name]
