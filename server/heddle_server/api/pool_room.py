"""What the page pool of the loaded base has room for: one adapter, and all that are pinned together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from heddle_adapters.errors import AdapterExceedsPool, AdapterIncompatible
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.api.errors import PinCapacity
from heddle_server.messages import ModelCard

WIDE_DTYPE = "float32"


class Packable(Protocol):
    """An adapter of which one can tell what its rows take."""

    def estimate_bytes(self, row_dtype_bytes: int) -> int: ...

    @property
    def num_prefix_tokens(self) -> int: ...


class PoolRoom:
    """Sizes without alignment: the rows of an adapter that fits may take some pages more."""

    def __init__(self, model: ModelCard, tenant_pool_share: float = 1.0) -> None:
        """`tenant_pool_share`: the part of the pool that one tenant's adapters may take."""
        self._model = model
        self._tenant_pool_share = tenant_pool_share

    def bytes_of(self, adapter: Packable) -> int:
        """Its rows and vectors in the dtype that this server computes in."""
        return adapter.estimate_bytes(4 if self._model.dtype == WIDE_DTYPE else 2)

    def pages_of(self, adapter: Packable) -> int:
        """A prefix's keys and values take pages of their own, as those of requests do."""
        model = self._model
        prefix_bytes = adapter.num_prefix_tokens * model.page_bytes // model.page_tokens
        num_prefix_pages = math.ceil(adapter.num_prefix_tokens / model.page_tokens)
        return num_prefix_pages + math.ceil((self.bytes_of(adapter) - prefix_bytes) / model.page_bytes)

    def share_of(self, adapter: Packable) -> float:
        """The part of the pool that it takes, rounded to a thousandth of a percent."""
        return round(self.pages_of(adapter) / self._model.num_pages, 5)

    @property
    def num_pinnable_pages(self) -> int:
        """All but those that one request of the longest context needs."""
        return self._model.num_pages - math.ceil(self._model.max_model_len / self._model.page_tokens)

    @property
    def num_tenant_pages(self) -> int:
        """What one tenant's adapters may take."""
        return int(self._tenant_pool_share * self._model.num_pages)

    def check_fits(self, adapter: Packable) -> None:
        """Raises `AdapterExceedsPool` for one that could never be on the device."""
        needed = self.bytes_of(adapter)
        if needed > self._model.pool_bytes:
            raise AdapterExceedsPool(
                f"{WEIGHTS_FILE} needs {needed} bytes of the page pool, which has {self._model.pool_bytes}; "
                "start the server with a larger --pool-bytes.",
                param=WEIGHTS_FILE,
            )

    def check_context(self, num_virtual_tokens: int) -> None:
        """Raises `AdapterIncompatible` for an adapter whose own tokens leave no room for a prompt and an answer."""
        if num_virtual_tokens > self._model.max_model_len - 2:
            raise AdapterIncompatible(
                f"{WEIGHTS_FILE} puts {num_virtual_tokens} tokens before every prompt, and this server's context has "
                f"{self._model.max_model_len}: nothing could be asked. Train fewer, or have the server started with a "
                "larger --max-model-len.",
                param=WEIGHTS_FILE,
            )

    def check_pins(self, own: Iterable[Packable], others: Iterable[Packable], *, tells_totals: bool) -> None:
        """Raises `PinCapacity` unless all these may stay on the device together: one tenant's, and all others'.

        Only where it `tells_totals` the message says how much others have pinned.
        """
        num_own = sum(map(self.pages_of, own))
        num_pages = num_own + sum(map(self.pages_of, others))
        page_bytes = self._model.page_bytes
        if num_own > self.num_tenant_pages:
            raise PinCapacity(
                f"Your pinned adapters together would need {num_own * page_bytes} bytes of the page pool, and one "
                f"tenant's adapters may take {self.num_tenant_pages * page_bytes}. Pin fewer of them, or have the "
                "server started with a larger --tenant-pool-share or --pool-bytes.",
                param="pinned",
            )
        if num_pages > self.num_pinnable_pages and not tells_totals:
            raise PinCapacity(
                "The adapter does not fit beside what is pinned in the page pool. Unpin some of yours, or ask the "
                "server's operator.",
                param="pinned",
            )
        if num_pages > self.num_pinnable_pages:
            raise PinCapacity(
                f"All pinned adapters together would need {num_pages * page_bytes} bytes of the page pool, and "
                f"{max(0, self.num_pinnable_pages) * page_bytes} of its {self._model.num_pages * page_bytes} may be "
                f"pinned: one request of {self._model.max_model_len} tokens must still fit. Pin fewer adapters, or "
                "start the server with a larger --pool-bytes or a smaller --max-model-len.",
                param="pinned",
            )

    def pins_that_fit(self, pinned: Iterable[tuple[str, str, Packable]]) -> dict[str, str]:
        """What may be pinned of (digest, tenant, adapter), in the order given: tenants by digest.

        One that does not fit the pool, or its tenant's share, is passed over.
        """
        num_left = self.num_pinnable_pages
        num_left_of: dict[str, int] = {}
        tenants: dict[str, str] = {}
        for digest, tenant, adapter in pinned:
            num_pages = self.pages_of(adapter)
            num_left_of.setdefault(tenant, self.num_tenant_pages)
            if digest not in tenants and num_pages <= min(num_left, num_left_of[tenant]):
                tenants[digest] = tenant
                num_left -= num_pages
                num_left_of[tenant] -= num_pages
        return tenants
