"""The linear layers of a base model's checkpoint, as its files name them. Reads headers only, no weights; no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heddle_loadtest.errors import SpecError

_REMEDY = "Name a transformers folder with config.json and unquantised safetensors files"
_LAYER_PARTS = (".layers.", ".h.")  # Llama and its many relatives; GPT-2, Bloom, Falcon
_SKIPPED_PARTS = (".experts.", ".gate.", ".router.")  # of mixtures: loaded as one tensor, or no linear that PEFT takes
_CONV1D_MODELS = ("gpt2", "openai-gpt")  # transformers keeps their linears' weights as [in_features, out_features]


@dataclass(frozen=True)
class BaseLinear:
    """One linear layer."""

    path: str  # of its module, as "model.layers.0.mlp.down_proj"
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """The last part of the path: what PEFT calls a target module."""
        return self.path.rpartition(".")[2]

    @property
    def is_attention(self) -> bool:
        """Whether it is part of an attention; else it is part of an MLP."""
        return any("attn" in part or "attention" in part for part in self.path.split(".")[:-1])


@dataclass(frozen=True)
class BaseModel:
    """A transformers folder, as far as adapters for it need to know."""

    name: str
    linears: tuple[BaseLinear, ...]
    is_transposed: bool  # weights lie as [in_features, out_features]: PEFT's fan_in_fan_out


def read_base(folder: Path) -> BaseModel:
    """The linears in the layers of a checkpoint, in order of their names: 2-D tensors called `.weight`.

    Raises SpecError for a folder that is no transformers checkpoint, has no layers known here, or is quantised.
    """
    config = _read_json(folder / "config.json")
    if "quantization_config" in config:
        raise SpecError("base", folder, "holds quantised weights, whose shapes are not the layers'", _REMEDY)
    is_transposed = config.get("model_type") in _CONV1D_MODELS
    linears = []
    for tensor, shape in sorted(_shapes(folder).items()):
        if len(shape) == 2 and tensor.endswith(".weight") and _is_in_layer(f".{tensor}"):
            in_features, out_features = shape if is_transposed else shape[::-1]
            linears.append(BaseLinear(tensor.removesuffix(".weight"), in_features, out_features))
    if not linears:
        raise SpecError("base", folder, f"has no linear layers under {' or '.join(_LAYER_PARTS)}", _REMEDY)
    return BaseModel(folder.resolve().name, tuple(linears), is_transposed)


def _is_in_layer(tensor: str) -> bool:
    return any(part in tensor for part in _LAYER_PARTS) and not any(part in tensor for part in _SKIPPED_PARTS)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor of all its safetensors files."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SpecError("base", folder, f"{index.name} has no weight_map of file names", _REMEDY)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(weight_map.values())):
        try:
            with safe_open(folder / Path(name).name, framework="np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SpecError("base", folder, f"{name} cannot be read: {error}", _REMEDY) from error
    return shapes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        problem = f"{path.name} cannot be read: {error.strerror}"
        raise SpecError("base", path.parent, problem, _REMEDY) from error
    except ValueError as error:
        raise SpecError("base", path.parent, f"{path.name} is not JSON: {error}", _REMEDY) from error
    if not isinstance(fields, dict):
        raise SpecError("base", path.parent, f"{path.name} is no JSON object", _REMEDY)
    return fields
