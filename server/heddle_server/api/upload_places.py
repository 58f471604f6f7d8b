"""How many uploads a tenant may have under way: each is a file on the store's disk, as large as any may be."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, ExitStack

from heddle_server.api.errors import RateLimitExceeded
from heddle_server.api.principal import Principal

MAX_UPLOADS = 2  # of one tenant at once, trials among them


class UploadPlaces:
    """Of all tenants. Lives on the event loop."""

    def __init__(self) -> None:
        self._num_uploads: Counter[str] = Counter()

    def take(self, principal: Principal) -> AbstractContextManager[object]:
        """A place until the end of the block; raises `RateLimitExceeded`. An admin always gets one."""
        place, tenant = ExitStack(), principal.tenant
        if principal.is_admin:
            return place
        if self._num_uploads[tenant] >= MAX_UPLOADS:
            raise RateLimitExceeded(
                f"You have {MAX_UPLOADS} uploads under way, as many as a tenant may. Try again when one has ended."
            )
        self._num_uploads[tenant] += 1
        place.callback(self._leave, tenant)
        return place

    def _leave(self, tenant: str) -> None:
        self._num_uploads -= Counter([tenant])
