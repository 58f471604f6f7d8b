"""Writes one combined adapter (see `combined`) out of the folders of several, tensor by tensor and byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.bounded_json import Json
from heddle_adapters.content import AdapterContent
from heddle_adapters.errors import InvalidAdapter, listed, quoted
from heddle_adapters.method import method_of
from heddle_adapters.methods.combined import PEFT_TYPE, SEPARATOR, about_part
from heddle_adapters.tensor_file import PREFIX_BYTES, WEIGHTS_FILE, TensorInfo

ALIGNMENT_BYTES = 8  # of the tensors' first byte, as the safetensors library writes files


def combine(parts: Sequence[tuple[str, float, Path]], out_folder: Path) -> AdapterContent:
    """Writes both files of the combined adapter into `out_folder`, and reads them back.

    `parts` are names, gates and folders as PEFT's save_pretrained leaves them. Raises `InvalidAdapter` for a part that
    cannot be served or combined, whatever the base, and `FileExistsError` rather than overwrite anything.
    """
    contents = [(name, gate, _content(name, folder)) for name, gate, folder in parts]
    config: dict[str, Json] = {
        "peft_type": PEFT_TYPE,
        "heddle_base_fingerprint": _fingerprint([content for _, _, content in contents]),
        "parts": [
            {"name": name, "gate": gate, "config": {**content.config.fields, "heddle_base_fingerprint": None}}
            for name, gate, content in contents
        ],
    }
    text = json.dumps(config, indent=2) + "\n"
    method_of(AdapterConfig.parse(text.encode()))
    out_folder.mkdir(parents=True, exist_ok=True)
    with (out_folder / CONFIG_FILE).open("x", encoding="utf-8") as file:
        file.write(text)
    _write_tensors(
        out_folder / WEIGHTS_FILE,
        [
            (name + SEPARATOR + tensor.name, tensor, content.file.bytes_of(tensor.name))
            for name, _, content in contents
            for tensor in content.file.tensors.values()
        ],
    )
    return AdapterContent(out_folder / CONFIG_FILE, out_folder / WEIGHTS_FILE)


def _content(name: str, folder: Path) -> AdapterContent:
    with about_part(name):
        return AdapterContent(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def _fingerprint(contents: Sequence[AdapterContent]) -> str | None:
    """Of the one base that the parts name, if any does."""
    named = {content.config.text("heddle_base_fingerprint") for content in contents} - {None}
    if len(named) > 1:
        bases = listed(sorted(quoted(fingerprint) for fingerprint in named))
        message = f"{CONFIG_FILE}: heddle_base_fingerprint differs among the parts: {bases}; combine those of one base."
        raise InvalidAdapter(message, param=CONFIG_FILE)
    return next(iter(named), None)


def _write_tensors(path: Path, tensors: Iterable[tuple[str, TensorInfo, memoryview]]) -> None:
    """A safetensors file of stored bytes under new names."""
    tensors = list(tensors)
    header: dict[str, Json] = {}
    position = 0
    for name, tensor, data in tensors:
        offsets: list[Json] = [position, position + len(data)]
        header[name] = {"dtype": tensor.dtype, "shape": [*tensor.shape], "data_offsets": offsets}
        position += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % ALIGNMENT_BYTES)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(PREFIX_BYTES, "little") + text)
        for _, _, data in tensors:
            file.write(data)
