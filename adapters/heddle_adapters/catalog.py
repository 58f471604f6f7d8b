"""What every name means, and for whom: an owner's own adapters, and those that others have made public.

A reference means the asker's own adapter where it has one of that name, else the public one. Nothing here tells one
tenant of another's private adapters. The store lets in one thread at a time; only `find`, `own` and `meaning`, which
look at single entries, need no lock.
"""

from __future__ import annotations

from collections.abc import Iterable

from heddle_adapters.errors import InvalidAdapterName
from heddle_adapters.names import AdapterReference
from heddle_adapters.store_index import AdapterRecord, AdapterVersion


class Catalog:
    """The records of all owners, in memory."""

    def __init__(self, records: Iterable[AdapterRecord]) -> None:
        self._owned: dict[str, dict[str, AdapterRecord]] = {}  # by owner and name
        self._public: dict[str, AdapterRecord] = {}  # by name
        self._versions_of: dict[str, set[AdapterVersion]] = {}  # digest to the versions that are this content
        for record in records:
            self.replace(None, record)

    def replace(self, before: AdapterRecord | None, after: AdapterRecord | None) -> set[str]:
        """Makes one name mean `after` in place of `before`; the digests that no version has any more."""
        if after is not None:
            self._owned.setdefault(after.owner, {})[after.name] = after
            if after.is_public:
                self._public[after.name] = after
        elif before is not None:
            del self._owned[before.owner][before.name]
        if before is not None and before.is_public and (after is None or not after.is_public):
            del self._public[before.name]
        return self._count_versions(before, after)

    def all(self) -> tuple[AdapterRecord, ...]:
        """Of every owner, by name and owner."""
        records = [record for owned in self._owned.values() for record in owned.values()]
        return tuple(sorted(records, key=lambda record: (record.name, record.owner)))

    def owned_by(self, owner: str) -> tuple[AdapterRecord, ...]:
        """In no order."""
        return tuple(self._owned.get(owner, {}).values())

    def visible_to(self, tenant: str) -> tuple[AdapterRecord, ...]:
        """What each name means to a tenant, by name."""
        visible = {**self._public, **self._owned.get(tenant, {})}
        return tuple(visible[name] for name in sorted(visible))

    def names_visible_to(self, tenant: str) -> tuple[str, ...]:
        """In no order."""
        return tuple({**self._public, **self._owned.get(tenant, {})})

    def find(self, name: str, tenant: str) -> AdapterRecord | None:
        """What a name means to a tenant."""
        return self.own(name, tenant) or self._public.get(name)

    def own(self, name: str, owner: str) -> AdapterRecord | None:
        """What an owner's own name means."""
        return self._owned.get(owner, {}).get(name)

    def published(self, name: str) -> AdapterRecord | None:
        """The one public adapter of a name."""
        return self._public.get(name)

    def meaning(self, reference: str, tenant: str) -> AdapterVersion | None:
        """The version that a reference means to a tenant."""
        try:
            parsed = AdapterReference.parse(reference)
        except InvalidAdapterName:
            return None
        record = self.find(parsed.name, tenant)
        return None if record is None else record.meanings.get(parsed.selector)

    def versions_of(self, digest: str) -> tuple[AdapterVersion, ...]:
        """The versions of all owners that are this content, by name, owner and number."""
        versions = self._versions_of.get(digest, ())
        return tuple(sorted(versions, key=lambda version: (version.name, version.owner, version.version)))

    def is_named(self, digest: str) -> bool:
        """Whether any version is this content."""
        return digest in self._versions_of

    def _count_versions(self, before: AdapterRecord | None, after: AdapterRecord | None) -> set[str]:
        old, new = (set(record.versions if record else ()) for record in (before, after))
        for version in new - old:
            self._versions_of.setdefault(version.digest, set()).add(version)
        for version in old - new:
            self._versions_of[version.digest].remove(version)
        unnamed = {version.digest for version in old - new if not self._versions_of[version.digest]}
        for digest in unnamed:
            del self._versions_of[digest]
        return unnamed
