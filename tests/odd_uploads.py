"""Uploads that look hostile and are sound: each must be taken, so that strictness is not bought with honest adapters.

As in `hostile_case`, they are aimed at the base of `adapter_samples`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import save

from adapter_samples import Q, V, config_bytes, lora_config, lora_tensors, tensor_name
from heddle_adapters.canonical import Floats
from hostile_case import A, B, L, Upload, file_bytes, honest, honest_data, honest_header, ones

EXPRESSION = "(a+)+$" * 20


def odd_uploads() -> dict[str, Upload]:
    """Every upload by its name."""
    return _configs() | _files() | _values()


def _configs() -> dict[str, Upload]:
    """Fields that are never run, imported or opened are only text."""
    fields: dict[str, dict[str, Any]] = {
        "expression in target_modules": {"target_modules": EXPRESSION},
        "expression in exclude_modules": {"exclude_modules": EXPRESSION},
        "expression in layers_pattern": {"layers_pattern": EXPRESSION, "layers_to_transform": [0]},
        "expressions listed as targets": {"target_modules": [EXPRESSION, "(.*)*"]},
        "16,000 targets": {"target_modules": [f"module{number}" for number in range(16_000)]},
        "auto_mapping of the system": {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        "megatron_core of the system": {"megatron_core": "os"},
        "base with a path": {"base_model_name_or_path": "../../../etc/passwd", "revision": "http://169.254.169.254/"},
        "negative alpha": {"lora_alpha": -4},
        "alpha of zero": {"lora_alpha": 0},
        "smallest alpha": {"lora_alpha": 5e-324},
        "largest alpha": {"lora_alpha": 20_000},
        "endless pattern for nobody": {"alpha_pattern": {"nobody": 1e308}, "rank_pattern": {"nobody": 10**18}},
        "16,384 paths in each pattern": {
            name: {f"m{number}": 1 for number in range(16_382)} | {"q_proj": 2, "self_attn.q_proj": 2}
            for name in ("rank_pattern", "alpha_pattern")
        },
        "options left unset": {f"option{number}": None for number in range(1000)} | {"use_dora": False, "bias": None},
        "bias left empty": {"bias": ""},
    }
    return {name: Upload(config_bytes(lora_config(**changes)), honest().weights) for name, changes in fields.items()}


def _files() -> dict[str, Upload]:
    header, data = honest_header(), honest_data()
    unicode = json.dumps({**header, "__metadata__": {"by": "Jörg 😀"}}, ensure_ascii=False).encode()
    text = json.dumps(header).encode()
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in next(iter(header)))
    files = {
        **{
            f"header of {length} bytes, as a pickle begins": file_bytes(text.ljust(length), data)
            for length in (640, 896, 1152, 1408)
        },
        "header of 8 MiB": file_bytes(text.ljust(8 * 2**20), data),
        "header of tabs and lines": file_bytes(text.replace(b", ", b",\r\n\t"), data),
        "long metadata": file_bytes({**header, "__metadata__": {"note": "x" * 2**20}}, data),
        "metadata of odd letters": file_bytes({**header, "__metadata__": {"\u202e": "\ud83d\ude00\x1b"}}, data),
        "metadata in UTF-8": file_bytes(unicode, data),
        "escaped name": file_bytes(text.replace(next(iter(header)).encode(), escaped.encode()), data),
        "tensors in reverse": file_bytes(dict(reversed(header.items())), data),
    }  # fmt: skip
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in lora_tensors().items()}
    half_plain = {tensor_name(Q, A): ones(2, 8), f"{Q}.{B}": ones(8, 2)}
    uploads = {name: Upload(honest().config, content) for name, content in files.items()}
    return uploads | {
        "names without the prefix": Upload(honest().config, save(plain)),
        "one name with the prefix and one without": Upload(
            config_bytes(lora_config(target_modules=["q_proj"])), save(half_plain)
        ),
    }


def _values() -> dict[str, Upload]:
    fills: dict[str, Callable[[Floats], Any]] = {
        "zeros": np.zeros_like,
        "negative zeros": lambda tensor: -np.zeros_like(tensor),
        "smallest subnormals": lambda tensor: np.full_like(tensor, 1e-45),
        "largest half floats": lambda tensor: np.full(tensor.shape, 65504, np.float16),
        "smallest half floats": lambda tensor: np.full(tensor.shape, 6e-8, np.float16),
        "large floats": lambda tensor: np.full_like(tensor, 1e18),
    }
    filled = {
        f"LoRA of {kind}": Upload(
            honest().config, save({name: fill(tensor) for name, tensor in lora_tensors().items()})
        )
        for kind, fill in fills.items()
    }
    ia3 = config_bytes({"peft_type": "IA3", "target_modules": ["q_proj", "v_proj"], "feedforward_modules": []})
    scaled = {
        f"IA3 of {value:g}": Upload(
            ia3, save({tensor_name(Q, L): ones(8, 1) * np.float32(value), tensor_name(V, L): ones(4, 1)})
        )
        for value in (0.0, -1.0, 1e-38, 1e18)
    }
    return filled | scaled
