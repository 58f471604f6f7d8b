"""The settings of one server: frozen, documented, validated where they are built.

`EngineConfig` travels to the engine process; `ServerConfig` stays with the API process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import msgspec

Quantization = Literal["nf4", "fp4", "int8", "none"]
LoadFormat = Literal["auto", "dummy"]
BaseCacheName = Literal["none", "bf16"]
KernelsName = Literal["auto", "reference", "compiled", "triton"]
OverlapName = Literal["auto", "on", "off"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
DeviceName = Literal["auto", "cuda", "cpu"]
EvictionName = Literal["cost", "gdsf", "lru"]

PAGE_TOKENS = 16  # tokens of KV in one page; DESIGN's page size, not a setting


class ConfigError(ValueError):
    """A setting that cannot be served; names the setting, its value and what is allowed."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process needs to load a base and run it."""

    model_path: str  # local directory of a transformers causal LM
    model_name: str  # the name the base answers to, beside "base"
    store_path: str  # where adapter content lies, by digest
    quantization: Quantization = "nf4"  # ignored for a checkpoint that is already quantised
    double_quantization: bool = True  # quantise 4-bit weights' block scales too (bitsandbytes' nested statistics)
    load_format: LoadFormat = "auto"  # dummy = random weights of config.json's shapes, no checkpoint needed
    base_cache: BaseCacheName = "none"  # bf16 = 4-bit weights are written out once and kept so
    kernels: KernelsName = "auto"  # which implementation of the operations; auto = by device
    overlap: OverlapName = "auto"  # plan a step while the one before it runs; auto = on CUDA
    dtype: DtypeName = "auto"  # auto = the checkpoint's own
    device: DeviceName = "auto"  # auto = cuda where there is one
    pool_bytes: int | None = None  # KV pages and adapter rows together; None = from memory_fraction
    memory_fraction: float | None = (
        None  # share of the memory free after loading; None = 0.85 on cuda, 0.25 and at most 1 GiB on cpu
    )
    host_cache_bytes: int | None = None  # adapters kept ready in host memory; None = a quarter of it, 8 GiB at most
    eviction: EvictionName = "cost"  # which idle adapter or cached prefix gives way first
    tenant_pool_share: float = 1.0  # of the pool that one tenant's adapters may hold
    max_model_len: int | None = None  # prompt and answer together; None = the model's own limit
    max_batch_tokens: int = 2048  # tokens computed in one step, decodes and prefill chunks together
    max_batch_requests: int = 256  # requests running at once
    num_threads: int | None = None  # of the CPU per operation; None = 1 for a small base, else every core

    def __post_init__(self) -> None:
        _one_of("quantization", self.quantization, get_args(Quantization))
        _one_of("load-format", self.load_format, get_args(LoadFormat))
        _one_of("base-cache", self.base_cache, get_args(BaseCacheName))
        _one_of("kernels", self.kernels, get_args(KernelsName))
        _one_of("overlap", self.overlap, get_args(OverlapName))
        _one_of("dtype", self.dtype, get_args(DtypeName))
        _one_of("device", self.device, get_args(DeviceName))
        _one_of("eviction", self.eviction, get_args(EvictionName))
        _at_least("pool-bytes", self.pool_bytes, 1)
        _at_least("host-cache-bytes", self.host_cache_bytes, 0)
        _at_least("max-model-len", self.max_model_len, 2)
        _at_least("max-batch-tokens", self.max_batch_tokens, 1)
        _at_least("max-batch-requests", self.max_batch_requests, 1)
        _at_least("threads", self.num_threads, 1)
        if self.pool_bytes is not None and self.memory_fraction is not None:
            raise ConfigError("--pool-bytes and --memory-fraction both size the page pool: give one of them.")
        _share("memory-fraction", self.memory_fraction)
        _share("tenant-pool-share", self.tenant_pool_share)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the API process needs."""

    engine: EngineConfig
    store_path: Path  # adapters: SQLite index and content
    host: str = "127.0.0.1"  # loopback unless told otherwise
    port: int = 8000
    max_upload_bytes: int = 1 << 30  # one adapter upload, both files
    max_body_bytes: int = 1 << 20  # any other request body
    max_engine_restarts: int = 3  # failed restarts in a row before the server gives up
    adapters_path: Path | None = None  # a folder of PEFT folders to register at start
    keep_versions: int | None = None  # newest versions kept of each adapter, beside aliased ones; None = all
    max_queued_requests: int = 1024  # in flight at once, before more are refused
    max_queue_seconds: float = 60.0  # a request that would wait longer for its first token is refused at once

    def __post_init__(self) -> None:
        _at_least("keep-versions", self.keep_versions, 1)
        _at_least("max-queued-requests", self.max_queued_requests, 1)
        if not self.max_queue_seconds > 0:
            raise ConfigError(f"--max-queue-seconds is {self.max_queue_seconds}; it must be more than 0.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{name} is {value!r}; it must be one of {', '.join(allowed)}.")


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise ConfigError(f"--{name} is {value}; it must be at least {minimum}.")


def _share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise ConfigError(f"--{name} is {value}; it must lie in (0, 1].")
