"""How much `heddle bench adapters` measures: its two forms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, counts and seconds of one run."""

    form: str
    num_streams: int  # few: client and servers share the cores. A multiple of the number of ranks, see `own_shares`
    num_prompt_tokens: int
    num_output_tokens: int
    window_seconds: float
    settle_seconds: float  # before each window
    table_sizes: tuple[int, ...]  # registered adapters, S-LoRA's table 3
    table_repeats: int  # windows of each cell
    table_pool_adapters: int  # room on the device, in adapters of the mean size
    table_host_adapters: int  # room in the host tier; the rest is read from disk
    flat_sizes: tuple[int, int]  # registered adapters between which throughput should not change
    num_pairs: int  # windows of each arm where two are compared
    small_pool_adapters: int  # room on the device
    small_pool_uses: tuple[int, int, int]  # adapters in use: all fit, some fit, all that are registered
    small_pool_repeats: int

    @property
    def num_adapters(self) -> int:
        """All that any server knows."""
        return self.store_sizes[-1]

    @property
    def store_sizes(self) -> tuple[int, ...]:
        """Registered adapters of all servers, fewest first."""
        return tuple(sorted({0, *self.table_sizes, *self.flat_sizes}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


FULL = Plan(
    form="full",
    num_streams=8,
    num_prompt_tokens=32,
    num_output_tokens=32,
    window_seconds=4.0,
    settle_seconds=1.5,
    table_sizes=(5, 100, 1000, 2000),
    table_repeats=3,
    table_pool_adapters=128,
    table_host_adapters=512,
    flat_sizes=(100, 2000),
    num_pairs=12,
    small_pool_adapters=32,
    small_pool_uses=(24, 64, 2000),
    small_pool_repeats=4,
)
QUICK = Plan(
    form="quick",
    num_streams=4,
    num_prompt_tokens=16,
    num_output_tokens=8,
    window_seconds=0.6,
    settle_seconds=0.2,
    table_sizes=(5, 200),
    table_repeats=1,
    table_pool_adapters=24,
    table_host_adapters=48,
    flat_sizes=(50, 200),
    num_pairs=2,
    small_pool_adapters=32,
    small_pool_uses=(24, 64, 200),
    small_pool_repeats=1,
)
