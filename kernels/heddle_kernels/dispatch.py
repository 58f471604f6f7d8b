"""Which implementation of the operations runs on which device: decided here, once, and said aloud."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch

from heddle_kernels.ops import Ops
from heddle_kernels.reference import ReferenceOps


class BackendUnavailable(ValueError):
    """A backend was asked for that cannot run here; says why."""


@dataclass(frozen=True)
class Kernels:
    """The chosen operations, and why these."""

    ops: Ops
    reason: str

    @property
    def name(self) -> str:
        return self.ops.name


def select_kernels(device: torch.device, dtype: torch.dtype, requested: str = "auto") -> Kernels:
    """The operations for a device and compute dtype; `requested` forces one by name.

    Raises BackendUnavailable when the one asked for does not exist or cannot run here. When the best one for the
    device cannot, the plain torch operations run, and the reason says why.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise BackendUnavailable(f"{requested!r} does not exist; choose one of auto, {', '.join(BACKENDS)}")
        missing, make = BACKENDS[requested]
        if (why := missing(device, dtype)) is not None:
            raise BackendUnavailable(f"{requested!r} cannot run here: {why}")
        return Kernels(make(device, dtype), "asked for")
    best = "triton" if device.type == "cuda" else "compiled"
    missing, make = BACKENDS[best]
    if (why := missing(device, dtype)) is not None:
        return Kernels(ReferenceOps(), f"{best} cannot run here: {why}")
    return Kernels(make(device, dtype), f"the fastest for {device.type}")


def _why_no_compiled(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device.type}"
    if find_spec("numba") is None:
        return "numba is not installed (pip install 'heddle[cpu]')"
    why: str | None = import_module("heddle_kernels.cpu_kernels.ops").why_not(dtype)
    return why


def _make_compiled(device: torch.device, dtype: torch.dtype) -> Ops:
    ops: Ops = import_module("heddle_kernels.cpu_kernels.ops").CpuOps()
    return ops


def _why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    why: str | None = import_module("heddle_kernels.triton_kernels.ops").why_not(device, dtype)
    return why


def _make_triton(device: torch.device, dtype: torch.dtype) -> Ops:
    ops: Ops = import_module("heddle_kernels.triton_kernels.ops").TritonOps(device)
    return ops


Missing = Callable[[torch.device, torch.dtype], str | None]
Make = Callable[[torch.device, torch.dtype], Ops]
BACKENDS: dict[str, tuple[Missing, Make]] = {
    "reference": (lambda device, dtype: None, lambda device, dtype: ReferenceOps()),
    "compiled": (_why_no_compiled, _make_compiled),
    "triton": (_why_no_triton, _make_triton),
}
