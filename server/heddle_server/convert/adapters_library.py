"""Folders that the adapters library 1.x (AdapterHub) saved: an adapter_config.json with a nested `config`, and either
adapter.safetensors or the pickle pytorch_adapter.bin.

Bottlenecks keep their files under the names of an upload. LoRA and IA3 become PEFT's, ReFT becomes heddle's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.methods.representation import PEFT_TYPE, B, P, W
from heddle_adapters.site_tensors import PEFT_PREFIX
from heddle_server.convert.choices import Choices
from heddle_server.convert.converted import Converted
from heddle_server.convert.orthogonal import ORIGINAL, orthogonal_weight
from heddle_server.convert.pyreft_folder import reft_config
from heddle_server.convert.source_folder import CannotConvert, SourceFolder

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD = "head_config.json"

_LORA = re.compile(r"(?P<module>.+)\.loras\.[^.]+\.(?P<part>lora_A|lora_B)")
_REFT = re.compile(r".+\.(?P<layer>\d+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>[01])\.(?P<part>.+)")
_ORTHOGONAL = "projection.parametrizations.weight."
_FIXED_SCALING = (1, 1)  # release from which on LoRA is scaled by alpha / r

Tensors = Mapping[str, torch.Tensor]


def recognises(folder: SourceFolder) -> bool:
    if not folder.has(CONFIG_FILE):
        return False
    config = folder.json(CONFIG_FILE)
    return "peft_type" not in config and isinstance(config.get("config"), dict)


def convert(folder: SourceFolder, choices: Choices) -> Converted:
    config = folder.json(CONFIG_FILE)
    architecture = config["config"].get("architecture")
    if architecture not in _CONVERTERS:
        raise CannotConvert(
            f"{CONFIG_FILE}: the architecture {architecture!r} of the adapters library cannot be converted; "
            "train the adapter with PEFT."
        )
    converted = _CONVERTERS[architecture](config, folder.tensors(*WEIGHTS), choices)
    if folder.has(HEAD):
        return replace(converted, remarks=(*converted.remarks, "The prediction head is left out."))
    return converted


def _bottleneck(config: Mapping[str, Any], tensors: Tensors, choices: Choices) -> Converted:
    return Converted(config, tensors, ("The files are the same under the names of an upload.",))


def _lora(config: Mapping[str, Any], tensors: Tensors, choices: Choices) -> Converted:
    settings = config["config"]
    for field in ("use_gating", "use_dora", "vera_d", "vera_b"):
        if settings.get(field):
            raise CannotConvert(f"{CONFIG_FILE}: {field} is set, and such a LoRA cannot be converted; train with PEFT.")
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            raise CannotConvert(f"the tensor {name!r} is none of a LoRA's; save the adapter again.")
        by_module.setdefault(match["module"], {})[match["part"]] = value
    targets = sorted({re.split(r"\.\d+\.", module)[-1] for module in by_module})
    if settings.get("composition_mode") == "scale":
        return _scaling_vectors(settings, by_module, targets)
    rank, alpha = int(settings["r"]), settings["alpha"]
    if any(parts["lora_A"].shape[0] != rank for parts in by_module.values()):
        raise CannotConvert("some module has the LoRAs of q, k and v in one tensor; train the adapter with PEFT.")
    remarks = ["The LoRA has PEFT's names now."]
    if alpha != rank and _release(config.get("version", "")) < _FIXED_SCALING:
        alpha = rank
        remarks.append("The library's release did not scale by alpha / r, so alpha is r now, as the library reads it.")
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model_name"),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        **_left_out(settings, by_module),
    }
    renamed = {
        f"{PEFT_PREFIX}{module}.{part}.weight": value
        for module, parts in by_module.items()
        for part, value in parts.items()
    }
    return Converted(peft_config, renamed, tuple(remarks))


def _scaling_vectors(settings: Mapping[str, Any], by_module: Mapping[str, Tensors], targets: list[str]) -> Converted:
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "feedforward_modules": [],
        **_left_out(settings, by_module),
    }
    alpha = float(settings["alpha"])
    vectors = {f"{PEFT_PREFIX}{module}.ia3_l": alpha * parts["lora_B"] for module, parts in by_module.items()}
    return Converted(config, vectors, ("IA3 has PEFT's names now; every vector scales its layer's output.",))


def _reft(config: Mapping[str, Any], tensors: Tensors, choices: Choices) -> Converted:
    settings = config["config"]
    first = settings.get("prefix_positions", 0) if choices.first is None else choices.first
    last = settings.get("suffix_positions", 0) if choices.last is None else choices.last
    if first and last and not settings.get("tied_weights"):
        raise CannotConvert(
            f"{CONFIG_FILE}: tied_weights is false: first and last tokens have weights of their own, and one adapter "
            "cannot change them differently; train with tied_weights=True."
        )
    unit = "1" if last and not first and not settings.get("tied_weights") else "0"
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        match = _REFT.fullmatch(name)
        if match is None:
            raise CannotConvert(f"the tensor {name!r} is none of a ReFT's; save the adapter again.")
        if match["unit"] == unit:
            layers.setdefault(int(match["layer"]), {})[match["part"]] = value
    renamed = {
        f"layers.{layer}.{part}": value
        for layer, state in sorted(layers.items())
        for part, value in _reft_parts(state).items()
    }
    said = replace(choices, first=first, last=last, activation=choices.activation or settings.get("non_linearity"))
    remarks = (
        f"The prompt's first {first} and last {last} tokens are changed, and none of the answer's.",
        f"The config is of the kind {PEFT_TYPE} now.",
    )
    return Converted(
        reft_config(_intervention(settings, choices), said, dict(sorted(layers.items()))), renamed, remarks
    )


def _intervention(settings: Mapping[str, Any], choices: Choices) -> str:
    if settings.get("orthogonality"):
        return "loreft"
    known = {"noreft": "noreft", "direft": "nodireft"}
    if choices.intervention not in known:
        raise CannotConvert(
            "the library saves NoReFT and DiReFT alike; say which one it is with --intervention noreft or "
            "--intervention direft."
        )
    return known[choices.intervention]


def _reft_parts(state: Tensors) -> dict[str, torch.Tensor]:
    is_orthogonal = _ORTHOGONAL + ORIGINAL in state
    projection = orthogonal_weight(state, _ORTHOGONAL) if is_orthogonal else state["projection.weight"]
    return {P: projection, W: state["learned_source.weight"], B: state["learned_source.bias"]}


def _left_out(settings: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Says which modules have no tensors, so that a server does not miss them."""
    layers = settings.get("leave_out") or []
    absent = {re.sub(r"\.\d+\.", f".{layer}.", module, count=1) for module in modules for layer in layers}
    return {"exclude_modules": sorted(absent)} if absent else {}


def _release(version: str) -> tuple[int, ...]:
    """The numbers of "adapters.1.0.1"; those of the library's predecessor count as old."""
    match = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


_CONVERTERS: Mapping[str | None, Callable[[Mapping[str, Any], Tensors, Choices], Converted]] = {
    None: _bottleneck,
    "lora": _lora,
    "reft": _reft,
}
