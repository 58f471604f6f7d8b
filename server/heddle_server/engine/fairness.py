"""Whose turn it is: tenants share the engine by the tokens they were served, not by the requests they sent. No torch.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): every tenant's counter
grows with the work done for it, and the tenant with the smallest goes first. One that comes back after a pause is
lifted to the smallest of those who wait, since what it did not use is not saved up for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

PROMPT_TOKEN_WEIGHT = 1  # a prompt's tokens are computed side by side
GENERATED_TOKEN_WEIGHT = 2  # an answer's tokens take a step each; both weights are the paper's
MAX_GONE = 1024  # tenants without requests whose counters are kept before looking which of them still matter


class VirtualTokenCounters:
    """Weighted tokens served by tenant. A tenant is active while a request of its waits."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._waiting: Counter[str] = Counter()  # requests by active tenant
        self._level = 0  # the smallest counter among the active ones when last looked at; never sinks

    def activate(self, tenant: str) -> None:
        """One more of its requests waits."""
        if tenant not in self._waiting:
            self._served[tenant] = max(self.served(tenant), self._current_level())
        self._waiting[tenant] += 1

    def deactivate(self, tenant: str) -> None:
        """One request less of it waits: it was started, or is gone."""
        assert self._waiting[tenant] > 0, f"no request of {tenant} waits"
        self._current_level()
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._forget_the_gone()

    def charge(self, tenant: str, num_prompt_tokens: int = 0, num_generated_tokens: int = 0) -> None:
        """It was served so many tokens: prompt tokens as computed, not as found in the cache."""
        work = PROMPT_TOKEN_WEIGHT * num_prompt_tokens + GENERATED_TOKEN_WEIGHT * num_generated_tokens
        self._served[tenant] = self.served(tenant) + work

    def served(self, tenant: str) -> int:
        """Its counter: the smaller, the sooner its turn."""
        return self._served.get(tenant, self._level)

    def first(self, tenants: Iterable[str]) -> str:
        """The tenant whose turn it is; among equals, the one named first."""
        return min(tenants, key=self.served)

    def _current_level(self) -> int:
        """What a tenant that becomes active is lifted to. With nobody waiting, that of the last who did."""
        if self._waiting:
            self._level = min(self._served[tenant] for tenant in self._waiting)
        return self._level

    def _forget_the_gone(self) -> None:
        """Drop those who would be lifted anyway when they came back."""
        if len(self._served) > MAX_GONE + 2 * len(self._waiting):
            self._served = {
                tenant: served
                for tenant, served in self._served.items()
                if tenant in self._waiting or served > self._level
            }
