"""A workload's tenants as workloads of their own. Draws nothing."""

from __future__ import annotations

from msgspec.structs import replace

from heddle_loadtest.workload.spec import Workload

PARTS = ("arrivals", "adapters", "popularity", "prompt", "output")  # what a tenant may have of its own


def split_tenants(workload: Workload) -> dict[str, Workload]:
    """Name -> its own parts, and the whole workload's where it has none; the one tenant "" if there are none."""
    if not workload.tenants:
        return {"": workload}
    return {
        name: replace(
            workload,
            tenants={},
            **{part: own for part in PARTS if (own := getattr(tenant, part)) is not None},
        )
        for name, tenant in workload.tenants.items()
    }


def part_field(workload: Workload, tenant: str, part: str) -> str:
    """The dotted key that a tenant's part was written under: its own, or the workload's."""
    has_own = tenant in workload.tenants and getattr(workload.tenants[tenant], part) is not None
    return f"tenants.{tenant}.{part}" if has_own else part
