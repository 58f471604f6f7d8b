"""The options of `heddle serve`, declared once for every command that starts a server."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from heddle_server.config import (
    BaseCacheName,
    ConfigError,
    DeviceName,
    DtypeName,
    EngineConfig,
    EvictionName,
    KernelsName,
    LoadFormat,
    OverlapName,
    Quantization,
    ServerConfig,
)
from heddle_server.model_files import find_model, model_name

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2GB" or "1000000"."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write for example 512MiB or 2GB.")
    return int(float(match["number"]) * _UNITS[(match["unit"] or "").lower()])


def format_size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1024."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB" if num_bytes >= 2**10 else f"{num_bytes} B"


def _option(flag: str, help: str, **more: Any) -> Any:
    name = flag.split("/")[0]
    # The variables' names follow from the options', and --help says how.
    envvar = f"HEDDLE_{name.upper().replace('-', '_')}"
    return typer.Option(f"--{flag}", envvar=envvar, show_envvar=False, help=help, **more)


@dataclass(frozen=True)
class ServeOptions:
    """What a server is started with, beside its model."""

    served_name: Annotated[
        str | None, _option("model-name", "Name the base answers to, beside 'base' (default: MODEL's own).")
    ] = None
    quantization: Annotated[Quantization, _option("quantization", "How the base's weights are held.")] = "nf4"
    double_quantization: Annotated[
        bool, _option("double-quantization/--no-double-quantization", "Quantise the scales of 4-bit weights too.")
    ] = True
    load_format: Annotated[
        LoadFormat,
        _option("load-format", "dummy makes random weights of MODEL's shapes, for measuring without a checkpoint."),
    ] = "auto"
    base_cache: Annotated[
        BaseCacheName, _option("base-cache", "bf16 writes 4-bit weights out once: faster large batches, more memory.")
    ] = "none"
    kernels: Annotated[
        KernelsName, _option("kernels", "Which implementation of the operations runs; auto chooses by device.")
    ] = "auto"
    overlap: Annotated[
        OverlapName, _option("overlap", "Plan a step while the one before it runs; auto does so on CUDA.")
    ] = "auto"
    dtype: Annotated[DtypeName, _option("dtype", "Compute type; auto is the checkpoint's own.")] = "auto"
    device: Annotated[DeviceName, _option("device", "auto takes CUDA where there is a GPU.")] = "auto"
    pool_bytes: Annotated[
        int | None,
        _option(
            "pool-bytes",
            "Memory for KV cache and adapters together, for example 2GiB.",
            parser=parse_size,
            metavar="SIZE",
        ),
    ] = None
    memory_fraction: Annotated[
        float | None, _option("memory-fraction", "The same as a share of the memory free after loading.")
    ] = None
    host_cache_bytes: Annotated[
        int | None,
        _option(
            "host-cache-bytes",
            "Host memory for adapters ready to be copied to the device (default: a quarter, 8 GiB at most).",
            parser=parse_size,
            metavar="SIZE",
        ),
    ] = None
    eviction: Annotated[
        EvictionName, _option("eviction", "Which idle adapter or cached prefix gives way when the pool is full.")
    ] = "cost"
    tenant_pool_share: Annotated[
        float, _option("tenant-pool-share", "Share of the pool that one tenant's adapters may hold.")
    ] = 1.0
    max_model_len: Annotated[
        int | None, _option("max-model-len", "Tokens of prompt and answer together (default: the model's limit).")
    ] = None
    max_batch_tokens: Annotated[int, _option("max-batch-tokens", "Tokens computed in one step.")] = 2048
    max_batch_requests: Annotated[int, _option("max-batch-requests", "Requests running at once.")] = 256
    threads: Annotated[
        int | None, _option("threads", "CPU threads per operation (default: 1 for a small base, else every core).")
    ] = None
    store: Annotated[Path, _option("store", "Folder that keeps uploaded adapters.")] = Path("~/.heddle/store")
    adapters: Annotated[
        Path | None, _option("adapters", "Folder of PEFT folders to register at start, each under its own name.")
    ] = None
    keep_versions: Annotated[
        int | None,
        _option("keep-versions", "Newest versions kept of each adapter, beside aliased ones (default: all)."),
    ] = None
    max_queued_requests: Annotated[
        int, _option("max-queued-requests", "Requests in flight at once; more are refused with 503.")
    ] = 1024
    max_queue_seconds: Annotated[
        float, _option("max-queue-seconds", "A request that would wait longer for its first token is refused at once.")
    ] = 60.0
    host: Annotated[str, _option("host", "Address to listen on; loopback unless told otherwise.")] = "127.0.0.1"
    port: Annotated[int, _option("port", "Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000

    def config(self, model: str) -> ServerConfig:
        """The whole server's settings for `model`, a directory or hub id; raises `ConfigError`."""
        store_path = self.store.expanduser().resolve()
        engine = EngineConfig(
            model_path=str(find_model(model, with_weights=self.load_format != "dummy")),
            model_name=self.served_name or model_name(model),
            store_path=str(store_path),
            quantization=self.quantization,
            double_quantization=self.double_quantization,
            load_format=self.load_format,
            base_cache=self.base_cache,
            kernels=self.kernels,
            overlap=self.overlap,
            dtype=self.dtype,
            device=self.device,
            pool_bytes=self.pool_bytes,
            memory_fraction=self.memory_fraction,
            host_cache_bytes=self.host_cache_bytes,
            eviction=self.eviction,
            tenant_pool_share=self.tenant_pool_share,
            max_model_len=self.max_model_len,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_requests=self.max_batch_requests,
            num_threads=self.threads,
        )
        return ServerConfig(
            engine=engine,
            store_path=store_path,
            host=self.host,
            port=self.port,
            adapters_path=None if self.adapters is None else _adapters_folder(self.adapters.expanduser().resolve()),
            keep_versions=self.keep_versions,
            max_queued_requests=self.max_queued_requests,
            max_queue_seconds=self.max_queue_seconds,
        )


def _adapters_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"--adapters is {path}, which is no folder.")
    if (path / "adapter_config.json").exists():
        raise ConfigError(f"--adapters is {path}, which is itself an adapter; give the folder that it lies in.")
    return path


def with_serve_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a typer command every option of `ServeOptions`; it receives them as its argument `options`.

    Settings that cannot be served end the command with status 2 and one line, not a traceback.
    """
    hints = get_type_hints(ServeOptions, include_extras=True)
    names = [field.name for field in fields(ServeOptions)]
    own_hints = get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        options = ServeOptions(**{name: arguments.pop(name) for name in names})
        try:
            command(**arguments, options=options)
        except ConfigError as error:
            typer.secho(f"heddle: {error}", fg="red", err=True)
            raise typer.Exit(2) from None

    own = [each for each in inspect.signature(command).parameters.values() if each.name != "options"]
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(ServeOptions)
    ]
    own = [each.replace(annotation=own_hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*own, *shared)}
    return run
