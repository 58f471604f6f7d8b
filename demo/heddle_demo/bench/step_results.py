"""Where the time of a decode step went. Prints nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from heddle_demo.bench.floor import BaseBytes, Floor
from heddle_demo.bench.step_plan import StepPlan

SCHEMA_VERSION = 1  # of to_json(); counts up when a field changes its meaning or goes away, not when one is added
HOST_TARGET_SECONDS = 0.0005  # of a step with 64 sequences


@dataclass(frozen=True)
class StepCost:
    """The mean decode step of one mix, in seconds."""

    mix: str
    num_distinct: int  # adapters in a step
    num_steps: int
    step_seconds: float
    median_step_seconds: float
    host_seconds: float  # by the engine's own counter: outside forward, sampling and planning rows
    row_plan_seconds: float  # host time as well
    parts: dict[str, float]  # on the CPU everything else that is known; on a GPU what its kernels took

    @property
    def host_and_plan_seconds(self) -> float:
        """All that the host does outside the forward."""
        return self.host_seconds + self.row_plan_seconds


@dataclass(frozen=True)
class StepResults:
    """One whole run."""

    plan: StepPlan
    machine: dict[str, Any]
    device_type: str  # "cpu" or "cuda"
    device: str  # its name
    num_threads: int
    kernels: str
    bandwidth_bytes_per_second: float
    base_bytes: BaseBytes
    row_bytes: int  # of one adapter
    costs: tuple[StepCost, ...]

    def floor(self, cost: StepCost) -> Floor:
        num_cached = self.plan.batch * (self.plan.num_prompt_tokens + self.plan.num_steps / 2)
        return Floor(
            weight_bytes=self.base_bytes.weights,
            adapter_bytes=cost.num_distinct * self.row_bytes,
            kv_bytes=round(num_cached * self.base_bytes.kv_per_token),
            bandwidth_bytes_per_second=self.bandwidth_bytes_per_second,
            measured_step_seconds=cost.step_seconds,
        )

    def rest_seconds(self, cost: StepCost) -> float:
        """In no part: on the CPU other operations and Python between them, on a GPU its waiting for the host."""
        host_seconds = 0.0 if self.device_type == "cuda" else cost.host_seconds  # a GPU computes meanwhile
        return cost.step_seconds - host_seconds - sum(cost.parts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "bench": "step",
            "machine": self.machine,
            "device": self.device,
            "num_threads": self.num_threads,
            "kernels": self.kernels,
            "plan": self.plan.to_json(),
            "steps": [
                {
                    **asdict(cost),
                    "host_and_plan_seconds": cost.host_and_plan_seconds,
                    "rest_seconds": self.rest_seconds(cost),
                    "floor": self.floor(cost).to_json(),
                }
                for cost in self.costs
            ],
        }
