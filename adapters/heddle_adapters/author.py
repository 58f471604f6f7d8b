"""Who changes adapters: whose they are, and what has a say before a change counts."""

from __future__ import annotations

from collections.abc import Sequence

from heddle_adapters.store_index import LOCAL_OWNER, AdapterRecord


class Author:
    """The owner of what is changed. This one may do everything and tells nobody; subclasses do better.

    Both methods are called while nothing else can change the store.
    """

    def __init__(self, owner: str = LOCAL_OWNER) -> None:
        self.owner = owner

    def permit(self, before: AdapterRecord | None, after: AdapterRecord, owned: Sequence[AdapterRecord]) -> None:
        """Raises what forbids that a name means `after` instead of `before`; nothing has been stored for it yet.

        `owned` is all that the owner has now.
        """

    def record(self, before: AdapterRecord | None, after: AdapterRecord | None) -> None:
        """Hears of a change right before it counts, which it does not where this raises."""
