"""A random adapter of one method, and who knows what it should compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Oracle(Protocol):
    """A model with one adapter, computed by another than heddle, batch 1, without padding."""

    def logits(self, token_ids: list[int], num_prompt_tokens: int) -> Tensor:
        """Of prompt and answer: float32 [num_tokens, vocabulary]."""
        ...


class Sample(Protocol):
    """One method, or one way to use it."""

    @property
    def name(self) -> str:
        """For people, and as an adapter's name."""

    @property
    def oracle_name(self) -> str:
        """Who says what it computes."""

    @property
    def on_plain_base_only(self) -> bool:
        """Whether a quantised base refuses it."""

    def save(self, base: Any, folder: Path, seed: int) -> None:
        """A random adapter over the float32 model `base`, as a folder to upload."""

    def load(self, base: Any, folder: Path) -> Oracle:
        """That adapter over `base`, in whatever dtype it has; `base` is not changed."""
        ...
