"""A first look at a loaded model, without its weights: what it sends to attention, and which linears read together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heddle_adapters.base_layout import KvLayout
from heddle_server.config import ConfigError
from heddle_server.engine.attention import AttentionProbe
from heddle_server.engine.places import Places, SeenModules, find_places, layers_of, norms_of, unmistakable


@dataclass(frozen=True)
class Probe:
    """What one forward of a few tokens showed."""

    kv_layout: KvLayout
    shared_inputs: tuple[tuple[str, ...], ...]  # paths of neighbouring linears that were given the very same tensor
    places: Places  # what adapters may change beside linears


@torch.inference_mode()
def probe(model: PreTrainedModel) -> Probe:
    """Run the modelling code once with every linear answering zeros, so that no weight is read or repacked.

    Raises ConfigError when not every layer passes through transformers' attention interface, or they differ.
    """
    attention = AttentionProbe()
    inputs: dict[str, Tensor] = {}  # of each linear; held, so that no two of them have one identity
    seen = SeenModules()
    num_tokens = unmistakable(model)
    with ExitStack() as stubs:
        for path, module in linears_of(model):
            stubs.enter_context(_answering_zeros(module, path, inputs))
        for path, module in norms_of(model):
            stubs.callback(module.register_forward_hook(_noting(path, seen.inputs, seen.outputs)).remove)
        for path, layer in layers_of(model):
            stubs.callback(layer.register_forward_hook(_noting(path, seen.inputs, seen.outputs)).remove)
            for name, module in layer.named_children():
                stubs.callback(
                    module.register_forward_hook(_noting(f"{path}.{name}", seen.inputs, seen.outputs)).remove
                )
        tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.device)
        positions = torch.arange(num_tokens, device=model.device)[None]
        model(input_ids=tokens, position_ids=positions, use_cache=False, heddle_attention=attention)
    num_layers = model.config.get_text_config().num_hidden_layers
    if sorted(attention.shapes) != list(range(num_layers)) or len(set(attention.shapes.values())) != 1:
        raise ConfigError(
            f"{type(model).__name__} sends {len(attention.shapes)} of its {num_layers} layers through transformers' "
            f"attention interface, with key shapes {sorted(set(attention.shapes.values()))}; heddle serves models that "
            "send all of them, in one shape."
        )
    kv_layout = KvLayout(num_layers, *attention.shapes[0])
    return Probe(kv_layout, tuple(_shared(model, inputs)), find_places(model, seen, num_tokens))


def linears_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear with its path, in module order: torch's and bitsandbytes', and GPT-2's Conv1D."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear."""
    if isinstance(module, Conv1D):  # GPT-2's linear, whose weight is stored [in, out]
        in_features, out_features = module.weight.shape
        return in_features, out_features
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


@contextmanager
def _answering_zeros(module: nn.Module, path: str, inputs: dict[str, Tensor]) -> Iterator[None]:
    own: Callable[..., Tensor] | None = module.__dict__.get("forward")
    out_features = features(module)[1]

    def answer(x: Tensor) -> Tensor:
        inputs[path] = x
        return x.new_zeros(*x.shape[:-1], out_features)

    module.forward = answer
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _noting(path: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Callable[..., None]:
    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            inputs[path] = arguments[0]
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            outputs[path] = first

    return note


def _shared(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[tuple[str, ...]]:
    """Runs of two and more; the head computes other rows than the layers do and stays by itself."""
    head = model.get_output_embeddings()
    seen = [path for path, module in linears_of(model) if path in inputs and module is not head]
    for _, run in groupby(seen, key=lambda path: id(inputs[path])):
        if len(paths := tuple(run)) > 1:
            yield paths
