"""How much `heddle bench kernels` measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from heddle_demo.bench.failure import BenchFailed, require_at_least
from heddle_demo.bench.shapes import SHAPES

RANK_SETS = {"8": (8,), "16": (16,), "64": (64,), "mixed": (8, 16, 32, 64, 128)}  # in turn, adapter by adapter

Size = TypeVar("Size")


@dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """One run: which operations in which sizes."""

    shape: str
    device: str = "auto"
    kernels: str = "auto"  # heddle's; auto = the fastest for the device
    num_threads: int = 1
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of the linears
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # of the row operations, a token each
    popularities: tuple[str, ...] = ("distinct", "uniform", "skewed", "identical")
    ranks: tuple[str, ...] = tuple(RANK_SETS)
    has_single_linears: bool = True  # q, k, v, gate and up one by one, beside joined
    cpu_seconds: float = 0.15  # of measuring one operation in one size, on the CPU
    max_seconds: float | None = None  # what is not begun by then is left out

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise BenchFailed(f"--shape knows {', '.join(SHAPES)}, and not {self.shape}.")
        require_at_least(1, {"--threads": self.num_threads})
        if unknown := set(self.ranks) - set(RANK_SETS):
            raise BenchFailed(f"--rank knows {', '.join(RANK_SETS)}, and not {', '.join(sorted(unknown))}.")

    def quick(self) -> KernelPlan:
        """The same in small: of each list what stands in a shorter one, or all of it where nothing does."""
        return replace(
            self,
            tokens=_few(self.tokens, (1, 8, 32, 128)),
            batches=_few(self.batches, (1, 8, 32)),
            ranks=_few(self.ranks, ("16", "mixed")),
            popularities=_few(self.popularities, ("distinct", "identical")),
            has_single_linears=False,
            cpu_seconds=0.02,
        )

    def up_to(self, batch: int) -> KernelPlan:
        """With no larger batch."""
        return replace(self, batches=tuple(size for size in self.batches if size <= batch) or (batch,))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _few(wanted: tuple[Size, ...], few: tuple[Size, ...]) -> tuple[Size, ...]:
    return tuple(size for size in wanted if size in few) or wanted
