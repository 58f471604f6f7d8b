"""A request in flight: its tokens, its pages and how far it has been computed. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from heddle_adapters.tier import Tier
from heddle_server.request import Request


@dataclass(eq=False)  # two requests are never the same one
class Sequence:
    """Prompt and answer of one request. Changed by the scheduler and the engine only."""

    request: Request
    token_ids: list[int]  # prompt, then generated tokens
    slot: int | None = None  # the adapter's line in the row table while running; BASE_SLOT for the base
    pages: list[int] = field(default_factory=list)  # KV pages, in order; the first may be shared
    page_keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the leading full pages
    num_entered: int = 0  # leading pages that were offered to the prefix cache
    num_computed: int = 0  # tokens whose keys and values lie in the pages
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    tier: Tier | None = None  # where its adapter was when it arrived; None for the base
    arrived_at: float = 0.0  # on the monotonic clock
    started_at: float | None = None  # when it was first admitted
    load_seconds: float = 0.0  # of the time between, until its adapter was on the device
    num_overtaken: int = 0  # requests that were started while this one waited for room

    @classmethod
    def of(cls, request: Request) -> Sequence:
        return cls(request, list(request.prompt_token_ids))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens known but not computed: one while decoding, more while prefilling."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return self.num_pending == 1 and self.num_generated > 0
