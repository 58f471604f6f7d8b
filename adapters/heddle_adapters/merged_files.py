"""Writes what a merge made as the two files of a PEFT adapter, which PEFT loads as well as heddle.

Rows become a LoRA (`tuners/lora`), elements a Super-Tuning adapter (`tuners/supertuning`, from peft 0.21 on): of PEFT's
sparse formats it is the one that can hold any share of each weight.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.bounded_json import Json
from heddle_adapters.canonical import Rows
from heddle_adapters.errors import AdapterError
from heddle_adapters.merge import Merged, SparseDelta
from heddle_adapters.methods.low_rank import A as LORA_A
from heddle_adapters.methods.low_rank import B as LORA_B
from heddle_adapters.methods.sparse_delta import INDICES, VALUES, num_trained
from heddle_adapters.site_tensors import PEFT_PREFIX
from heddle_adapters.tensor_file import WEIGHTS_FILE

DENSITY_STEPS = 2**20  # a multiple of 1 / 2^20 and its distance from 1 are exact as floating-point numbers

Tensors = dict[str, NDArray[Any]]


def write_merged(folder: Path, merged: Merged, base_name: str, fingerprint: str | None) -> None:
    """Writes the files into a folder, which is made; raises `AdapterError` where it has some of them already.

    Also where nothing is left that could be written. `fingerprint`: of the base that all parts were trained on.
    """
    fields, tensors = _lora(merged.rows) if merged.rows else _sparse(merged.elements)
    config: dict[str, Json] = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        **fields,
    }
    if fingerprint is not None:
        config["heddle_base_fingerprint"] = fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).exists():
            raise AdapterError(f"{folder / name} is there already; write into another folder.")
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))


def _lora(rows: Mapping[str, Rows]) -> tuple[dict[str, Json], Tensors]:
    """With a scale of 1 everywhere."""
    ranks = {path: len(each) for path, each in rows.items()}
    [(usual, _)] = Counter(ranks.values()).most_common(1)
    others: dict[str, Json] = {path: rank for path, rank in ranks.items() if rank != usual}
    tensors: Tensors = {}
    for path, each in rows.items():
        tensors[f"{PEFT_PREFIX}{path}.{LORA_A}"] = each.a
        tensors[f"{PEFT_PREFIX}{path}.{LORA_B}"] = np.ascontiguousarray((each.gain[:, None] * each.b).T)
    fields: dict[str, Json] = {
        "peft_type": "LORA",
        "lora_alpha": usual,
        "alpha_pattern": others,
        "r": usual,
        "rank_pattern": others,
        "target_modules": [*sorted(ranks)],
    }
    return fields, tensors


def _sparse(elements: Mapping[str, SparseDelta]) -> tuple[dict[str, Json], Tensors]:
    """With the same share of each weight, so that zeros stand in for what is missing to it."""
    if not any(len(delta.values) for delta in elements.values()):
        raise AdapterError("Nothing is left of these adapters; merge them with another density or other weights.")
    share = max(max(1, len(delta.values)) / math.prod(delta.shape) for delta in elements.values())
    sparsity = 1 - math.ceil(share * DENSITY_STEPS) / DENSITY_STEPS
    tensors: Tensors = {}
    for path, delta in elements.items():
        places, values = _padded(delta, num_trained(math.prod(delta.shape), sparsity))
        tensors[f"{PEFT_PREFIX}{path}.{INDICES}"] = places
        tensors[f"{PEFT_PREFIX}{path}.{VALUES}"] = values
    fields: dict[str, Json] = {"peft_type": "SUPERTUNING", "sparsity": sparsity, "target_modules": [*sorted(elements)]}
    return fields, tensors


def _padded(delta: SparseDelta, num_elements: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """With as many of the first other places, whose values are zero, as are missing."""
    is_free = np.ones(math.prod(delta.shape), bool)
    is_free[delta.places] = False
    padding = np.flatnonzero(is_free)[: num_elements - len(delta.places)]
    places = np.concatenate([delta.places, padding]).astype(np.int32)
    return places, np.concatenate([delta.values, np.zeros(len(padding), np.float32)])
