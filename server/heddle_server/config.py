"""The settings of one server: frozen, documented, validated where they are built.

`EngineConfig` travels to the engine process; `ServerConfig` stays with the API process. What a setting may be stands in
its type, which `options` shares; there flags, environment and file become these.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from annotated_types import Interval

Quantization = Literal["nf4", "fp4", "int8", "none"]
LoadFormat = Literal["auto", "dummy"]
BaseCacheName = Literal["none", "bf16"]
KernelsName = Literal["auto", "reference", "compiled", "triton"]
OverlapName = Literal["auto", "on", "off"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
DeviceName = Literal["auto", "cuda", "cpu"]
EvictionName = Literal["cost", "gdsf", "lru"]
Count = Annotated[int, Interval(ge=1)]
NonNegative = Annotated[int, Interval(ge=0)]
ContextLength = Annotated[int, Interval(ge=2)]
Share = Annotated[float, Interval(gt=0, le=1)]
Seconds = Annotated[float, Interval(gt=0)]
Port = Annotated[int, Interval(ge=0, le=65535)]

PAGE_TOKENS = 16  # tokens of KV in one page; DESIGN's page size, not a setting

_BOUNDS = {"gt": ("more than", operator.gt), "ge": ("at least", operator.ge), "le": ("at most", operator.le)}


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
    pool_bytes: Count | None = None  # KV pages and adapter rows together; None = from memory_fraction
    memory_fraction: Share | None = (
        None  # share of the memory free after loading; None = 0.85 on cuda, 0.25 and at most 1 GiB on cpu
    )
    host_cache_bytes: NonNegative | None = None  # adapters kept ready in host memory; None = a quarter, 8 GiB at most
    eviction: EvictionName = "cost"  # which idle adapter or cached prefix gives way first
    tenant_pool_share: Share = 1.0  # of the pool that one tenant's adapters may hold
    allow_dense_adapters: bool = False  # take adapters whose change of a layer is as large as its weight
    max_model_len: ContextLength | None = None  # prompt and answer together; None = the model's own limit
    max_batch_tokens: Count = 2048  # tokens computed in one step, decodes and prefill chunks together
    max_batch_requests: Count = 256  # requests running at once
    num_threads: Count | None = None  # of the CPU per operation; None = 1 for a small base, else every core

    def __post_init__(self) -> None:
        check(self)
        if self.pool_bytes is not None and self.memory_fraction is not None:
            raise ConfigError("--pool-bytes and --memory-fraction both size the page pool: give one of them.")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the API process needs."""

    engine: EngineConfig
    store_path: Path  # adapters: SQLite index and content
    host: str = "127.0.0.1"  # loopback unless told otherwise
    port: Port = 8000
    allow_anonymous: bool = False  # serve without API keys on an address other than loopback
    max_upload_bytes: Count = 1 << 30  # one adapter upload, both files
    max_body_bytes: Count = 1 << 20  # any other request body
    max_engine_restarts: NonNegative = 3  # failed restarts in a row before the server gives up
    adapters_path: Path | None = None  # a folder of PEFT folders to register at start
    keep_versions: Count | None = None  # newest versions kept of each adapter, beside aliased ones; None = all
    max_queued_requests: Count = 1024  # in flight at once, before more are refused
    max_queue_seconds: Seconds = 60.0  # a request that would wait longer for its first token is refused at once

    def __post_init__(self) -> None:
        check(self)


def check(config: msgspec.Struct) -> None:
    """Raises `ConfigError` for the first field whose value its type does not allow."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if value is not None and not _is_allowed(value, hint):
            flag = name.removeprefix("num_").replace("_", "-")
            raise ConfigError(f"--{flag} is {value!r}; it must be {allowed(hint)}.")


def allowed(hint: Any) -> str:
    """What a setting of this type may be, for people; nothing where the type alone says it."""
    own = own_type(hint)
    if get_origin(own) is Literal:
        return f"one of {', '.join(get_args(own))}"
    return " and ".join(f"{_BOUNDS[kind][0]} {bound}" for kind, bound in _bounds(own).items())


def own_type(hint: Any) -> Any:
    """Without `| None`."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(each for each in get_args(hint) if each is not type(None))


def _is_allowed(value: Any, hint: Any) -> bool:
    own = own_type(hint)
    if get_origin(own) is Literal:
        return value in get_args(own)
    return all(_BOUNDS[kind][1](value, bound) for kind, bound in _bounds(own).items())


def _bounds(own: Any) -> Mapping[str, Any]:
    """By their kind, a key of _BOUNDS."""
    found = (each for each in getattr(own, "__metadata__", ()) if isinstance(each, Interval))
    return {kind: bound for each in found for kind in _BOUNDS if (bound := getattr(each, kind)) is not None}


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)
