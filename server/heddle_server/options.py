"""Every setting of a server, declared once: a flag, an environment variable and a key of a TOML file.

A field's name is its name everywhere: `--pool-bytes`, `HEDDLE_POOL_BYTES`, and `pool_bytes` in the file. A flag wins
over the environment, the environment over the file, the file over the default.
"""

from __future__ import annotations

import difflib
import functools
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from heddle_server.config import (
    BaseCacheName,
    ConfigError,
    ContextLength,
    Count,
    DeviceName,
    DtypeName,
    EngineConfig,
    EvictionName,
    KernelsName,
    LoadFormat,
    NonNegative,
    OverlapName,
    Port,
    Quantization,
    Seconds,
    ServerConfig,
    Share,
    allowed,
    own_type,
)
from heddle_server.model_files import find_model, model_name
from heddle_server.sizes import format_size, parse_size

VARIABLE_PREFIX = "HEDDLE_"
DEFAULT_STORE = Path("~/.heddle/store")


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


SIZE = BeforeValidator(_size)  # "2GiB" is as good as its bytes


class ServeOptions(BaseSettings):
    """What a server is started with, beside its model. `load_options` makes one for people, with errors for people."""

    model_config = SettingsConfigDict(env_prefix=VARIABLE_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    model_name: str | None = Field(
        default=None, description="Name the base answers to, beside 'base' (default: MODEL's own)."
    )
    quantization: Quantization = Field(default="nf4", description="How the base's weights are held.")
    double_quantization: bool = Field(default=True, description="Quantise the scales of 4-bit weights too.")
    load_format: LoadFormat = Field(
        default="auto", description="dummy makes random weights of MODEL's shapes, for measuring without a checkpoint."
    )
    base_cache: BaseCacheName = Field(
        default="none", description="bf16 writes 4-bit weights out once: faster large batches, more memory."
    )
    kernels: KernelsName = Field(
        default="auto", description="Which implementation of the operations runs; auto chooses by device."
    )
    overlap: OverlapName = Field(
        default="auto", description="Plan a step while the one before it runs; auto does so on CUDA."
    )
    dtype: DtypeName = Field(default="auto", description="Compute type; auto is the checkpoint's own.")
    device: DeviceName = Field(default="auto", description="auto takes CUDA where there is a GPU.")
    pool_bytes: Annotated[Count, SIZE] | None = Field(
        default=None, description="Memory for KV cache and adapters together, for example 2GiB."
    )
    memory_fraction: Share | None = Field(
        default=None, description="The same as a share of the memory free after loading."
    )
    host_cache_bytes: Annotated[NonNegative, SIZE] | None = Field(
        default=None,
        description="Host memory for adapters ready to be copied to the device (default: a quarter, 8 GiB at most).",
    )
    eviction: EvictionName = Field(
        default="cost", description="Which idle adapter or cached prefix gives way when the pool is full."
    )
    tenant_pool_share: Share = Field(default=1.0, description="Share of the pool that one tenant's adapters may hold.")
    allow_dense_adapters: bool = Field(
        default=False,
        description="Take adapters that change a layer by a matrix as large as its weight, such as OFT and HiRA.",
    )
    max_model_len: ContextLength | None = Field(
        default=None, description="Tokens of prompt and answer together (default: the model's limit)."
    )
    max_batch_tokens: Count = Field(default=2048, description="Tokens computed in one step.")
    max_batch_requests: Count = Field(default=256, description="Requests running at once.")
    threads: Count | None = Field(
        default=None, description="CPU threads per operation (default: 1 for a small base, else every core)."
    )
    store: Path = Field(default=DEFAULT_STORE, description="Folder that keeps uploaded adapters.")
    adapters: Path | None = Field(
        default=None, description="Folder of PEFT folders to register at start, each under its own name."
    )
    keep_versions: Count | None = Field(
        default=None, description="Newest versions kept of each adapter, beside aliased ones (default: all)."
    )
    max_upload_bytes: Annotated[Count, SIZE] = Field(
        default=1 << 30, description="Largest upload of an adapter, both files."
    )
    max_body_bytes: Annotated[Count, SIZE] = Field(default=1 << 20, description="Largest body of any other request.")
    max_queued_requests: Count = Field(
        default=1024, description="Requests in flight at once; more are refused with 503."
    )
    max_queue_seconds: Seconds = Field(
        default=60.0, description="A request that would wait longer for its first token is refused at once."
    )
    max_engine_restarts: NonNegative = Field(
        default=3, description="Failed restarts of the engine in a row before the server gives up."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; loopback unless told otherwise.")
    port: Port = Field(default=8000, description="Port to listen on; 0 takes a free one.")
    allow_anonymous: bool = Field(
        default=False, description="Serve without API keys on an address other than loopback."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def config(self, model: str) -> ServerConfig:
        """The whole server's settings for `model`, a directory or hub id; raises `ConfigError`."""
        store_path = self.store.expanduser().resolve()
        engine = EngineConfig(
            model_path=str(find_model(model, with_weights=self.load_format != "dummy")),
            model_name=self.model_name or model_name(model),
            store_path=str(store_path),
            num_threads=self.threads,
            **self._fields_of(EngineConfig, but="model_name"),
        )
        return ServerConfig(
            engine=engine,
            store_path=store_path,
            adapters_path=None if self.adapters is None else _adapters_folder(self.adapters.expanduser().resolve()),
            **self._fields_of(ServerConfig),
        )

    def _fields_of(self, kind: type[EngineConfig] | type[ServerConfig], but: str = "") -> Mapping[str, Any]:
        """The settings that a config has under the same name."""
        shared = type(self).model_fields.keys() & set(kind.__struct_fields__) - {but}
        return {name: getattr(self, name) for name in shared}


def load_options(flags: Mapping[str, Any], file: Path | None = None) -> ServeOptions:
    """The settings from `flags` (by field, as they were typed), the environment and a TOML file.

    Raises `ConfigError` that says which setting is wrong, where it comes from and what it may be.
    """
    keys = {} if file is None else _keys_of(file)

    class OptionsOfFile(ServeOptions):
        model_config = SettingsConfigDict(toml_file=file)

    def name_given(field: str) -> str:
        """What the user wrote to set it."""
        if field in flags:
            return flag_of(field)
        return f"{field} in {file}" if field in keys and not os.environ.get(variable_of(field)) else variable_of(field)

    try:
        options = OptionsOfFile(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        field, value = str(first["loc"][0]), first["input"]
        shown = value if isinstance(value, str) and value.strip() else repr(value)
        raise ConfigError(f"{name_given(field)} is {shown}; it must be {expected(field)}.") from None
    if options.pool_bytes is not None and options.memory_fraction is not None:
        both = f"{name_given('pool_bytes')} and {name_given('memory_fraction')}"
        raise ConfigError(f"{both} both size the page pool: give one of them.")
    return options


def flag_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def variable_of(field: str) -> str:
    return VARIABLE_PREFIX + field.upper()


def expected(field: str) -> str:
    """What a setting may be, for people."""
    hint = hints()[field]
    kind = next((word for test, word in _KINDS if test(hint)), "")
    return ", ".join(filter(None, (kind, allowed(hint))))


def written(field: str) -> str | None:
    """A setting's default as a user would write it; None where it has none."""
    default = ServeOptions.model_fields[field].default
    if isinstance(default, bool):
        return str(default).lower()
    if default is not None and is_size(hints()[field]):
        return format_size(default).replace(".00 ", "").replace(".0 ", "")
    return None if default is None else str(default)


def is_size(hint: Any) -> bool:
    return SIZE in getattr(own_type(hint), "__metadata__", ())


def plain_type(hint: Any) -> Any:
    """The type behind bounds and `| None`; None for a choice of words."""
    own = own_type(hint)
    return None if get_origin(own) is Literal else getattr(own, "__origin__", own)


@functools.cache
def hints() -> Mapping[str, Any]:
    """Each setting's type, with its bounds."""
    every = get_type_hints(ServeOptions, include_extras=True)
    return {name: every[name] for name in ServeOptions.model_fields}


_KINDS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (is_size, "a size such as 512MiB"),
    (lambda hint: plain_type(hint) is int, "a whole number"),
    (lambda hint: plain_type(hint) is float, "a number"),
    (lambda hint: plain_type(hint) is bool, "true or false"),
    (lambda hint: plain_type(hint) is Path, "a path"),
    (lambda hint: plain_type(hint) is str, "text"),
)


def _keys_of(file: Path) -> Mapping[str, Any]:
    """What it sets; raises `ConfigError` unless it is TOML whose every key is a setting."""
    try:
        keys = tomllib.loads(file.expanduser().read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the file of settings {file} cannot be read: {reason}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the file of settings {file} is not TOML: {error}.") from None
    known = list(ServeOptions.model_fields)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`heddle serve --help` lists all."
            raise ConfigError(f"{file} sets {key}, which is no setting; {hint}")
    return keys


def _adapters_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"--adapters is {path}, which is no folder.")
    if (path / "adapter_config.json").exists():
        raise ConfigError(f"--adapters is {path}, which is itself an adapter; give the folder that it lies in.")
    return path
