"""What one tenant may store and pin, checked before an adapter is stored or pinned.

Only what grows is refused: who is over a limit that was lowered can still delete, move aliases and unpin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from heddle_adapters.store_index import AdapterRecord, AdapterVersion
from heddle_server.api.errors import QuotaExceeded
from heddle_server.key_store import TenantLimits


class Quota:
    """One tenant's limits."""

    def __init__(self, limits: TenantLimits, pool_bytes_of: Callable[[AdapterVersion], int]) -> None:
        """`pool_bytes_of` says what a version takes of the page pool; it is asked where pins are limited."""
        self._limits = limits
        self._pool_bytes_of = pool_bytes_of

    def check(self, after: AdapterRecord, owned: Sequence[AdapterRecord]) -> None:
        """Raises `QuotaExceeded` where the owner of all `owned` may not have `after` too, or for what has its name."""
        changed = [*(record for record in owned if record.name != after.name), after]
        adapters, limit = len(owned), self._limits.adapters
        if limit is not None and len(changed) > max(limit, adapters):
            raise QuotaExceeded(
                f"You have {adapters} adapters and may have {limit}. Delete one, upload a new version of one, or ask "
                "the server's operator for more.",
                param="name",
            )
        if (limit := self._limits.stored_bytes) is not None:
            stored, wanted = _stored_bytes(owned), _stored_bytes(changed)
            if wanted > max(limit, stored):
                raise QuotaExceeded(
                    f"Your adapters take {stored} bytes on disk, would take {wanted} with this one, and may take "
                    f"{limit}. Delete versions that you need no more, or ask the server's operator for more."
                )
        if (limit := self._limits.pinned_bytes) is not None:
            pinned, wanted = self._pinned_bytes(owned), self._pinned_bytes(changed)
            if wanted > max(limit, pinned):
                raise QuotaExceeded(
                    f"Your pinned adapters take {pinned} bytes of the page pool, would take {wanted} with this one, "
                    f"and may take {limit}. Unpin some, or ask the server's operator for more.",
                    param="pinned",
                )

    def _pinned_bytes(self, records: Iterable[AdapterRecord]) -> int:
        return sum(self._pool_bytes_of(record.latest) for record in records if record.is_pinned)


def _stored_bytes(records: Iterable[AdapterRecord]) -> int:
    return sum(record.size_bytes for record in records)
