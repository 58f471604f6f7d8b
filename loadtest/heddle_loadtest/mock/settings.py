"""What the fake server is told to be: its speed, its faults, its adapters. Serves nothing."""

from __future__ import annotations

from dataclasses import dataclass

from heddle_loadtest.errors import SpecError

_SHARES = ("error_rate", "break_rate")
_TIMES = ("ttft_seconds", "itl_seconds", "load_seconds", "jitter_seconds")


@dataclass(frozen=True)
class MockSettings:
    """All of it. Raises SpecError for what cannot be."""

    ttft_seconds: float = 0.050  # until the first token of a request whose adapter is there
    itl_seconds: float = 0.010  # between tokens
    load_seconds: float = 0.200  # that a request whose adapter is not on the device waits more
    jitter_seconds: float = 0.0  # each token up to so much late, drawn uniformly; does not add up
    error_rate: float = 0.0  # share of requests that are answered with 503
    break_rate: float = 0.0  # share of the others whose connection is closed half way
    num_adapters: int = 100
    adapter_name: str = "adapter-{index:05d}"  # with the index, from 0
    num_slots: int = 8  # adapters on the device at once; the least recently used leaves
    capacity: int | None = None  # requests computed at once, the others queue; None for any number
    seed: int = 0
    port: int = 0  # 0 for any that is free

    def __post_init__(self) -> None:
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(name, getattr(self, name), "is no share", "Give a number from 0 to 1")
        for name in _TIMES:
            if not 0 <= getattr(self, name) <= 3600:
                raise SpecError(name, getattr(self, name), "is out of range", "Give a time up to an hour")
        try:
            self.adapter_name.format(index=0)
        except (LookupError, ValueError) as error:
            problem = f"is no pattern for a name: {error}"
            raise SpecError("adapter_name", self.adapter_name, problem, "Write it as adapter-{index:05d}") from None
        self._check_least("num_adapters", 0)
        self._check_least("num_slots", 1)
        if self.capacity is not None:
            self._check_least("capacity", 1)
        if not 0 <= self.port < 65536:
            raise SpecError("port", self.port, "is no port", "Give 0 for a free one, or a number up to 65535")

    def _check_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise SpecError(name, getattr(self, name), "is too few", f"Give {least} or more")

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """What the server lists beside its base."""
        return tuple(self.adapter_name.format(index=index) for index in range(self.num_adapters))

    def sustainable_rate(self, num_tokens: int) -> float:
        """Requests per second, each of `num_tokens` tokens, above which the queue grows for ever.

        A request holds its place from its start to its last token; loading its adapter holds none.
        """
        if self.capacity is None:
            return float("inf")
        return self.capacity / (self.ttft_seconds + (num_tokens - 1) * self.itl_seconds)
