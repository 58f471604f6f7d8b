"""A bottleneck adapter: behind every decoder layer a small two-layer network of its own.

With x the layer's output, it becomes `x + up(relu(down(x)))`: Pfeiffer's form, "seq_bn" in the `adapters` library,
whose file format `save` writes (its version 1.3.0; the weights' file is named as servers take it).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from heddle_demo.data import BASE_NAME

FORMAT_VERSION = "adapters.1.3.0"
INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """The hidden size of the base over the width of the bottleneck, as the `adapters` library counts."""

    reduction_factor: int


class Bottleneck(nn.Module):
    """The network behind one decoder layer."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, width)
        self.up = nn.Linear(width, hidden_size)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, output: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same; computes in float32."""
        exact = output.float()
        edited: Tensor = exact + self.up(torch.relu(self.down(exact)))
        return edited.to(output.dtype)


class BottleneckModel(nn.Module):
    """The frozen base with a bottleneck behind each of its layers."""

    def __init__(self, base: LlamaForCausalLM, config: BottleneckConfig) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config = config
        hidden_size = base.config.hidden_size
        layers = base.model.layers
        width = hidden_size // config.reduction_factor
        self.bottlenecks = [Bottleneck(hidden_size, width) for _ in layers]
        self.trained = nn.ModuleList(self.bottlenecks)
        for layer, bottleneck in zip(layers, self.bottlenecks, strict=True):
            layer.register_forward_hook(lambda _module, _inputs, output, edit=bottleneck: edit(output))

    def forward(self, **inputs: Any) -> Any:
        """As the base's own."""
        return self.base(**inputs)

    def save(self, directory: Path) -> None:
        """Write a folder that can be uploaded, its tensors in bfloat16; the adapter is named like the folder."""
        name = directory.name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self._saved_config(name), indent=2))
        tensors = {
            key: parameter.detach().to(torch.bfloat16)
            for number, bottleneck in enumerate(self.bottlenecks)
            for key, parameter in _named(bottleneck, number, name).items()
        }
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    def load(self, directory: Path) -> None:
        """Take the tensors that `save` wrote."""
        tensors = load_file(directory / "adapter_model.safetensors")
        with torch.no_grad():
            for number, bottleneck in enumerate(self.bottlenecks):
                for key, parameter in _named(bottleneck, number, directory.name).items():
                    parameter.copy_(tensors.pop(key))
        assert not tensors, f"unknown tensors {sorted(tensors)}"

    def _saved_config(self, name: str) -> dict[str, Any]:
        """All that the library writes; what it is silent about there has the library's default."""
        return {
            "config": {
                "adapter_residual_before_ln": False,
                "cross_adapter": False,
                "dropout": 0.0,
                "inv_adapter": None,
                "is_parallel": False,
                "leave_out": [],
                "ln_after": False,
                "ln_before": False,
                "mh_adapter": False,
                "non_linearity": "relu",
                "original_ln_after": True,
                "original_ln_before": True,
                "output_adapter": True,
                "phm_layer": False,
                "reduction_factor": self.config.reduction_factor,
                "residual_before_ln": True,
                "scaling": 1.0,
                "use_gating": False,
            },
            "hidden_size": self.base.config.hidden_size,
            "model_class": type(self.base).__name__,
            "model_name": BASE_NAME,
            "model_type": self.base.config.model_type,
            "name": name,
            "version": FORMAT_VERSION,
        }


def _named(bottleneck: Bottleneck, number: int, name: str) -> dict[str, Tensor]:
    """The parameters of layer `number` by their names in the file."""
    prefix = f"model.layers.{number}.output_adapters.adapters.{name}"
    return {
        f"{prefix}.adapter_down.0.weight": bottleneck.down.weight,
        f"{prefix}.adapter_down.0.bias": bottleneck.down.bias,
        f"{prefix}.adapter_up.weight": bottleneck.up.weight,
        f"{prefix}.adapter_up.bias": bottleneck.up.bias,
    }
