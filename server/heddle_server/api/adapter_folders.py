"""Which adapters lie in a folder of PEFT folders, as an operator keeps them.

DIR/sql/adapter_config.json, adapter_model.safetensors          is "sql"
DIR/team/sql/adapter_config.json, adapter_model.safetensors     is "team/sql"
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.tensor_file import WEIGHTS_FILE


class AdapterFolder(NamedTuple):
    """A folder with an adapter in it, and the name that it gets."""

    name: str
    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE

    def check(self) -> None:
        """Raises `InvalidAdapter` where one of the two files is missing."""
        for file in (self.config, self.weights):
            if not file.is_file():
                message = f"The folder has no {file.name}; save the adapter with PEFT, as safetensors."
                raise InvalidAdapter(message, param=file.name)


def adapter_folders(path: Path) -> Iterator[AdapterFolder]:
    """Every adapter in `path` and, one level down, in its folders that are not adapters themselves; by name."""
    for folder in _folders(path):
        if is_adapter_folder(folder):
            yield AdapterFolder(folder.name, folder)
            continue
        for inner in _folders(folder):
            if is_adapter_folder(inner):
                yield AdapterFolder(f"{folder.name}/{inner.name}", inner)


def is_adapter_folder(path: Path) -> bool:
    """Whether an adapter was meant to be here, complete or not."""
    return (path / CONFIG_FILE).is_file() or (path / WEIGHTS_FILE).is_file()


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
