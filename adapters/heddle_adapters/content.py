"""An adapter's two files, read and checked as far as that is possible without a base."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from heddle_adapters.adapter_config import MAX_CONFIG_BYTES, AdapterConfig
from heddle_adapters.bounded_json import Json
from heddle_adapters.digest import version_digest
from heddle_adapters.method import AdapterMethod, method_of
from heddle_adapters.tensor_file import TensorFile


class AdapterContent:
    """What an adapter is, whatever base it meets: its method with settings, its tensors, its identity."""

    def __init__(self, config: bytes | Path, weights_path: Path) -> None:
        """Reads adapter_config.json (bytes, or where it lies) and maps the weights; raises `InvalidAdapter`."""
        self.config = AdapterConfig.parse(config if isinstance(config, bytes) else _read_bounded(config))
        self.method: AdapterMethod = method_of(self.config)
        self.file = TensorFile(weights_path)

    @cached_property
    def digest(self) -> str:
        """Identity as "sha256:<hex>"; the first use reads the whole file."""
        scalars: dict[str, Json] = {
            **self.method.scalars,
            "heddle_base_fingerprint": self.config.text("heddle_base_fingerprint"),
        }
        return version_digest(self.config.text("peft_type") or "", scalars, self.file)


def _read_bounded(path: Path) -> bytes:
    """The file, or just enough of it for `AdapterConfig.parse` to see that it is too long."""
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)
