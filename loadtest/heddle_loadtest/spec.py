"""Everything a closed-loop run is told, checked once. Knows no command line and sends nothing."""

import math
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from heddle_loadtest.errors import SpecError
from heddle_loadtest.style import BASE, AdapterStyle
from heddle_loadtest.workload import BUILTIN_PROMPTS

ALL_ADAPTERS = ("all",)  # stands for the base model and every other model that the target lists


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoopSpec:
    """A closed loop: each stream sends a request, waits for the whole answer, sends the next.

    The run ends after `duration_seconds` or `num_requests`, whichever comes first; requests under way are awaited.
    Raises SpecError, which names the field, if a value is out of range.
    """

    target: str  # base URL of the server, with or without /v1
    num_streams: int = 8  # requests in flight at any time
    duration_seconds: float | None = None  # no request starts later than this
    num_requests: int | None = None  # in total, over all streams
    adapters: tuple[str, ...] = (BASE,)  # asked in turn; a name given twice gets twice the share
    style: AdapterStyle = AdapterStyle.HEDDLE  # how a request names its adapter
    model: str | None = None  # the base model; None: the first that the target lists
    max_tokens: int = 64  # of each answer
    temperature: float = 0.0  # 0: greedy, so that runs can be compared
    prompts: tuple[str, ...] = BUILTIN_PROMPTS  # given to each adapter in an order that the seed decides
    seed: int = 0  # the same seed asks the same questions
    num_warmup_requests: int = 1  # to each adapter before the run; not measured
    timeout_seconds: float = 600.0  # for one request, from start to end
    api_key: str | None = field(default=None, repr=False)  # sent as a bearer token, never shown

    def __post_init__(self) -> None:
        self._check_target()
        self._check_at_least("num_streams", self.num_streams, 1)
        self._check_at_least("max_tokens", self.max_tokens, 1)
        self._check_at_least("num_warmup_requests", self.num_warmup_requests, 0)
        self._check_at_least("seed", self.seed, 0)
        self._check_at_least("temperature", self.temperature, 0)
        self._check_positive("timeout_seconds", self.timeout_seconds)
        if self.duration_seconds is None and self.num_requests is None:
            raise SpecError("duration_seconds", None, "the run has no end", "Give a duration or a number of requests")
        if self.duration_seconds is not None:
            self._check_positive("duration_seconds", self.duration_seconds)
        if self.num_requests is not None:
            self._check_at_least("num_requests", self.num_requests, 1)
        self._check_texts("adapters", self.adapters)
        self._check_texts("prompts", self.prompts)

    def _check_target(self) -> None:
        try:
            url = urlsplit(self.target)
            is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            remedy = "Write it as http://host:port, for example http://127.0.0.1:8000"
            raise SpecError("target", self.target, "is not an http address", remedy)
        if url.username or url.password:  # the target is printed and goes into reports
            raise SpecError("target", None, "holds a user name or a password", "Pass it as the API key instead")

    def _check_at_least(self, name: str, value: float, minimum: int) -> None:
        if not (math.isfinite(value) and value >= minimum):
            raise SpecError(name, value, f"must be {minimum} or more", f"Give a number from {minimum} up")

    def _check_positive(self, name: str, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise SpecError(name, value, "must be more than 0", "Give a positive number of seconds")

    def _check_texts(self, name: str, values: tuple[str, ...]) -> None:
        if not values or not all(value.strip() for value in values):
            raise SpecError(name, ",".join(values), "one is empty", "Give one or more, none of them empty")
