"""Random ReFT adapters: heddle's own files, folders as pyreft writes them, and pyreft's formulas in plain torch.

`edited` follows pyreft 0.1.0, `interventions.py`. Checked once against pyreft 0.1.0 and pyvene 0.1.8 themselves, for a
tiny Llama: their saves, converted and read by heddle, give their logits to 2.1e-7, where the effect is 0.46 to 0.83.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from heddle_adapters.methods.representation import INTERVENTIONS, P_BIAS, B, P, W

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HIDDEN = 64
FUNCTIONS: Mapping[str, Any] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
CLASSES = {
    "consreft": "Consreft",
    "direft": "Direft",
    "lobireft": "Lobireft",
    "loreft": "Loreft",
    "nodireft": "Nodireft",
    "noreft": "Noreft",
}
ORTHOGONAL = ("consreft", "direft", "lobireft", "loreft")


def reft_config(intervention: str = "loreft", **changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "HEDDLE_REFT",
        "intervention": intervention,
        "activation": "linear",
        "first": 2,
        "last": 3,
        "layers": [0, 1],
        **changes,
    }


def reft_parts(intervention: str, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One layer's tensors under heddle's names."""

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    terms = INTERVENTIONS[intervention]
    parts = {P: random(rank, HIDDEN), B: random(rank)}
    if intervention in ORTHOGONAL:
        parts[P] = torch.linalg.qr(parts[P].T).Q.T.contiguous()
    if terms.has_source:
        parts[W] = random(rank, HIDDEN)
    if terms.may_have_bias:
        parts[P_BIAS] = random(rank)
    return parts


def reft_tensors(
    intervention: str = "loreft", layers: Sequence[int] = (0, 1), rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    by_layer = {layer: reft_parts(intervention, rank, generator) for layer in layers}
    return {f"layers.{layer}.{part}": value for layer, parts in by_layer.items() for part, value in parts.items()}


def save_reft(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """The two files of an upload."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


def edited(
    intervention: str, parts: Mapping[str, torch.Tensor], h: torch.Tensor, activation: str = "linear"
) -> torch.Tensor:
    """What an intervention makes of h [tokens, hidden]."""
    p, b = parts[P], parts[B]
    projected = h @ p.T + parts.get(P_BIAS, torch.zeros(len(b)))
    learned = FUNCTIONS[activation](h @ parts[W].T + b) if W in parts else b
    changes: Mapping[str, Callable[[], torch.Tensor]] = {
        "loreft": lambda: learned - projected,
        "noreft": lambda: learned - projected,
        "consreft": lambda: b - projected,
        "direft": lambda: learned,
        "nodireft": lambda: learned,
        "lobireft": lambda: b.expand_as(projected),
    }
    return h + changes[intervention]() @ p


def save_as_pyreft(folder: Path, intervention: str, by_layer: Mapping[int, Mapping[str, torch.Tensor]]) -> Path:
    """As `ReftModel.save` does (pyvene 0.1.8, `IntervenableModel.save`), for single positions of block outputs."""
    folder.mkdir(parents=True)
    keys = [f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0" for layer in by_layer]
    for key, parts in zip(keys, by_layer.values(), strict=True):
        torch.save(pyreft_state(intervention, parts), folder / f"intkey_{key}.bin")
    config = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": [HIDDEN] * len(keys),
        "intervention_types": [f"<class 'pyreft.interventions.{CLASSES[intervention]}Intervention'>"] * len(keys),
        "mode": "parallel",
        "representations": [[layer, "block_output", "pos", 1, 4, *[None] * 9] for layer in by_layer],
        "sorted_keys": keys,
        "transformers_version": "4.57.6",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pyreft_state(intervention: str, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `state_dict` that pyreft's class has for these tensors."""
    width = torch.tensor(HIDDEN)
    if intervention == "loreft":
        return {"weight": parts[W], "bias": parts[B], "rotate_layer": parts[P].T.contiguous()}
    state = {"embed_dim": width, "interchange_dim": width}
    if intervention in ORTHOGONAL:
        state |= orthogonal_parameters("rotate_layer", parts[P].T)
    else:
        state |= {"proj_layer.weight": parts[P], "proj_layer.bias": parts.get(P_BIAS, torch.ones(len(parts[P])))}
    if W in parts:
        return state | {"learned_source.weight": parts[W], "learned_source.bias": parts[B]}
    return state | {"learned_source": parts[B]}


def orthogonal_parameters(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torch keeps for an orthogonal matrix, by the names that a module's parameter "weight" has."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight.clone())
    torch.nn.utils.parametrizations.orthogonal(holder)
    return {f"{module}.{name}": value.detach().contiguous() for name, value in holder.state_dict().items()}
