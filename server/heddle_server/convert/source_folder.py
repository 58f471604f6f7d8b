"""The folder that is converted: JSON, safetensors and pickles.

A pickle is opened here only, on the user's own machine, and only as tensors (`weights_only`); a server never opens one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class CannotConvert(Exception):
    """Why a folder cannot be converted, and what to do."""


@dataclass(frozen=True)
class SourceFolder:
    """Where a library saved an adapter."""

    path: Path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; raises `CannotConvert`."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CannotConvert(f"{self.path / name} cannot be read: {error}.") from error
        if not isinstance(value, dict):
            raise CannotConvert(f"{self.path / name} holds no JSON object; give the folder that the library saved.")
        return value

    def tensors(self, *names: str) -> dict[str, torch.Tensor]:
        """The tensors in the first of these files that is there; raises `CannotConvert`."""
        name = next((name for name in names if self.has(name)), None)
        if name is None:
            raise CannotConvert(f"{self.path} has no {' or '.join(names)}; give the folder that the library saved.")
        path = self.path / name
        try:
            if name.endswith(".safetensors"):
                return dict(load_file(path))
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CannotConvert(
                f"{path} holds more than tensors, and what it holds could run code; save the adapter again as "
                "safetensors where it was trained."
            ) from error
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, SafetensorError) as error:
            raise CannotConvert(f"{path} cannot be read: {error}.") from error
        if not isinstance(loaded, Mapping) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
        ):
            raise CannotConvert(f"{path} is not a table of tensors by name; give the file that the library saved.")
        return dict(loaded)
