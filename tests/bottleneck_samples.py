"""Random bottleneck adapters as the adapters library saves them, and the library's own computation in plain torch.

What `computed_by_the_library` writes down follows its `methods/modeling.py` (Adapter and ParallelAdapter, pre_forward
to post_forward, where no layer norm is given). Checked once against the library itself, 1.3.0 over transformers 4.57.6,
for tiny Llama, Mistral, Qwen2, Qwen3 and GPT-2 with each of CONFIGS: the logits of its saves, read by heddle, differ by
at most 1.8e-7, where the adapters' effect is 0.18 to 0.94.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from block_hooks import MLP_NORMS
from heddle_adapters.base_layout import BaseLayout

NAME = "sample"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.1,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 8,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
HOULSBY = {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
CONFIGS: dict[str, dict[str, Any]] = {
    "seq_bn": {},
    "double_seq_bn": HOULSBY | {"reduction_factor": 6},
    "par_bn": {"is_parallel": True, "original_ln_before": False, "scaling": 4.0, "reduction_factor": 4},
    "scaled_par_bn": {"is_parallel": True, "scaling": "learned", "non_linearity": "gelu_new"},
    "channel": {"scaling": "channel", "reduction_factor": {"0": 8, "default": 16.0}, "non_linearity": "silu"},
    "adapter_plus": {"original_ln_after": False, "residual_before_ln": False, "reduction_factor": 9},
    "attention only": HOULSBY | {"output_adapter": False, "leave_out": [1]},
    "mlp only": HOULSBY | {"mh_adapter": False, "scaling": 0.7, "non_linearity": "linear"},
}
PLACES = {"attention_adapters": "mh_adapter", "output_adapters": "output_adapter"}
FUNCTIONS: Mapping[str, Any] = {
    "relu": torch.relu,
    "swish": torch.nn.functional.silu,
    "silu": torch.nn.functional.silu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "linear": lambda x: x,
}


def bottleneck_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """As the library writes it; `changes` replace fields of the nested object."""
    return {
        "config": {**DEFAULTS, **changes},
        "hidden_size": 64,
        "model_class": "LlamaForCausalLM",
        "model_name": "some/folder",
        "model_type": model_type,
        "name": NAME,
        "version": "adapters.1.3.0",
    }


def bottleneck_tensors(config: Mapping[str, Any], base: BaseLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ones of every place that the config names, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    settings, tensors = config["config"], dict[str, torch.Tensor]()
    for number, layer in enumerate(base.layers):
        hidden = base.site(layer.output or "").out_features
        factor = settings["reduction_factor"]
        if isinstance(factor, dict):
            factor = factor.get(str(number), factor["default"])
        width = max(1, int(hidden // factor))
        shapes: dict[str, tuple[int, ...]] = {
            "adapter_down.0.weight": (width, hidden),
            "adapter_down.0.bias": (width,),
            "adapter_up.weight": (hidden, width),
            "adapter_up.bias": (hidden,),
        }
        if isinstance(settings["scaling"], str):
            shapes["scaling"] = (hidden,) if settings["scaling"] == "channel" else (1,)
        for place, flag in PLACES.items():
            if settings[flag] and number not in settings["leave_out"]:
                for part, shape in shapes.items():
                    tensors[f"{layer.output}.{place}.adapters.{NAME}.{part}"] = 0.2 * torch.randn(
                        shape, generator=generator
                    ) + (1 if part == "scaling" else 0)
    return tensors


def save_bottleneck(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """The two files of an upload."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


@contextmanager
def computed_by_the_library(
    model: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseLayout
) -> Iterator[None]:
    """While it lasts, `model` computes as it does under the library."""
    settings, handles = config["config"], list[Any]()

    def replace_output(place: str, layer_path: str, module: Any, reader: Any) -> None:
        """`module` adds to the stream; `reader` is what reads the stream before it."""
        prefix = f"{layer_path}.{place}.adapters.{NAME}."
        stream: list[torch.Tensor] = []

        def bottleneck(h: torch.Tensor) -> torch.Tensor:
            down = h @ tensors[prefix + "adapter_down.0.weight"].T + tensors[prefix + "adapter_down.0.bias"]
            up = FUNCTIONS[settings["non_linearity"]](down) @ tensors[prefix + "adapter_up.weight"].T
            scaling = tensors.get(prefix + "scaling", settings["scaling"])
            scaled: torch.Tensor = (up + tensors[prefix + "adapter_up.bias"]) * scaling
            return scaled

        def change(_: Any, __: Any, output: Any) -> Any:
            h, x = (output[0] if isinstance(output, tuple) else output), stream.pop()
            if settings["is_parallel"]:
                after = bottleneck(x) + h + x
            else:
                read = h + x if settings["original_ln_before"] else h
                after = bottleneck(read) + (h if settings["residual_before_ln"] else read)
                after = after + x if settings["original_ln_after"] else after
            return (after - x, *output[1:]) if isinstance(output, tuple) else after - x

        handles.append(reader.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0])))
        handles.append(module.register_forward_hook(change))

    for number, layer in enumerate(base.layers):
        module = model.get_submodule(layer.output)
        norms = [getattr(module, name) for name in ("input_layernorm", "ln_1", *MLP_NORMS) if hasattr(module, name)]
        for place, flag, path, norm in zip(PLACES, PLACES.values(), (layer.attention, layer.mlp), norms, strict=True):
            if settings[flag] and number not in settings["leave_out"]:
                replace_output(place, layer.output or "", model.get_submodule(path), norm)
    yield
    for handle in handles:
        handle.remove()
