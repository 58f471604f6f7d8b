"""Finds the adapters of a folder and tells whether a baseline can serve them. Reads configs, no weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from heddle_loadtest.baseline.settings import BaselineKind
from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.names import BASE

CONFIG_FILE = "adapter_config.json"
MIXABLE_TYPES = {"LORA", "GLORA", "ROAD"}  # those whose layers look at `adapter_names` in PEFT 0.21
# These put tokens before the prompt or rebuild the attention, so no layer of the base holds them.
TYPES_WITHOUT_LAYERS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "P_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
}


def find_adapters(folder: Path) -> dict[str, Path]:
    """The PEFT folders in `folder` by name. Raises SpecError if there are none."""
    if not folder.is_dir():
        raise SpecError("adapters", folder, "no such folder", "Name the folder that holds one PEFT folder per adapter")
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))}
    if not found:
        remedy = f"Put PEFT folders, each with its {CONFIG_FILE}, into it; `heddle-loadtest adapters` makes some"
        raise SpecError("adapters", folder, "holds no adapter", remedy)
    return found


def check_names(model_name: str, adapters: Container[str]) -> None:
    """Raises SpecError if an adapter is called as the base is."""
    for name in (BASE, model_name):
        if name in adapters:
            raise SpecError("adapters", name, "the base is called that", "Rename the folder, or the base")


def check_adapters(kind: BaselineKind, adapters: Mapping[str, Path]) -> None:
    """Raises SpecError if PEFT cannot hold these in one model, or cannot batch them as `kind` does."""
    configs = {name: _read_config(path) for name, path in adapters.items()}
    (first_name, first), *_ = configs.items()
    for name, config in configs.items():
        method = config["peft_type"]
        if method in TYPES_WITHOUT_LAYERS:
            raise SpecError("adapters", name, f"it is {method}, which is not in the base's layers", "Leave it out")
        if method != first["peft_type"]:
            problem = f"it is {method} and {first_name!r} is {first['peft_type']}: PEFT holds one method in a model"
            raise SpecError("adapters", name, problem, "Serve each method's adapters by a baseline of their own")
        if kind is BaselineKind.PEFT_MIXED and (reason := _why_not_mixed(config)):
            remedy = f"Leave it out, or use {BaselineKind.PEFT_GROUPED}"
            raise SpecError("adapters", name, f"PEFT cannot mix it with others in one batch: {reason}", remedy)


def _why_not_mixed(config: Mapping[str, Any]) -> str | None:
    if config["peft_type"] not in MIXABLE_TYPES:
        return f"it is {config['peft_type']}, for which PEFT silently ignores `adapter_names`"
    if config.get("use_dora"):
        return "it is DoRA (`use_dora`)"
    if config.get("target_parameters"):
        return "it is on parameters of a mixture of experts (`target_parameters`)"
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SpecError("adapters", path, f"cannot be read as JSON: {error}", "Save the adapter again") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise SpecError("adapters", path, "names no `peft_type`", "Save the adapter with PEFT's save_pretrained")
    return config
