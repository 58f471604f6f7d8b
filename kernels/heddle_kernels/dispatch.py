"""Which implementation of the operations runs on which device: decided here, once, and said aloud."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from heddle_kernels import reference

BACKENDS: dict[str, ModuleType] = {"reference": reference}


@dataclass(frozen=True)
class Kernels:
    """The chosen operations: `ops.shrink`, `ops.expand_add`, …, and why these."""

    name: str
    reason: str
    ops: ModuleType


def select_kernels(device: str, requested: str = "auto") -> Kernels:
    """The operations for `device` ("cpu" or "cuda"); `requested` forces one by name.

    Raises ValueError when the requested backend does not exist.
    """
    if requested == "auto":
        return Kernels("reference", f"plain torch, the only implementation for {device} so far", reference)
    if requested not in BACKENDS:
        raise ValueError(f"kernel backend {requested!r} does not exist; choose one of auto, {', '.join(BACKENDS)}")
    return Kernels(requested, "asked for", BACKENDS[requested])
