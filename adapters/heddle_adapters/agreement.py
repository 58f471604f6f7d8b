"""What a config's words and a file's tensors owe each other, for a whole upload and for each part of a combined one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapter, listed, quoted
from heddle_adapters.module_pattern import path_endings
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo


def check_fingerprint(config: AdapterConfig, base: BaseLayout) -> None:
    """Raises `AdapterIncompatible` for a config that names another base."""
    wanted = config.text("heddle_base_fingerprint")
    if wanted is not None and wanted != base.fingerprint:
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: heddle_base_fingerprint is {quoted(wanted)}, and this server's base, {base.model_name} "
            f"({base.quantization}), has {base.fingerprint}; upload it where the base it was trained on is served.",
            param=CONFIG_FILE,
        )


def check_types(tensors: Mapping[str, TensorInfo], integer_parts: Collection[str]) -> None:
    """Raises `InvalidAdapter` unless just the tensors whose names end in `integer_parts` hold whole numbers."""
    wrong = [
        quoted(name) for name, tensor in tensors.items() if tensor.is_integer != name.endswith(tuple(integer_parts))
    ]
    if wrong:
        message = f"{WEIGHTS_FILE} has tensors of the wrong type, whole numbers or floating-point: {listed(wrong)}."
        raise InvalidAdapter(message + " Upload the file as it was saved.", param=WEIGHTS_FILE)


def check_every_target_is_there(config: AdapterConfig, present: Collection[str], base: BaseLayout) -> None:
    """PEFT only warns about modules that the config promises and the file lacks; half an adapter is not served here.

    `present` are the sites that the file changes. Skipped where the config picks modules by a regular expression.
    Raises `InvalidAdapter`.
    """
    fields = config.fields
    targets, excluded, layers = (
        fields.get(field) for field in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    if not isinstance(targets, list) or isinstance(excluded, str) or fields.get("layers_pattern"):
        return
    names = {target for target in targets if isinstance(target, str)}
    left_out = {name for name in excluded if isinstance(name, str)} if isinstance(excluded, list) else set[str]()
    numbers = layers if isinstance(layers, list) else None if layers is None else [layers]
    promised = [
        path
        for path in base.by_path("linear", "norm", "embedding")
        if not names.isdisjoint(path_endings(path))
        and left_out.isdisjoint(path_endings(path))
        and (not numbers or _layer_of(path) in numbers)
    ]
    missing = [module for module in promised if module not in present]
    if missing:
        raise InvalidAdapter(
            f"{WEIGHTS_FILE} has nothing for modules that target_modules of {CONFIG_FILE} promises: {listed(missing)}; "
            "upload the whole file that was saved with this config.",
            param=WEIGHTS_FILE,
        )


def _layer_of(path: str) -> int | None:
    """The layer that PEFT's `layers_to_transform` counts: the last number in a module's path, but for its own name."""
    numbers = [part for part in path.split(".")[:-1] if part.isdecimal()]
    return int(numbers[-1]) if numbers else None
