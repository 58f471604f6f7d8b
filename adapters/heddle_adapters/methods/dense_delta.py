"""What the methods share that change a site by a matrix as large as its own weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

from heddle_adapters.adapter_config import CONFIG_FILE
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.positions import Positions
from heddle_adapters.source import Source
from heddle_adapters.tensor_file import WEIGHTS_FILE, TensorInfo


class DenseMethod:
    """What `method.AdapterMethod` asks for, as far as it is the same for all of them."""

    combination: ClassVar[Literal["alone"]] = "alone"
    positions: ClassVar[Positions] = Positions()
    refused_parts: ClassVar[Mapping[str, str]] = {}
    integer_parts: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class DenseSource(Source):
    """A site whose update has a delta."""

    is_dense: bool = True


def refuse_shape(part: str, tensor: TensorInfo, module: str, fields: str, promised: str) -> NoReturn:
    """Raises `InvalidAdapter`: a tensor's shape is not what some fields of the config promise."""
    raise InvalidAdapter(
        f"{WEIGHTS_FILE}: {part} of {module} has shape {list(tensor.shape)}, but {fields} of {CONFIG_FILE} "
        f"{promised}; upload the config that was saved with these weights.",
        param=WEIGHTS_FILE,
    )
