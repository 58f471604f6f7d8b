"""How much `heddle bench step` measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from heddle_demo.bench.failure import BenchFailed, require_at_least
from heddle_demo.bench.shapes import SHAPES
from heddle_server.config import DeviceName, KernelsName

STEP_MIXES = ("base", "identical", "distinct")


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One run: decode steps of a batch, again and again."""

    shape: str
    device: DeviceName = "auto"
    batch: int = 8
    num_adapters: int = 8
    rank: int = 16
    num_prompt_tokens: int = 32
    num_steps: int = 64  # measured, of each mix
    num_warm_up_steps: int = 8
    kernels: KernelsName = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise BenchFailed(f"--shape knows {', '.join(SHAPES)}, and not {self.shape}.")
        require_at_least(
            1,
            {
                "--batch": self.batch,
                "--adapters": self.num_adapters,
                "--rank": self.rank,
                "--prompt-tokens": self.num_prompt_tokens,
                "--steps": self.num_steps,
                "--threads": self.num_threads,
            },
        )

    @property
    def num_new_tokens(self) -> int:
        """More than any request gets before its batch is given up; a GPU runs its steps twice."""
        return self.num_warm_up_steps + 2 * self.num_steps + 4

    def quick(self) -> StepPlan:
        """The same in small: does it work at all?"""
        return replace(self, num_steps=min(self.num_steps, 8), num_warm_up_steps=2)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
