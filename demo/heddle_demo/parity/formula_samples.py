"""Adapters of methods whose libraries do not run beside ours, with their formulas in plain torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from heddle_demo.parity.peft_sample import BaseOracle

WIDTH = 8  # of a bottleneck, or of a ReFT's subspace
SIZE = 0.2  # of random numbers
NUM_FIRST, NUM_LAST = 3, 2  # tokens that a ReFT changes

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "swish": functional.silu}


@dataclass(frozen=True)
class BottleneckSample:
    """A configuration of the `adapters` library 1.3 on a Llama."""

    name: str
    behind_attention: bool
    reads: str  # "module", "stream" or "parallel"
    activation: str
    scaling: float = 1.0
    on_plain_base_only: bool = False
    oracle_name: str = "formula"

    def save(self, base: Any, folder: Path, seed: int) -> None:
        hidden = base.config.hidden_size
        settings = {
            "mh_adapter": self.behind_attention,
            "output_adapter": True,
            "reduction_factor": hidden / WIDTH,
            "non_linearity": self.activation,
            "original_ln_before": self.reads == "stream",
            "original_ln_after": True,
            "residual_before_ln": True,
            "is_parallel": self.reads == "parallel",
            "scaling": self.scaling,
        }
        config = {
            "config": settings,
            "hidden_size": hidden,
            "model_type": "llama",
            "name": "sample",
            "version": "1.3.0",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "adapter_down.0.weight": (WIDTH, hidden),
            "adapter_down.0.bias": (WIDTH,),
            "adapter_up.weight": (hidden, WIDTH),
            "adapter_up.bias": (hidden,),
        }
        places = ["output_adapters", *(["attention_adapters"] if self.behind_attention else [])]
        tensors = {
            f"model.layers.{layer}.{place}.adapters.sample.{part}": SIZE * torch.randn(shape, generator=generator)
            for layer in range(base.config.num_hidden_layers)
            for place in places
            for part, shape in shapes.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors")

    def load(self, base: Any, folder: Path, gate: float = 1.0) -> BaseOracle:
        """`gate` multiplies what it adds."""
        model = copy.deepcopy(base)
        tensors = load_file(folder / "adapter_model.safetensors")
        for number, layer in enumerate(model.model.layers):
            behind_mlp = partial(
                self._compute, tensors, f"model.layers.{number}.output_adapters.adapters.sample.", gate
            )
            if self.behind_attention:
                place = f"model.layers.{number}.attention_adapters.adapters.sample."
                add_to_output(layer.self_attn, partial(self._compute, tensors, place, gate))
            if self.reads == "stream":
                add_to_output(layer, behind_mlp)
            elif self.reads == "module":
                add_to_output(layer.mlp, behind_mlp)
            else:
                add_from_input(layer.mlp, layer.post_attention_layernorm, behind_mlp)
        return BaseOracle(model)

    def _compute(self, tensors: Mapping[str, Tensor], place: str, gate: float, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (
            tensors[place + part].to(x.dtype)
            for part in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
        )
        h = ACTIVATIONS[self.activation](functional.linear(x, down, down_bias))
        return gate * self.scaling * functional.linear(h, up, up_bias)


@dataclass(frozen=True)
class ReftSample:
    """LoReFT: h + Pᵀ (W h + b − P h); DiReFT leaves the last term out."""

    name: str
    intervention: str
    on_plain_base_only: bool = False
    oracle_name: str = "formula"

    def save(self, base: Any, folder: Path, seed: int) -> None:
        hidden, layers = base.config.hidden_size, list(range(base.config.num_hidden_layers))
        config = {
            "peft_type": "HEDDLE_REFT",
            "intervention": self.intervention,
            "first": NUM_FIRST,
            "last": NUM_LAST,
            "layers": layers,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        torch.manual_seed(seed)
        tensors = {}
        for layer in layers:
            tensors[f"layers.{layer}.projection.weight"] = nn.init.orthogonal_(torch.empty(WIDTH, hidden))
            tensors[f"layers.{layer}.source.weight"] = SIZE * torch.randn(WIDTH, hidden)
            tensors[f"layers.{layer}.source.bias"] = SIZE * torch.randn(WIDTH)
        save_file(tensors, folder / "adapter_model.safetensors")

    def load(self, base: Any, folder: Path) -> ReftOracle:
        return ReftOracle(copy.deepcopy(base), load_file(folder / "adapter_model.safetensors"), self.intervention)


class ReftOracle:
    """A model whose layers' outputs are changed at some tokens of the prompt."""

    def __init__(self, model: Any, tensors: Mapping[str, Tensor], intervention: str) -> None:
        self._oracle = BaseOracle(model)
        self._is_changed = torch.zeros(0, dtype=torch.bool)  # [num_tokens]
        for number, layer in enumerate(model.model.layers):
            dtype = model.dtype
            p, w, b = (
                tensors[f"layers.{number}.{part}"].to(dtype)
                for part in ("projection.weight", "source.weight", "source.bias")
            )

            def edit(h: Tensor, p: Tensor = p, w: Tensor = w, b: Tensor = b) -> Tensor:
                target = functional.linear(h, w, b)
                change = (target - h @ p.T if intervention == "loreft" else target) @ p
                return torch.where(self._is_changed[:, None], change, 0)

            add_to_output(layer, edit)

    def logits(self, token_ids: list[int], num_prompt_tokens: int) -> Tensor:
        place = torch.arange(len(token_ids))
        self._is_changed = (place < NUM_FIRST) | ((place >= num_prompt_tokens - NUM_LAST) & (place < num_prompt_tokens))
        return self._oracle.logits(token_ids, num_prompt_tokens)


def add_to_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """The module answers y + change(y)."""

    def hook(_: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return output[0] + change(output[0]), *output[1:]
        return output + change(output)

    module.register_forward_hook(hook)


def add_from_input(module: nn.Module, read: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """The module answers y + change(x), where x is what `read` reads before it."""
    kept: list[Tensor] = []
    read.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    add_to_output(module, lambda _: change(kept.pop()))


FORMULA_SAMPLES = (
    BottleneckSample("bottleneck, Pfeiffer", False, "stream", "relu"),
    BottleneckSample("bottleneck, Houlsby", True, "module", "swish"),
    BottleneckSample("bottleneck, parallel", False, "parallel", "relu", scaling=4.0),
    ReftSample("LoReFT", "loreft"),
    ReftSample("DiReFT", "direft"),
)
