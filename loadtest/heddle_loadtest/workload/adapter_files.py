"""The adapters of a workload as PEFT folders of random weights for any base. Knows no server and needs no torch.

A folder's content depends on the seed, the base and the adapter's index and kind alone. Shapes and key names are those
that PEFT saves (peft/tuners/lora, peft/tuners/ia3).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.adapter_set import adapter_names, kind_of
from heddle_loadtest.workload.base_linears import BaseLinear, BaseModel, read_base
from heddle_loadtest.workload.names import BASE
from heddle_loadtest.workload.spec import AdapterKind, Adapters

if TYPE_CHECKING:
    import numpy as np
    from numpy.random import Generator
    from numpy.typing import NDArray

    _Tensors = dict[str, NDArray[np.float16]]

METHODS = ("lora", "rslora", "ia3")
WEIGHT_LIMIT = 0.02  # of each weight's size: an effect, and nothing that could overflow in any dtype
_NOISE_LENGTH = (1 << 19) - 1  # a prime: no width divides it, so no two rows of a weight are alike
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")  # of a folder, on any file system
_QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")
_IA3 = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "down_proj", "dense_4h_to_h")  # as in its paper


def write_adapter_files(
    adapters: Adapters,
    base: Path,
    folder: Path,
    seed: int = 0,
    *,
    on_written: Callable[[Path], None] = lambda path: None,
) -> None:
    """Writes folder/NAME/adapter_config.json and adapter_model.safetensors for each adapter but the base itself.

    `on_written` is told each adapter's folder. Raises SpecError, before the first is written, for a name that makes no
    safe folder name, an unknown method, modules that the base lacks, and a base that is no unquantised checkpoint.
    """
    model = read_base(base)
    names = adapter_names(adapters)
    for name in names:
        _check_name(name)
    targets = {kind: _target_linears(kind, model) for kind in dict.fromkeys(adapters.kinds)}
    for index, name in enumerate(names):
        if name != BASE:
            kind = kind_of(adapters, index)
            _write_folder(folder / name, kind, model, targets[kind], (seed, index))
            on_written(folder / name)


def _check_name(name: str) -> None:
    if not _SAFE_NAME.fullmatch(name):
        remedy = "Use letters, digits, '.', '_' and '-', a letter or digit first, 96 characters at most"
        raise SpecError("adapters", name, "makes no safe folder name", remedy)


def _target_linears(kind: AdapterKind, model: BaseModel) -> tuple[BaseLinear, ...]:
    """The linears that an adapter of this kind changes."""
    if kind.method not in METHODS:
        raise SpecError("method", kind.method, "is no method known here", f"Give one of {', '.join(METHODS)}")
    there = {linear.name: linear for linear in model.linears}
    match kind.modules:
        case "all" | "attention" | "mlp":
            names = {
                name
                for name, linear in there.items()
                if kind.modules in ("all", "attention" if linear.is_attention else "mlp")
                and (kind.method != "ia3" or name in _IA3)
            }
        case "qkv":
            names = there.keys() & set(_QKV)
        case listed:
            names = {name.strip() for name in listed.split(",")}
    if not names or not names <= there.keys():
        problem = f"are no linears of {model.name} for {kind.method}"
        remedy = f"Give all, attention, mlp, qkv, or some of {', '.join(sorted(there))}"
        raise SpecError("modules", kind.modules, problem, remedy)
    return tuple(linear for linear in model.linears if linear.name in names)


def _write_folder(
    folder: Path, kind: AdapterKind, model: BaseModel, linears: tuple[BaseLinear, ...], key: tuple[int, int]
) -> None:
    from numpy.random import default_rng
    from safetensors.numpy import save_file

    random = default_rng(key)
    tensors = _ia3_tensors(linears, random) if kind.method == "ia3" else _lora_tensors(linears, kind.rank, random)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(_config(kind, model, linears), indent=2) + "\n")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    except OSError as error:
        raise SpecError("out", folder, error.strerror or "cannot be written", "Name a folder to write to") from error


def _config(kind: AdapterKind, model: BaseModel, linears: tuple[BaseLinear, ...]) -> dict[str, Any]:
    """adapter_config.json"""
    fields = {
        "peft_type": "IA3" if kind.method == "ia3" else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "target_modules": sorted({linear.name for linear in linears}),
        "fan_in_fan_out": model.is_transposed,
        "inference_mode": True,
    }
    if kind.method == "ia3":
        return fields | {"feedforward_modules": sorted(_feedforward_names(linears))}
    return fields | {
        "r": kind.rank,
        "lora_alpha": kind.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": kind.method == "rslora",
    }


def _lora_tensors(linears: Iterable[BaseLinear], rank: int, random: Generator) -> _Tensors:
    """Per linear A [rank, in_features] and B [out_features, rank], neither of them zero."""
    tensors = {}
    for linear in linears:
        prefix = f"base_model.model.{linear.path}"
        tensors[f"{prefix}.lora_A.weight"] = _weights((rank, linear.in_features), random)
        tensors[f"{prefix}.lora_B.weight"] = _weights((linear.out_features, rank), random)
    return tensors


def _ia3_tensors(linears: tuple[BaseLinear, ...], random: Generator) -> _Tensors:
    """Per linear one factor around 1 for each output [out_features, 1], or, in an MLP, each input [1, in_features]."""
    feedforward = _feedforward_names(linears)
    tensors = {}
    for linear in linears:
        shape = (1, linear.in_features) if linear.name in feedforward else (linear.out_features, 1)
        tensors[f"base_model.model.{linear.path}.ia3_l"] = 1 + _weights(shape, random)
    return tensors


def _feedforward_names(linears: Iterable[BaseLinear]) -> set[str]:
    """PEFT tells them by their names, so a name that an MLP and an attention share counts as the MLP's in both."""
    return {linear.name for linear in linears if not linear.is_attention}


def _weights(shape: tuple[int, int], random: Generator) -> NDArray[np.float16]:
    """The noise from somewhere in it on, around and around."""
    import numpy as np

    start = int(random.integers(_NOISE_LENGTH))
    size = shape[0] * shape[1]
    if size <= _NOISE_LENGTH:
        return _noise()[start : start + size].reshape(shape)
    return np.resize(_noise()[start : start + _NOISE_LENGTH], shape)


@functools.cache
def _noise() -> NDArray[np.float16]:
    """Uniform in [-WEIGHT_LIMIT, WEIGHT_LIMIT), and once more, so that a slice may begin anywhere.

    Drawn once: drawing each weight would take an 8B model's adapter a second.
    """
    import numpy as np

    uniform = np.random.default_rng(0).uniform(-WEIGHT_LIMIT, WEIGHT_LIMIT, _NOISE_LENGTH).astype(np.float16)
    return np.concatenate([uniform, uniform])
