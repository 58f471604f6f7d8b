"""Loads a baseline, serves it and stops it. Knows each part and the order of things, nothing of their insides."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from contextlib import suppress

import torch
from aiohttp import web

from heddle_loadtest.baseline.adapter_folders import check_adapters, check_names, find_adapters
from heddle_loadtest.baseline.api import Api, Served
from heddle_loadtest.baseline.continuous_batches import ContinuousBatches, cache_tokens
from heddle_loadtest.baseline.job import Batcher
from heddle_loadtest.baseline.peft_runner import PeftRunner, load_peft, require_peft
from heddle_loadtest.baseline.request import GenerationRequest
from heddle_loadtest.baseline.settings import BaselineKind, BaselineSettings, Device
from heddle_loadtest.baseline.static_batches import static_batches
from heddle_loadtest.baseline.token_text import load_tokenizer
from heddle_loadtest.errors import SpecError, TargetError

PROBE_TOKENS = 4  # of each prompt and answer that the adapters' dtype is chosen by
GOODBYE_SECONDS = 1.0  # for open connections to take the end of their answers

Say = Callable[[str], None]


def serve_baseline(settings: BaselineSettings, say: Say) -> None:
    """Serves until SIGINT or SIGTERM; `say` gets a line once it listens.

    Raises SpecError if the base or an adapter cannot be served, TargetError if the port is taken.
    """
    require_peft()
    adapters = find_adapters(settings.adapters)
    check_names(settings.model_name, adapters)
    check_adapters(settings.kind, adapters)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    runner = load_peft(
        settings.base,
        adapters,
        device=choose_device(settings.device),
        dtype=getattr(torch, settings.dtype.value),
        quantization=settings.quantization,
    )
    choose_adapter_dtype(runner, settings)
    asyncio.run(_serve(settings, what_is_served(settings, runner), runner, say))


def choose_device(device: Device) -> torch.device:
    """Raises SpecError if a GPU is asked for and there is none."""
    if device is Device.CUDA and not torch.cuda.is_available():
        raise SpecError("device", device, "torch sees no NVIDIA GPU", "Use --device cpu")
    wants_gpu = device is not Device.CPU and torch.cuda.is_available()
    return torch.device("cuda:0" if wants_gpu else "cpu")


def choose_adapter_dtype(runner: PeftRunner, settings: BaselineSettings) -> None:
    """By a short batch of as many adapters as one has at most: in one `generate`, or of one adapter."""
    is_mixed = settings.kind is BaselineKind.PEFT_MIXED
    draw = random.Random(0)
    requests = [
        GenerationRequest(
            prompt=[draw.randrange(runner.vocabulary_size) for _ in range(PROBE_TOKENS)],
            adapter=runner.adapters[number % len(runner.adapters) if is_mixed else 0],
            max_tokens=PROBE_TOKENS,
            ignore_eos=True,
        )
        for number in range(settings.max_batch)
    ]
    generate = runner.generate_mixed if is_mixed else runner.generate_grouped
    runner.choose_adapter_dtype(lambda: generate(requests))


def start_batcher(settings: BaselineSettings, runner: PeftRunner) -> Batcher:
    """The model's thread runs from here on. Raises SpecError if transformers cannot batch this base continuously."""
    if settings.kind is BaselineKind.TRANSFORMERS_CB_GROUPED:
        try:
            return ContinuousBatches(runner, settings.max_batch, settings.switch_seconds)
        except (ValueError, RuntimeError, MemoryError) as error:
            problem = f"transformers cannot batch it continuously: {error}"
            raise SpecError("base", settings.base, problem, f"Use {BaselineKind.PEFT_GROUPED}") from error
    return static_batches(
        runner,
        is_mixed=settings.kind is BaselineKind.PEFT_MIXED,
        max_batch=settings.max_batch,
        max_wait_seconds=settings.max_wait_seconds,
    )


def what_is_served(settings: BaselineSettings, runner: PeftRunner) -> Served:
    """What clients may ask for."""
    limit = runner.context_length
    if settings.kind is BaselineKind.TRANSFORMERS_CB_GROUPED:
        limit = min(limit, cache_tokens(runner, settings.max_batch) or limit)
    return Served(
        model_name=settings.model_name,
        adapters=runner.adapters,
        tokenizer=load_tokenizer(settings.base),
        context_length=limit,
        vocabulary_size=runner.vocabulary_size,
    )


async def _serve(settings: BaselineSettings, served: Served, runner: PeftRunner, say: Say) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    batcher = start_batcher(settings, runner)
    site = web.AppRunner(
        Api(served, batcher).application(),
        access_log=None,
        shutdown_timeout=GOODBYE_SECONDS,
        handler_cancellation=True,  # who hangs up is not answered any further
    )
    try:
        await site.setup()
        port = await _listen(site, settings)
        say(f"baseline {settings.kind} is ready at http://{settings.host}:{port}")
        await stop.wait()
    finally:
        await asyncio.to_thread(batcher.close)
        with suppress(ConnectionError):
            await site.cleanup()


async def _listen(site: web.AppRunner, settings: BaselineSettings) -> int:
    """The port."""
    try:
        await web.TCPSite(site, settings.host, settings.port).start()
    except OSError as error:
        problem = f"cannot listen there: {error.strerror or error}"
        raise TargetError("port", settings.port, problem, "Choose another --port or --host") from error
    return int(site.addresses[0][1])
