"""One conversion: recognise the folder, make the two files of an upload, check them as a server would, write them."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.content import AdapterContent
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.convert import adapters_library, peft_folder, pyreft_folder
from heddle_server.convert.choices import Choices
from heddle_server.convert.converted import Converted
from heddle_server.convert.source_folder import CannotConvert, SourceFolder

FORMATS: tuple[tuple[Callable[[SourceFolder], bool], Callable[[SourceFolder, Choices], Converted]], ...] = (
    (pyreft_folder.recognises, pyreft_folder.convert),
    (adapters_library.recognises, adapters_library.convert),
    (peft_folder.recognises, peft_folder.convert),
)


@dataclass(frozen=True)
class Outcome:
    """What was written."""

    method: str  # as a server calls it
    remarks: tuple[str, ...]


def convert_folder(source: Path, target: Path, choices: Choices) -> Outcome:
    """Writes the new folder `target`, whole or not at all. Raises `CannotConvert`."""
    if target.exists():
        raise CannotConvert(f"{target} exists already, and nothing is ever overwritten; name a new folder.")
    folder = SourceFolder(source)
    convert = next((convert for recognises, convert in FORMATS if recognises(folder)), None)
    if convert is None:
        raise CannotConvert(
            f"{source} is no folder of a known library: PEFT and the adapters library save an adapter_config.json, "
            "pyreft saves a config.json beside its intkey_*.bin."
        )
    try:
        converted = convert(folder, choices)
    except (LookupError, RuntimeError) as error:  # a setting, a tensor or a shape
        raise CannotConvert(f"{source} is not as its library saves it: {error!r}; save the adapter again.") from error
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        method = _written(converted, unfinished)
        unfinished.rename(target)
    except InvalidAdapter as error:
        raise CannotConvert(f"{source} can be converted, but no server would take the result: {error}") from error
    except OSError as error:
        raise CannotConvert(f"{target} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Outcome(method, converted.remarks)


def _written(converted: Converted, folder: Path) -> str:
    """Writes the files and reads them back as a server does; the method's name."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(converted.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(_storable(converted.tensors), folder / WEIGHTS_FILE)
    return AdapterContent(folder / CONFIG_FILE, folder / WEIGHTS_FILE).method.label


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Each tensor in memory of its own; doubles as single floats, which is what any server computes with."""
    narrowed = {name: value.float() if value.dtype == torch.float64 else value for name, value in tensors.items()}
    return {name: value.detach().clone().contiguous() for name, value in narrowed.items()}
