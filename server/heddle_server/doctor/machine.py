"""The machine a server would run on: device, packages, kernels, memory, disk, port."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

from heddle_kernels.dispatch import BackendUnavailable, Kernels, select_kernels
from heddle_server.doctor.check import Check
from heddle_server.options import ServeOptions
from heddle_server.server_address import ServerError
from heddle_server.server_client import ServerClient
from heddle_server.sizes import format_size

NEEDED = ("torch", "transformers", "bitsandbytes")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CPU_FEATURES = {"avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
LITTLE_MEMORY_BYTES = 2 << 30
LITTLE_DISK_BYTES = 5 << 30
ANSWER_SECONDS = 3.0


def check_device(device: torch.device) -> Check:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        words = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        return Check("device", "ok", f"{words}, driver {_driver() or 'unknown'}, CUDA {torch.version.cuda}")
    found = f"CPU, {os.cpu_count()} cores, {platform.machine()}{_cpu_features()}"
    if (driver := _driver()) is not None:
        remedy = "Install torch's CUDA build, or serve with --device cpu on purpose."
        return Check("device", "warn", f"{found}; the NVIDIA driver {driver} is there, and torch finds no GPU", remedy)
    return Check("device", "ok", found)


def check_packages(device: torch.device) -> Iterator[Check]:
    fast = "triton" if device.type == "cuda" else "numba"
    for name in (*NEEDED, "triton", "numba"):
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            if name in NEEDED:
                yield Check(name, "FAIL", "is not installed", f"pip install {name}")
            elif name == fast:
                remedy = "pip install 'heddle[cpu]'" if name == "numba" else "pip install triton"
                yield Check(name, "warn", "is not installed: plain torch computes, several times slower", remedy)
            else:
                yield Check(name, "ok", f"is not installed, and not needed on {device.type}")


def choose_kernels(device: torch.device, dtype: torch.dtype, wanted: str) -> tuple[Kernels | None, Check]:
    """The operations a server would run, and why these; None where those asked for cannot run."""
    try:
        kernels = select_kernels(device, dtype, wanted)
    except BackendUnavailable as error:
        return None, Check("kernels", "FAIL", f"--kernels {error}", "Leave --kernels out.")
    found = f"{kernels.name} for {str(dtype).removeprefix('torch.')}: {kernels.reason}"
    if kernels.name == "reference" and wanted != "reference":
        return kernels, Check("kernels", "warn", found, "What is missing is named above; it will work, but slowly.")
    return kernels, Check("kernels", "ok", found)


def check_memory(device: torch.device) -> Iterator[Check]:
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        yield _memory("device memory", free_bytes, total_bytes)
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    yield _memory("memory", os.sysconf("SC_AVPHYS_PAGES") * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes)


def check_store(store: Path) -> Check:
    """Its folder, or the nearest one above it that is there already."""
    store = store.expanduser().resolve()
    nearest = next(folder for folder in (store, *store.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return Check("store", "FAIL", f"{store} cannot be written", "Name another folder with --store.")
    free_bytes = shutil.disk_usage(nearest).free
    found = f"{store}{'' if nearest == store else ' will be made'}, {format_size(free_bytes)} free"
    if free_bytes < LITTLE_DISK_BYTES:
        return Check(
            "store", "warn", found, "Adapters and their rows lie here: free some space, or name another --store."
        )
    return Check("store", "ok", found)


def check_port(options: ServeOptions) -> Check:
    host, port = options.host, options.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return Check("port", "FAIL", f"{host}:{port}: {error.strerror or error}", "See --host and --port.")
        try:
            ServerClient(f"{host}:{port}", timeout_seconds=ANSWER_SECONDS).get_text("/livez")
        except ServerError:
            remedy = "Give --port another one, or end what listens there."
            return Check("port", "FAIL", f"{port} is in use, and not by a heddle server", remedy)
        return Check(
            "port", "warn", f"{port} is in use by a server that is alive", "A second one needs another --port."
        )
    return Check("port", "ok", f"{port} is free on {host}")


def check_model_cache() -> Check:
    cache = Path(HF_HUB_CACHE)
    models = sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in cache.glob("models--*"))
    offline = "; HF_HUB_OFFLINE is set, so nothing else can be fetched" if HF_HUB_OFFLINE else ""
    if not models:
        remedy = "" if offline else "The first start of a hub id downloads it; a local folder needs nothing."
        return Check("model cache", "warn", f"{cache} has no model{offline}", remedy)
    return Check("model cache", "ok", f"{cache} has {len(models)}: {', '.join(models[:3])}{offline}")


def _memory(name: str, free_bytes: int, total_bytes: int) -> Check:
    found = f"{format_size(free_bytes)} free of {format_size(total_bytes)}"
    if free_bytes < LITTLE_MEMORY_BYTES:
        return Check(name, "warn", found, "`heddle estimate MODEL` says what a base needs.")
    return Check(name, "ok", found)


def _driver() -> str | None:
    if not NVIDIA_DRIVER.exists():
        return None
    words = NVIDIA_DRIVER.read_text().split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version")


def _cpu_features() -> str:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ""
    return "".join(f", {name}" for flag, name in CPU_FEATURES.items() if flag in flags)
