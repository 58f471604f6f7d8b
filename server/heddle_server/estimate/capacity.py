"""What fits beside a base: pages, and what they hold."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from heddle_server.adapter_footprint import all_linears, footprint
from heddle_server.config import PAGE_TOKENS, ConfigError, EngineConfig
from heddle_server.engine.resources import CPU_DEFAULT_MAX_BYTES, CPU_FRACTION, CUDA_FRACTION
from heddle_server.estimate.base_outline import BaseOutline, outline

USUAL_CONTEXT = 8192  # tokens, where nobody says how many


@dataclass(frozen=True)
class Wanted:
    """What is to be served beside the base."""

    rank: int
    num_adapters: int
    context: int | None  # tokens of prompt and answer of one request; None: the model's limit, 8192 at most
    targets: Literal["all", "attention"]


@dataclass(frozen=True)
class Estimate:
    """What fits."""

    device: str
    base: BaseOutline
    wanted: Wanted
    memory_bytes: int | None  # of the device, free before the base is loaded; None: the pool's size was given
    pool_bytes: int
    pages_per_adapter: int
    adapter_file_bytes: int

    @property
    def num_pages(self) -> int:
        return self.pool_bytes // self.base.page_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.base.page_bytes // PAGE_TOKENS

    @property
    def bytes_per_adapter(self) -> int:
        return self.pages_per_adapter * self.base.page_bytes

    @property
    def most_tokens(self) -> int:
        """Without adapters."""
        return self.num_pages * PAGE_TOKENS

    @property
    def most_adapters(self) -> int:
        """Without a token."""
        return self.num_pages // self.pages_per_adapter

    @property
    def pages_per_request(self) -> int:
        assert self.wanted.context is not None, "`estimate` has chosen one"
        return -(-self.wanted.context // PAGE_TOKENS)

    @property
    def num_adapters(self) -> int:
        """Of those wanted, that may be on the device beside one request."""
        room = max(0, self.num_pages - self.pages_per_request)
        return min(self.wanted.num_adapters, room // self.pages_per_adapter)

    @property
    def num_requests(self) -> int:
        """Of the wanted context at once, beside these adapters."""
        return (self.num_pages - self.num_adapters * self.pages_per_adapter) // self.pages_per_request

    @property
    def host_bytes(self) -> int:
        """For all wanted adapters to be ready in host memory."""
        return self.wanted.num_adapters * self.bytes_per_adapter

    def as_json(self) -> dict[str, Any]:
        base = {name: value for name, value in asdict(self.base).items() if name not in ("sites", "attention_paths")}
        names = ["memory_bytes", "pool_bytes", "num_pages", "kv_bytes_per_token", "pages_per_adapter"]
        names += ["bytes_per_adapter", "adapter_file_bytes", "most_tokens", "most_adapters", "num_adapters"]
        names += ["num_requests", "host_bytes"]
        numbers = {name: getattr(self, name) for name in names}
        return {"device": self.device, "base": base, "wanted": asdict(self.wanted), **numbers}


def estimate(config: EngineConfig, wanted: Wanted, memory_bytes: int | None) -> Estimate:
    """`memory_bytes` of the device that heddle may use; None: what is free now. Raises ConfigError."""
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    base = outline(config, device)
    if wanted.context is None:
        wanted = replace(wanted, context=min(USUAL_CONTEXT, base.context_length))
    elif wanted.context > base.context_length:
        raise ConfigError(f"--context is {wanted.context}; this model's own limit is {base.context_length}.")
    sites = all_linears(base.sites, base.vocabulary_size)
    if wanted.targets == "attention":
        sites = tuple(site for site in sites if site.path in base.attention_paths)
    if not sites:
        raise ConfigError(f"--targets {wanted.targets}: this model has no such linears.")
    if config.pool_bytes is not None:
        if memory_bytes is not None:
            raise ConfigError("--memory is of no use beside --pool-bytes, which says all: give one of them.")
        pool_bytes = config.pool_bytes
    else:
        given, memory_bytes = memory_bytes is not None, memory_bytes or _free_bytes(device)
        pool_bytes = _pool_bytes(config, device, memory_bytes - base.weights_bytes, is_given=given)
    if pool_bytes < base.page_bytes:
        raise ConfigError("the base alone takes all of this memory: nothing is left for keys, values and adapters.")
    adapter = footprint(sites, wanted.rank, base.dtype, base.page_bytes)
    return Estimate(
        device=device,
        base=base,
        wanted=wanted,
        memory_bytes=memory_bytes,
        pool_bytes=pool_bytes // base.page_bytes * base.page_bytes,
        pages_per_adapter=adapter.num_pages,
        adapter_file_bytes=adapter.file_bytes,
    )


def _pool_bytes(config: EngineConfig, device: str, free_bytes: int, *, is_given: bool) -> int:
    """As `heddle serve` takes them of what is free beside the base; of memory that was named, a GPU's share."""
    if config.memory_fraction is not None:
        return int(free_bytes * config.memory_fraction)
    if device == "cuda" or is_given:
        return int(free_bytes * CUDA_FRACTION)
    return min(int(free_bytes * CPU_FRACTION), CPU_DEFAULT_MAX_BYTES)


def _free_bytes(device: str) -> int:
    if device == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device here; say how much memory yours has, for example --memory 24GiB.")
    return int(torch.cuda.mem_get_info()[0])
