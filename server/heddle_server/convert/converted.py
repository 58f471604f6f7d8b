"""What a conversion makes, before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Converted:
    """The two files of an upload."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    remarks: tuple[str, ...]  # what was done, one sentence each
