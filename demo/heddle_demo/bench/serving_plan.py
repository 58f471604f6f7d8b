"""How much `heddle bench serving` measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from heddle_demo.bench.failure import BenchFailed, require_at_least
from heddle_demo.bench.mixes import MIXES
from heddle_demo.bench.shapes import SHAPES
from heddle_server.config import DeviceName, KernelsName

DEFAULT_MIXES = ("base", "identical", "distinct")


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """One run: the load, and who carries it."""

    shape: str
    device: DeviceName = "auto"
    batch: int = 8
    num_adapters: int = 8
    rank: int = 16
    num_prompt_tokens: int = 32
    num_new_tokens: int = 64
    num_rounds: int = 5
    mixes: tuple[str, ...] = DEFAULT_MIXES
    has_peft: bool = False  # whether PEFT takes turns with heddle
    kernels: KernelsName = "auto"  # heddle's; auto = the fastest for the device
    num_threads: int | None = None  # of an operation on the CPU; None = as heddle chooses for this base

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise BenchFailed(f"--shape knows {', '.join(SHAPES)}, and not {self.shape}.")
        if unknown := [mix for mix in self.mixes if mix not in MIXES]:
            raise BenchFailed(f"--mixes knows {', '.join(MIXES)}, and not {', '.join(unknown)}.")
        require_at_least(
            1,
            {
                "--batch": self.batch,
                "--adapters": self.num_adapters,
                "--rank": self.rank,
                "--prompt-tokens": self.num_prompt_tokens,
                "--rounds": self.num_rounds,
                "--threads": self.num_threads,
            },
        )
        if self.num_new_tokens < 2:
            raise BenchFailed("--new-tokens must be at least 2: the first belongs to the prompt's time.")

    @property
    def num_tokens(self) -> int:
        """Of one request, prompt and answer."""
        return self.num_prompt_tokens + self.num_new_tokens

    def quick(self) -> ServingPlan:
        """The same in small: does it work at all?"""
        return replace(self, num_new_tokens=min(self.num_new_tokens, 8), num_rounds=min(self.num_rounds, 2))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
