"""What one run of `heddle bench kernels` came to. Prints nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from heddle_demo.bench.kernel_plan import KernelPlan

SCHEMA_VERSION = 1  # of to_json(); counts up when a field changes its meaning or goes away, not when one is added


@dataclass(frozen=True)
class Timing:
    """One operation by one arm in one size."""

    part: str  # "linears" or "rows"
    layer: str  # whose linears: "gate_up", "down", …
    size: dict[str, Any]  # what else tells the case: tokens, or batch, popularity and rank
    arm: str
    seconds: float  # of one call
    num_bytes: int  # that this arm must move at least
    floor_bytes: int  # that any arm must move, weights in 4 bit
    relative_error: float  # L2, against the same computed in float32

    def floor_share(self, bandwidth: float) -> float:
        """The time that `floor_bytes` take at this bandwidth, as a share of the time that it took."""
        return self.floor_bytes / bandwidth / self.seconds

    def to_json(self, bandwidth: float) -> dict[str, Any]:
        return {
            **asdict(self),
            "bytes_per_second": self.num_bytes / self.seconds,
            "floor_share": self.floor_share(bandwidth),
        }


@dataclass(frozen=True)
class KernelResults:
    """One whole run."""

    plan: KernelPlan
    machine: dict[str, Any]
    device: str
    kernels: str
    bandwidth_bytes_per_second: float
    timings: tuple[Timing, ...]
    skipped: tuple[str, ...] = field(default=())  # what there was no time for, or what cannot run here

    def to_json(self) -> dict[str, Any]:
        bandwidth = self.bandwidth_bytes_per_second
        return {
            "schema_version": SCHEMA_VERSION,
            "bench": "kernels",
            "machine": self.machine,
            "device": self.device,
            "kernels": self.kernels,
            "bandwidth_bytes_per_second": bandwidth,
            "plan": self.plan.to_json(),
            "skipped": list(self.skipped),
            **{
                part: [timing.to_json(bandwidth) for timing in self.timings if timing.part == part]
                for part in ("linears", "rows")
            },
        }
